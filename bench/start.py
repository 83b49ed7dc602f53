"""How long it takes from exec of the agent until everything is attached; next to bcc, which only compiles."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.report import Row, Samples, progress, summary
from bench.world import REPOSITORY, Agent, pin_path
from lab import Cgroup

# What bcc alone needs for the same source: interpreter, import, compile, nothing loaded.
_BARE = """
import os, platform, sys
from exporter.kernel import build
folder = build.source_folder()
os.environ["BCC_KERNEL_SOURCE"] = str(folder / "include")
from bcc import BPF
BPF(
    text=(folder / "ebfw.bpf.c").read_text(),
    cflags=[f"-I{folder}", f"-DEBFW_ARCH_{platform.machine().upper()}", "-Wno-macro-redefined"],
)
os._exit(0)
"""


def rows(quick: bool) -> Iterator[Row]:
    rounds = 2 if quick else 7
    fresh: list[float] = []
    adopted: list[float] = []
    killed: list[float] = []
    compiled: list[float] = []
    again: list[float] = []
    bare: list[float] = []
    with Cgroup("bench") as cgroup:
        for number in range(rounds):
            progress.step(f"start {number + 1} of {rounds}")
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", _BARE], cwd=REPOSITORY, check=True, stderr=subprocess.DEVNULL)
            bare.append(time.perf_counter() - began)
            with tempfile.TemporaryDirectory() as folder, pin_path() as pins:
                # The same without what a wheel brings.
                unbuilt = Path(folder, "unbuilt")
                shutil.copytree(
                    REPOSITORY / "exporter", unbuilt / "exporter", ignore=shutil.ignore_patterns("programs-*.json")
                )
                for compiled_modules in REPOSITORY.glob("*.so"):  # mypyc has them all in one file beside the package
                    shutil.copy2(compiled_modules, unbuilt)
                agent = Agent(cgroup, pins, environment={"EBFW_CACHE_PATH": f"{folder}/cache"}, folder=unbuilt)
                for samples in (compiled, again):
                    agent.start()
                    samples.append(agent.seconds)
                    agent.stop()
            with pin_path() as pins:
                agent = Agent(cgroup, pins, environment={"EBFW_PERSIST": "true"})
                for samples, end in (
                    (fresh, signal.SIGTERM),
                    (adopted, signal.SIGKILL),
                    (killed, signal.SIGTERM),
                ):
                    agent.start()
                    samples.append(agent.seconds)
                    agent.stop(end)
    reference = summary(bare).median
    for name, samples, bound, note in (
        ("start to attached", fresh, 2.0, "Python, imports, load, attach: what a wheel installed starts like"),
        ("start to attached, pins kept", adopted, 2.0, "adopted after a clean exit"),
        ("start to attached, after SIGKILL", killed, 2.0, "adopted from a killed agent"),
        ("start to attached, from sources", compiled, None, "a checkout's first: compiles, and keeps what it compiled"),
        ("start to attached, compiled before", again, 2.0, "a checkout's second, nothing pinned"),
    ):
        all_: Samples = summary(samples)
        yield Row(
            name,
            all_.median,
            "s",
            "bcc's bare compile",
            reference,
            all_.median / reference,
            bound,
            "value",
            low=all_.low,
            high=all_.high,
            spread_of="value",
            note=note,
        )
