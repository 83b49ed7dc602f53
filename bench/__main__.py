"""`python -m bench [--only NAME...] [--long] [--quick]`: measures, prints one table, exits 1 if a bound does not hold.

The table goes to standard output, progress to standard error, and the rows as JSON lines to the file that BENCH_JSON
names.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.report import Row, progress, table
from exporter.errors import EbfwError
from lab import LabError, net, sweep

_LONG = ("churn",)  # sections that are measured only when asked for: they take ten minutes each


def _sections() -> dict[str, tuple[str, Callable[[bool], Iterator[Row]]]]:
    from bench import churn, datapath, live, memory, parsers, pipeline, process, spans, start, tables

    return {
        "datapath": ("what a packet costs", datapath.rows),
        "live": ("what an application pays", live.rows),
        "pipeline": ("what the pipeline sustains", pipeline.rows),
        "cpu": ("what the agent's process uses: CPU", process.cpu_rows),
        "http": ("what requests cost the agent", process.http_rows),
        "memory": ("what the agent's process uses: memory", memory.rows),
        "maps": ("what the maps take, and reading them", tables.rows),
        "start": ("from start to attached", start.rows),
        "parsers": ("single steps in Python", parsers.rows),
        "spans": ("what a span costs", spans.rows),
        "churn": ("ten minutes in which everything comes and goes", churn.rows),
    }


def _machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"


def main() -> int:
    sections = _sections()
    parser = argparse.ArgumentParser(prog="python -m bench", description="What ebfw costs on this machine.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sections, help=", ".join(sections))
    long = ", ".join(_LONG)
    parser.add_argument("--long", action="store_true", help=f"all, and what takes ten minutes by itself: {long}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look, not a figure to quote")
    options = parser.parse_args()
    try:
        net.preflight()
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    sweep()
    rows: list[Row] = []
    failed: list[str] = []
    json_path = os.environ.get("BENCH_JSON")
    with open(json_path or os.devnull, "w", encoding="utf-8") as lines:
        for name in options.only or [name for name in sections if options.long or name not in _LONG]:
            title, measure = sections[name]
            progress.say(title)
            try:
                for row in measure(options.quick):
                    rows.append(row)
                    print(row.as_json(), file=lines, flush=True)
            except (EbfwError, LabError, OSError, RuntimeError) as error:
                # The other sections still tell something.
                failed.append(f"{name}: {error}")
    print(_machine())
    print(table(rows))
    for text in failed:
        print(f"not measured: {text}", file=sys.stderr)
    missed = [row.name for row in rows if row.passed is False]
    if missed:
        print(f"\n{len(missed)} bound(s) not held: {'; '.join(missed)}")
    return 1 if missed or failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
