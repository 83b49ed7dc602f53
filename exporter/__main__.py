"""The command line: which of the things that ebfw can do, with which settings.

In: argv and the environment. Out: an exit status. The kernel, bcc and the exporters are imported by the
subcommand that needs them, so that `ebfw version`, `--help` and a mistake in a setting answer at once and
anywhere."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from exporter import __version__
from exporter.errors import EbfwError, NotPermitted, SettingsError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_DESCRIPTION = """\
Tells what every pod, container and service of this host sends out: connections,
DNS lookups, TLS names and HTTP requests, as text, JSON, Prometheus and OpenTelemetry.

Without a command it is the agent: it watches until it is stopped."""

_EPILOG = """\
examples:
  sudo ebfw                                  watch the whole host, lines on standard output
  sudo EBFW_OUTPUT=json ebfw | jq .domain    the same, one JSON object a line
  sudo EBFW_CGROUP=/sys/fs/cgroup/system.slice ebfw
                                             watch one subtree only
  sudo OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 ebfw
                                             push spans, logs and metrics as well
  sudo ebfw check                            what works on this host, what does not, what that costs
  sudo ebfw inventory                        what each workload talks to, since when, how much
  sudo ebfw detach                           remove everything that ebfw left in the kernel

settings come from EBFW_* and OTEL_* variables and from the file that --config or
EBFW_CONFIG names (cgroup, exclude.cidrs, exclude.domainSuffixes). A mistake in EBFW_*
or the file is an error. Metrics are at http://127.0.0.1:9090/metrics unless
EBFW_METRICS_ADDR says otherwise (empty: nowhere).

exit status:
  0    all went well; for check: the agent can run here
  1    something is missing or was refused, said in one line on standard error;
       for inventory --diff --exit-code: there are differences
  2    a mistake in the arguments, a variable or the file
  130  interrupted"""


def _parser() -> argparse.ArgumentParser:
    # allow_abbrev off: `-c` or `--conf` in somebody's unit file would break when the next option arrives.
    parser = argparse.ArgumentParser(
        prog="ebfw",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-config", "--config", metavar="FILE", help="YAML file with cgroup and exclude")
    parser.add_argument("--version", action="version", version=f"ebfw {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, text in (
        ("check", "report what this host allows, feature by feature, and the size of every map"),
        ("detach", "remove the programs, links and maps that ebfw pinned; safe to run twice"),
        ("compile", "compile the BPF programs for later starts, which then take no compiler's seconds: for images"),
        ("version", "print the version"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".", allow_abbrev=False)
        if name != "version":
            _add_config(command)
    _add_inventory(commands)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    # SUPPRESS: otherwise the subcommand's default overwrites a --config that stands before it.
    command.add_argument("-config", "--config", metavar="FILE", default=argparse.SUPPRESS)


_INVENTORY = """\
Shows what each workload talks to: destination, since when, how much, which executable,
and where the name comes from (host, sni, dns, or only the address).

The agent keeps it in the file that EBFW_INVENTORY names; systemd's StateDirectory= sets one.
An aligned table on a terminal; in a pipe exact values between tabs."""

_INVENTORY_EPILOG = """\
examples:
  sudo ebfw inventory                            all of it
  sudo ebfw inventory --workload 'shop/*'        one namespace, by name
  sudo ebfw inventory --json | jq '.workloads[].destinations[].name'
  sudo cp /var/lib/ebfw/inventory.json monday.json
  ebfw inventory --diff monday.json tuesday.json
                                                 what is new, what is gone, what changed
  ebfw inventory --exit-code --diff release-1.json release-2.json
                                                 the same as a check: status 1 if they differ"""


def _add_inventory(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "inventory",
        help="show what each workload talks to, or what changed between two files",
        description=_INVENTORY,
        epilog=_INVENTORY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("file", metavar="FILE", nargs="?", help="the inventory, where it is not the agent's own")
    command.add_argument(
        "--workload",
        metavar="NAME",
        default="",
        help="only these: NAME, NAMESPACE/NAME or a container; * and ? stand for anything",
    )
    command.add_argument("--json", action="store_true", help="as JSON, in the form of the file")
    command.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="what is in B and not in A (+), in A only (-), changed (~)"
    )
    command.add_argument("--exit-code", action="store_true", help="with --diff: exit with 1 if there are differences")
    _add_config(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. `argv` is without the program's name."""
    try:
        options = _parser().parse_args(argv)
        status = (
            _inventory(options) if options.command == "inventory" else _run(options.command or "run", options.config)
        )
        sys.stdout.flush()
        return status
    except SettingsError as error:
        return _complain(error, EXIT_USAGE)
    except EbfwError as error:
        return _complain(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`ebfw check | head`). Python flushes stdout once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def _run(command: str, config: str | None) -> int:
    if command == "version":
        print(f"ebfw {__version__}")
        return EXIT_OK

    from exporter.settings import load

    settings = load(config, os.environ)

    from exporter.health import start_log

    start_log(settings.log_level, sys.stderr)
    if command == "compile":
        return _compile(settings.cache_path)
    if command != "check":  # check runs without root too: that root is missing is one of its answers
        _need_privilege(command)

    if command == "run":
        from exporter.kernel import build

        build.ahead(settings.cache_path, settings.pin_path)
        try:
            from exporter.agent import run

            return run(settings)
        finally:
            build.abandon()
    from exporter.host import check, detach

    return {"check": check, "detach": detach}[command](settings)


def _compile(cache: Path | None) -> int:
    from exporter.kernel import build

    if cache is None:
        raise SettingsError("EBFW_CACHE_PATH is empty: name the folder in which the compiled programs are to be kept")
    began = time.monotonic()
    print(f"{build.fill(cache)} ({time.monotonic() - began:.1f} s)")
    return EXIT_OK


def _inventory(options: argparse.Namespace) -> int:
    from exporter.inventory import book, report
    from exporter.settings import load

    settings = load(options.config, os.environ)
    if options.diff is None:
        if options.exit_code:
            raise SettingsError("--exit-code goes with --diff")
        path = Path(options.file) if options.file else settings.inventory or book.DEFAULT
        return report.show(path, options.workload, options.json, settings.colour, sys.stdout)
    if options.file:
        raise SettingsError("--diff takes two files, and no third")
    before, after = map(Path, options.diff)
    found = report.show_diff(before, after, options.workload, options.json, settings.colour, sys.stdout)
    return EXIT_FAILED if found and options.exit_code else EXIT_OK


_CAP_SYS_ADMIN, _CAP_BPF = 21, 39


def _need_privilege(command: str) -> None:
    """Raises NotPermitted where nothing could work. What each feature needs beyond it, the loader finds
    out."""
    if os.geteuid() == 0:
        return
    try:
        fields = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
        effective = int(fields["CapEff"], 16)
    except (OSError, ValueError, KeyError):
        effective = 0
    if not effective & (1 << _CAP_SYS_ADMIN | 1 << _CAP_BPF):
        again = "sudo ebfw" if command == "run" else f"sudo ebfw {command}"
        raise NotPermitted(f"this needs root (or CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_SYS_ADMIN); try: {again}")


def _complain(error: EbfwError, status: int) -> int:
    print("ebfw:", " ".join(str(error).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
