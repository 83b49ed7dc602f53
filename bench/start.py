"""How long it takes from exec of the agent until everything is attached; next to bcc, which only compiles."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

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
    again: list[float] = []
    bare: list[float] = []
    with Cgroup("bench") as cgroup:
        for number in range(rounds):
            progress.step(f"start {number + 1} of {rounds}")
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", _BARE], cwd=REPOSITORY, check=True, stderr=subprocess.DEVNULL)
            bare.append(time.perf_counter() - began)
            with tempfile.TemporaryDirectory() as cache, pin_path() as pins:
                agent = Agent(cgroup, pins, environment={"EBFW_CACHE_PATH": cache})
                for samples in ([], again):
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
    for name, samples, note in (
        ("start to attached", fresh, "Python, imports, compile, load, attach"),
        ("start to attached, compiled before", again, "nothing pinned, the instructions kept in EBFW_CACHE_PATH"),
        ("start to attached, pins kept", adopted, "adopted after a clean exit"),
        ("start to attached, after SIGKILL", killed, "adopted from a killed agent"),
    ):
        all_: Samples = summary(samples)
        yield Row(
            name,
            all_.median,
            "s",
            "bcc's bare compile",
            reference,
            all_.median / reference,
            2.0,
            "value",
            low=all_.low,
            high=all_.high,
            spread_of="value",
            note=note,
        )
