"""Runs the checkout's tests on Debian's cloud kernels under QEMU with software emulation.

In: `--kernel SERIES` (repeatable; default all), `--jobs N`, pytest arguments after `--`.
Out: one line per test as it ends, a line per kernel, results (console.log, guest.log, pytest.log, junit.xml,
dmesg.log, out/) in a folder per run, a last line with the sums. Exit status 0 only if pytest in every guest
reported success and ran a test; 1 otherwise; 2 when a guest could not be built.
Not its job: building what guests boot from (images.py).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import io
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import images

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent

DEFAULT_PYTEST = ("-m", "core")
# Guests are about ten times slower than a machine: tests multiply their patience by EBFW_TEST_SLOW. They may
# attach to the guest's root cgroup, which on a developer's machine they must leave alone.
GUEST_ENV = {"EBFW_TEST_ROOT_CGROUP": "1", "EBFW_TEST_SLOW": "10"}
RESULTS_MB = 64
KEPT_RUNS = 10
# guest.sh says something every 20 s of its own time; a busy host stretches that.
SILENCE = 240.0
MARK = re.compile(r"^@@ (\d+(?:\.\d+)?) (\w+) ?(.*)$")
TEST_LINE = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*$")


@dataclass
class Outcome:
    """What one guest reported. `problem` is empty if its result counts; times are seconds after power-on."""

    kernel: images.Kernel
    results: Path
    problem: str = ""
    seconds: float = 0.0
    userspace: float = 0.0
    pytest_at: float = 0.0
    exit_code: int | None = None
    release: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    tail: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problem


class Stopped(Exception):
    """The run was interrupted; guests are being ended."""


def payload_files(folder: Path) -> list[str]:
    """Paths below `folder` that go into the guest: what git tracks or would track, else everything."""
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=folder, capture_output=True,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        return sorted({os.fsdecode(n) for n in listed.stdout.split(b"\0") if n})
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())


def write_payload(tar_path: Path, folder: Path, args: Sequence[str], env: dict[str, str]) -> None:
    """A tar (used raw, as a disk) with guest.sh, args, env (NUL-terminated words) and the checkout."""

    def as_root(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        return info

    with tarfile.open(tar_path, "w", format=tarfile.GNU_FORMAT) as tar:
        words = {"args": list(args), "env": [f"{k}={v}" for k, v in env.items()]}
        for name, values in words.items():
            data = "".join(v + "\0" for v in values).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.add(HERE / "guest.sh", "guest.sh", filter=as_root)
        root = tarfile.TarInfo("checkout")
        root.type, root.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(root)
        for name in payload_files(folder):
            # Tracked but deleted, or gone since it was listed: the copy is of what is there.
            with contextlib.suppress(FileNotFoundError):
                tar.add(folder / name, f"checkout/{name}", recursive=False, filter=as_root)


class Guests:
    """Boots guests; knows the running ones, so that all can be ended."""

    def __init__(self, root: Path, opts: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.root, self.say, self.verbose = root, say, bool(opts.verbose)
        self.memory, self.cpus, self.limit = int(opts.memory), int(opts.cpus), float(opts.timeout)
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def stop(self) -> None:
        """Ends every guest and lets none start."""
        with self.lock:
            self.stopping = True
            for qemu in self.running:
                qemu.kill()

    def run(self, kernel: images.Kernel, payload: Path, results: Path) -> Outcome:
        """One guest from power-on to its verdict. Leaves its files in `results`."""
        results.mkdir(parents=True)
        outcome = Outcome(kernel, results)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ebfw-guest-") as temp:
            out_disk = Path(temp) / "results.tar"
            with out_disk.open("wb") as f:
                f.truncate(RESULTS_MB << 20)
            outcome.problem = self.watch(self.command(kernel, payload, out_disk, results), outcome, temp)
            subprocess.run(
                ["tar", "-x", "--no-same-owner", "-f", out_disk, "-C", results],
                stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        outcome.seconds = time.monotonic() - started
        judge(outcome)
        return outcome

    def command(self, kernel: images.Kernel, payload: Path, out_disk: Path, results: Path) -> list[str]:
        """qemu's command line. Disks vda-vdd as init.sh expects; the root's writes go to a temporary file."""
        disks = [
            (self.root, "snapshot=on"),
            (kernel.modules, "readonly=on"),
            (payload, "readonly=on"),
            (out_disk, "cache=unsafe"),
        ]
        words = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(self.cpus)]
        words += ["-m", str(self.memory), "-display", "none", "-monitor", "none", "-nic", "none"]
        words += ["-no-reboot", "-device", "virtio-rng-pci"]
        words += ["-kernel", str(kernel.vmlinuz), "-initrd", str(kernel.initrd)]
        # A kernel bug ends the guest (panic=-1 resets, -no-reboot quits) instead of leaving a half-dead one.
        words += ["-append", "console=ttyS0 quiet panic=-1 oops=panic cgroup_no_v1=all random.trust_cpu=on"]
        words += ["-serial", f"file:{escape(results / 'console.log')}", "-serial", "stdio"]
        for path, how in disks:
            words += ["-drive", f"file={escape(path)},if=virtio,format=raw,{how}"]
        return ["setpriv", "--pdeathsig", "KILL", *words]

    def watch(self, command: list[str], outcome: Outcome, temp: str) -> str:
        """Follows a guest's serial line to its end. Returns the problem, empty if it ended by itself."""
        series, problem = outcome.kernel.series, ""
        with self.lock:
            if self.stopping:
                raise Stopped
            qemu = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, "TMPDIR": temp},
            )  # fmt: skip
            self.running.add(qemu)
        assert qemu.stdout is not None
        started = heard = time.monotonic()
        rest = b""
        try:
            with (outcome.results / "guest.log").open("wb") as log:
                while True:
                    now = time.monotonic()
                    if now - started > self.limit:
                        problem = f"not done after {self.limit:.0f} s"
                    elif now - heard > SILENCE:
                        problem = f"silent for {SILENCE:.0f} s: the kernel hangs"
                    if problem:
                        break
                    if not select.select([qemu.stdout], [], [], 1.0)[0]:
                        continue
                    chunk = os.read(qemu.stdout.fileno(), 65536)
                    if not chunk:
                        break
                    heard = now
                    chunk = chunk.replace(b"\0", b"")  # guest.sh's sign of life
                    log.write(chunk)
                    log.flush()
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        self.hear(series, line.decode(errors="replace").rstrip("\r"), now - started, outcome)
            if rest:  # the name of the test that never ended
                self.hear(series, rest.decode(errors="replace"), now - started, outcome)
        finally:
            qemu.kill()
            code = qemu.wait()
            with self.lock:
                self.running.discard(qemu)
        if self.stopping:
            raise Stopped
        if not problem and outcome.exit_code is None:
            problem = f"the guest ended without a result (qemu status {code}): panic, or qemu could not start"
        return problem

    def hear(self, series: str, line: str, at: float, outcome: Outcome) -> None:
        """One line from guest.sh or pytest. Times are the host's, so that the boot is in them."""
        if mark := MARK.match(line):
            match mark[2]:
                case "userspace":
                    outcome.userspace, outcome.release = at, mark[3]
                case "pytest":
                    outcome.pytest_at = at
                    self.say(
                        f"[{series}] Linux {outcome.release}: userspace after {outcome.userspace:.1f} s, "
                        f"pytest starts after {at:.1f} s"
                    )
                case "done":
                    outcome.exit_code = int(mark[3])
                case _:
                    self.say(f"[{series}] {line}")
            return
        outcome.tail = [*outcome.tail[-199:], line]
        if self.verbose or TEST_LINE.match(line):
            self.say(f"[{series}] {at:6.1f} s  {line}")


