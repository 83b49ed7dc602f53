"""Puts the rows of `make bench BENCH_JSON=FILE` into README.md: `python -m bench.readme FILE [FILE ...]`.

In: JSON lines; a row of a later file replaces the same row of an earlier one. Out: the table between the two marks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_README = Path(__file__).resolve().parent.parent / "README.md"
_BEGIN, _END = "<!-- bench table -->", "<!-- end of bench table -->"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _line(row: dict[str, Any]) -> str:
    against = f"{row['reference']}: {_number(row['reference_value'])}" if row.get("reference_value") else ""
    bound = ""
    if row.get("bound") is not None:
        sign = "at least" if row["at_least"] else "at most"
        bound = f"{sign} {row['bound']:g}" + ("" if row["pass"] else " **missed**")
    cells = (row["name"], f"{_number(row['value'])} {row['unit']}", against, _number(row.get("ratio")), bound)
    return "| " + " | ".join(cells) + " |"


def main(files: list[str]) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for name in files:
        for line in Path(name).read_text().splitlines():
            row = json.loads(line)
            rows[row["name"]] = row
    table = ["| what | value | compared with | ratio | bound |", "|---|--:|---|--:|---|", *map(_line, rows.values())]
    text = _README.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    _README.write_text(before + "\n".join((_BEGIN, "", *table, "", _END)) + (after or rest))


if __name__ == "__main__":
    main(sys.argv[1:])
