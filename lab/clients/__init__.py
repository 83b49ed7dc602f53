"""What clients in the lab are made of: C programs compiled on demand, a TLS library of their own.

In: nothing. Out: paths of files. Not its job: running them; see the head of loadgen.c for what it does and
prints.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import ssl
import subprocess
from pathlib import Path

from lab.cgroup import LabError

# Static where the C library allows it: the file then runs in a guest of another distribution as well.
_FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra")


def cache_folder() -> Path:
    """Where what is made once is kept, outside the checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebfw"


def compiled(name: str = "loadgen") -> Path:
    """Compiles NAME.c into ${XDG_CACHE_HOME:-~/.cache}/ebfw/lab, once per content; needs `cc` only when it is
    not there yet. What opens libraries is linked with the C library as those are. Raises LabError without a compiler or
    when it complains."""
    source = Path(__file__).with_name(f"{name}.c")
    digest = hashlib.sha256(source.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:16]
    cache = cache_folder() / "lab"
    program = cache / f"{name}-{platform.machine()}-{digest}"
    if program.exists():
        return program
    if shutil.which("cc") is None:
        raise LabError(f"no C compiler for {source.name}; try: apt-get install gcc libc6-dev")
    cache.mkdir(parents=True, exist_ok=True)
    # Another process may compile the same: each into a file of its own, the rename is atomic.
    draft = program.with_name(f"{program.name}.{os.getpid()}")
    opens = b"<dlfcn.h>" in source.read_bytes()
    for extra in (("-ldl",),) if opens else (("-static",), ()):
        done = subprocess.run(("cc", *_FLAGS, "-o", str(draft), str(source), *extra), capture_output=True, text=True)
        if done.returncode == 0:
            draft.rename(program)
            return program
    raise LabError(f"cc cannot compile {source}: {done.stderr.strip()}")


def private_libssl(directory: Path) -> Path | None:
    """Copies the libssl of this Python, which is curl's too, and libgnutls, which Debian's curl also maps, into
    `directory`/lib; the path of libssl there, for uprobes that concern nobody else: run clients with
    LD_LIBRARY_PATH=`directory`/lib. None where Python has TLS built in.
    """
    # The mapping counts, not the search path: this is the file that the ssl module really uses.
    assert ssl.OPENSSL_VERSION
    for line in Path("/proc/self/maps").read_text().splitlines():
        library = Path(line.partition("/")[1] + line.partition("/")[2])
        if library.name.startswith("libssl") and library.exists():
            (directory / "lib").mkdir(exist_ok=True)
            for other in library.parent.glob("libgnutls.so.*"):
                if other.is_symlink():
                    shutil.copy(other, directory / "lib")
            return Path(shutil.copy(library, directory / "lib"))
    return None
