"""Compiles bpf/ebfw.bpf.c, in a child process that exits: LLVM's 80 MB go with it. The only place that imports bcc.

In: the C sources and nothing else. Out: for each entry function its instructions, in which a map is still a number
(enum map_id). bcc creates no map and loads no program here, and reads no kernel headers: bpf/include stands in. So
they are the same on every node, and a wheel brings them along.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import logging
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

from exporter.errors import KernelError

log = logging.getLogger(__name__)

# By EBFW_PART in ebfw.bpf.c: two children compile side by side, each about as long.
PARTS: dict[int, tuple[str, ...]] = {
    1: (
        "ebfw_frames_out",
        "ebfw_frames_in",
        "ebfw_frames_tls",
        "ebfw_ssl_write",
        "ebfw_ssl_write_ex",
        "ebfw_ssl_write_return",
        "ebfw_ssl_read",
        "ebfw_ssl_read_ex",
        "ebfw_ssl_read_return",
        "ebfw_ssl_free",
        "ebfw_go_write",
        "ebfw_go_read",
        "ebfw_go_read_return",
        "ebfw_go_close",
        "ebfw_exec",
    ),
    2: (
        "ebfw_connect4",
        "ebfw_connect6",
        "ebfw_sendmsg4",
        "ebfw_sendmsg6",
        "ebfw_sockops",
        "ebfw_egress",
        "ebfw_ingress",
        "ebfw_release",
    ),
}


def source_folder() -> Path:
    """exporter/_bpf: inside the installed package; in a checkout it leads to bpf/."""
    folder = Path(__file__).resolve().parent.parent / "_bpf"
    if (folder / "ebfw.bpf.c").is_file():
        return folder
    raise KernelError("the BPF sources are missing; install ebfw again")


def build_id() -> bytes:
    """32 bytes that change when the sources do; pinned beside the programs, so that a new build replaces them."""
    digest = hashlib.sha256(platform.machine().encode())
    for path in sorted(source_folder().rglob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.digest()


def programs(cache: Path | None = None) -> dict[str, bytes]:
    """Instructions by entry function: those that the wheel brought, or those that an earlier start kept in the folder
    `cache`, or compiled now and kept there. A node needs no compiler's seconds and memory."""
    code = _read(_wheel_file())
    if code is not None:
        return code
    if cache is None:
        return compile_programs()
    code, problem = _have(cache)
    if problem:
        log.warning(
            "EBFW_CACHE_PATH=%s: the compiled programs cannot be kept there: %s; each start compiles them anew",
            cache,
            problem,
        )
    return code


def fill(cache: Path) -> str:
    """Have the instructions in `cache`, where no wheel brought them; the file that has them. Raises KernelError where
    it cannot be written or did not compile."""
    if brought():
        return str(_wheel_file())
    _, problem = _have(cache)
    if problem:
        raise KernelError(f"the compiled programs cannot be kept in {cache}: {problem}")
    return str(_file(cache))


def brought() -> bool:
    """Whether the wheel brought the instructions."""
    return _read(_wheel_file()) is not None


def _wheel_file() -> Path:
    """Where a wheel has them: of these very sources, whatever compiler is or is not here."""
    return source_folder() / f"programs-{_recipe('')}.json"


def _file(cache: Path) -> Path:
    spec = importlib.util.find_spec("bcc")
    found = os.stat(spec.origin) if spec is not None and spec.origin else None
    # The compiler's file changes with its version.
    return cache / f"programs-{_recipe(f'{found.st_mtime_ns} {found.st_size}' if found else '')}.json"


def _recipe(compiler: str) -> str:
    """What the instructions depend on: the sources, the machine, the compiler."""
    return hashlib.sha256(build_id() + compiler.encode() + repr(PARTS).encode()).hexdigest()[:32]