def escape(path: Path) -> str:
    """A path inside a qemu option."""
    return str(path).replace(",", ",,")


def judge(outcome: Outcome) -> None:
    """Counts from junit.xml, and the reason why a guest's result is not a success."""
    junit = outcome.results / "junit.xml"
    if junit.is_file():
        try:
            suites = list(ET.parse(junit).getroot().iter("testsuite"))
        except ET.ParseError:
            suites = []
        count = {k: sum(int(s.get(k, 0)) for s in suites) for k in ("tests", "failures", "errors", "skipped")}
        outcome.failed = count["failures"] + count["errors"]
        outcome.skipped = count["skipped"]
        outcome.passed = max(0, count["tests"] - outcome.failed - outcome.skipped)
    if not outcome.problem:
        if not outcome.release.startswith(outcome.kernel.series + "."):
            outcome.problem = f"another kernel booted: {outcome.release or 'none'}"
        elif outcome.exit_code in (124, 137):  # timeout(1): ended, killed
            outcome.problem = "pytest did not end in time"
        elif outcome.exit_code:
            outcome.problem = f"pytest failed (exit status {outcome.exit_code})"
        elif not outcome.passed:
            outcome.problem = "no test ran"
    if outcome.problem and not outcome.failed:
        outcome.failed = 1  # a guest that failed as a whole must show in the sum


