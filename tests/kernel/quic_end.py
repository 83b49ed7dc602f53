"""Not a test: one end of QUIC connections, by aioquic. `serve ADDRESS CERTIFICATE KEY` tells its port and echoes until
its standard input ends; `ask ADDRESS PORT NAME CA VERSION COUNT` opens so many connections one after the other, sends
a ping on each, and tells how many it got back and which version each was of, as JSON lines."""

import asyncio
import json
import sys

from aioquic.asyncio import connect, serve
from aioquic.quic.configuration import QuicConfiguration

VERSIONS = {"1": 0x00000001, "2": 0x6B3343CF}


def tell(**said):
    print(json.dumps(said), flush=True)


def echo(reader, writer):
    async def answer():
        writer.write(await reader.read())
        writer.write_eof()

    echo.tasks.append(asyncio.ensure_future(answer()))


echo.tasks = []


async def server(address, certificate, key):
    config = QuicConfiguration(is_client=False, alpn_protocols=["lab"], supported_versions=list(VERSIONS.values()))
    config.load_cert_chain(certificate, key)
    running = await serve(address, 0, configuration=config, stream_handler=echo)
    tell(port=running._transport.get_extra_info("sockname")[1])
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    running.close()


async def client(address, port, name, ca, version, count):
    number = VERSIONS[version]
    for _ in range(int(count)):
        config = QuicConfiguration(
            alpn_protocols=["lab", "h3"], server_name=name, original_version=number, supported_versions=[number]
        )
        config.load_verify_locations(ca)
        async with connect(address, int(port), configuration=config) as connection:
            reader, writer = await connection.create_stream()
            writer.write(b"ping")
            writer.write_eof()
            tell(got=(await reader.read()).decode(), version=connection._quic._version)


asyncio.run({"serve": server, "ask": client}[sys.argv[1]](*sys.argv[2:]))