def _have(cache: Path) -> tuple[dict[str, bytes], str]:
    """The instructions, and why they are not in `cache` now; "" where they are."""
    file = _file(cache)
    code = _kept(file)
    if code is not None:
        return code, ""
    code = compile_programs()
    try:
        _keep(file, code)
    except OSError as error:
        return code, error.strerror or str(error)
    # What others could write is not read.
    return code, "" if _kept(file) else "only its owner, the agent's user, may write there"


def _kept(file: Path) -> dict[str, bytes] | None:
    """None where there is none that only root can have written."""
    try:
        for status in (file.parent.stat(), file.stat()):
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
    except OSError:
        return None
    return _read(file)


def _read(file: Path) -> dict[str, bytes] | None:
    """None where it is missing or not whole."""
    try:
        code = {name: base64.b64decode(text) for name, text in json.loads(file.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return code if set(code) == {name for part in PARTS.values() for name in part} else None


def _keep(file: Path, code: dict[str, bytes]) -> None:
    """One file: what other sources left is removed. Raises OSError; a full disk leaves no half of a file."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in file.parent.glob("programs-*.json"):
        old.unlink()
    new = file.with_suffix(f".{os.getpid()}")
    try:
        new.write_text(json.dumps({name: base64.b64encode(text).decode() for name, text in code.items()}))
        new.chmod(0o644)
        new.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


_begun: list[subprocess.Popen[str]] = []


def ahead(cache: Path | None, pin_path: Path) -> None:
    """Begin to compile, where the next `programs(cache)` will have to: the agent's imports take a while, too.
    `pin_path`: what is pinned there need not be compiled, as a rule."""
    if (pin_path / "map_stamp").exists() or _wheel_file().exists() or (cache is not None and _file(cache).exists()):
        return
    _begun.extend(_begin())


def abandon() -> None:
    """Stop what is still under way: the agent did not come so far, or was told to stop."""
    for child in _begun:
        child.kill()
        child.communicate()
    _begun.clear()


def _begin() -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-m", "exporter.kernel.build", str(part)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        for part in PARTS
    ]


def compile_programs() -> dict[str, bytes]:
    """Instructions by entry function, from child processes. Raises KernelError with the compiler's own words."""
    if not _begun:
        _begun.extend(_begin())
    code: dict[str, bytes] = {}
    failure = ""
    try:
        for child in _begun:
            out, err = child.communicate()
            if child.returncode:
                failure = failure or _explain(err)
            else:
                code.update((name, base64.b64decode(text)) for name, text in json.loads(out).items())
    finally:
        abandon()
    if failure:
        raise KernelError(failure)
    return code


def _explain(output: str) -> str:
    if "No module named 'bcc'" in output:
        return (
            f"{sys.executable} cannot import bcc. Install the system package python3-bpfcc, and run ebfw from "
            "a virtual environment over the system Python with --system-site-packages (`make` does both)."
        )
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line] or lines[-3:]
    return "bcc could not compile the BPF programs: " + " | ".join(errors[:3])


def _compile_here(part: int) -> dict[str, str]:
    folder = source_folder()
    os.environ["BCC_KERNEL_SOURCE"] = str(folder / "include")
    from bcc import BPF  # a system package; no type hints (pyproject.toml says so)

    # -g0: nobody reads the debug information that bcc asks for, and it takes an eighth of the time.
    flags = [f"-I{folder}", f"-DEBFW_ARCH_{platform.machine().upper()}", f"-DEBFW_PART={part}"]
    flags += ["-Wno-macro-redefined", "-g0"]
    module = BPF(text=(folder / "ebfw.bpf.c").read_text(), cflags=flags)
    return {name: base64.b64encode(module.dump_func(name)).decode() for name in PARTS[part]}


if __name__ == "__main__":
    if sys.argv[1:] == ["wheel"]:
        _keep(_wheel_file(), compile_programs())
        sys.exit()
    # PR_SET_PDEATHSIG: an agent that ends or is killed meanwhile leaves nobody at work behind.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    result = json.dumps(_compile_here(int(sys.argv[1])))
    sys.stdout.write(result)
    sys.stdout.flush()
    os._exit(0)  # bcc's own exit handlers look for tracefs and complain