def report(outcome: Outcome, say: Callable[[str], None]) -> None:
    """The end of what a failed guest said, then its line."""
    if not outcome.ok:
        console = outcome.results / "console.log"
        if outcome.exit_code is None and console.is_file():
            lines = console.read_text(errors="replace").splitlines()
            panic = next((i for i, t in enumerate(lines) if re.search(r"Oops|Kernel panic|BUG:", t)), len(lines) - 30)
            for line in lines[max(0, panic - 15) :][:60]:
                say(f"[{outcome.kernel.series}] console | {line}")
        start = next((i for i, t in enumerate(outcome.tail) if re.match(r"=+ (FAILURES|ERRORS) =", t)), -60)
        for line in outcome.tail[start:]:
            say(f"[{outcome.kernel.series}] | {line}")
    kernel = outcome.kernel
    say(
        f"[{kernel.series}] Linux {outcome.release or kernel.release} ({kernel.version}), "
        f"{outcome.seconds:.0f} s: "
        f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
        + ("" if outcome.ok else f"; {outcome.problem}")
        + f"  [{outcome.results}]"
    )


def results_folder(given: Path | None) -> Path:
    """Where this run's results go: `given`, or a new folder in the cache, where the newest KEPT_RUNS stay."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        if any(given.iterdir()):
            raise images.BuildError(f"{given} is not empty")
        return given
    runs = images.cache_dir() / "runs"
    runs.mkdir(exist_ok=True)
    for old in sorted(runs.iterdir())[: -KEPT_RUNS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    folder = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir()
    return folder


def options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and pytest's arguments (after `--`; they replace DEFAULT_PYTEST)."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"Everything after -- goes to pytest instead of: {shlex.join(DEFAULT_PYTEST)}",
    )
    parser.add_argument("--kernel", action="append", choices=list(images.SERIES), help="series; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="guests at a time (default 1)")
    parser.add_argument("--payload", type=Path, default=CHECKOUT, help="goes in instead of the checkout")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for pytest")
    parser.add_argument("--results", type=Path, help="results folder (default: a new one in the cache)")
    parser.add_argument("--timeout", type=float, default=2400, help="seconds for one guest (default 2400)")
    parser.add_argument("--test-timeout", type=int, default=600, help="seconds for one test (default 600)")
    parser.add_argument("--memory", type=int, default=2048, help="MB for one guest (default 2048)")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="build anew, with the mirror's newest kernels")
    parser.add_argument("--build-only", action="store_true", help="fill the cache, boot nothing")
    parser.add_argument("-v", "--verbose", action="store_true", help="show everything that pytest prints")
    own, pytest_args = list(argv), list(DEFAULT_PYTEST)
    if "--" in own:
        cut = own.index("--")
        own, pytest_args = own[:cut], own[cut + 1 :]
    return parser.parse_args(own), pytest_args


def main(argv: Sequence[str]) -> int:
    """See the module's docstring."""
    opts, pytest_args = options(argv)
    began = time.monotonic()
    printing = threading.Lock()

    def say(line: str) -> None:
        with printing:
            print(line, flush=True)

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    guests: Guests | None = None
    try:
        images.need_tools()
        checkout = opts.payload.resolve()
        root = images.root_image(CHECKOUT, opts.fresh)
        kernels = [images.kernel(s, opts.fresh) for s in dict.fromkeys(opts.kernel or images.SERIES)]
        if opts.build_only:
            for k in kernels:
                say(f"[{k.series}] Linux {k.release} ({k.version})")
            return 0
        folder = results_folder(opts.results)
        env = {**GUEST_ENV, "EBFW_GUEST_LIMIT": str(int(max(30, opts.timeout - 90)))}
        env["EBFW_GUEST_TEST_LIMIT"] = str(opts.test_timeout)
        env |= dict(e.split("=", 1) for e in opts.env)
        payload = folder / "payload.tar"
        write_payload(payload, checkout, pytest_args, env)
        say(f"guests run: pytest {shlex.join(pytest_args)}")
        guests = Guests(root, opts, say)
        outcomes = []
        with concurrent.futures.ThreadPoolExecutor(max(1, opts.jobs)) as pool:
            try:
                jobs = [pool.submit(guests.run, k, payload, folder / k.series) for k in kernels]
                for job in concurrent.futures.as_completed(jobs):
                    outcomes.append(job.result())
                    report(outcomes[-1], say)
            finally:
                guests.stop()
                payload.unlink(missing_ok=True)
    except images.BuildError as e:
        print(f"run.py: {e}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Stopped):
        print("run.py: interrupted", file=sys.stderr)
        return 130
    bad = [o.kernel.series for o in outcomes if not o.ok]
    if bad:
        say(f"failed on: {' '.join(sorted(bad))}")
    total = [sum(getattr(o, k) for o in outcomes) for k in ("passed", "failed", "skipped")]
    say(f"{total[0]} passed, {total[1]} failed, {total[2]} skipped in {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
