"""``senet-fused bench compare a.json b.json``: two saved runs, row by row."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import RequestError, positive, require_writable
from .model_report import dtype_label, input_label
from .report import COMMANDS, geometric_mean, kind_of, read_json, shape_label, task_label, write_json
from .tables import Table, ratio_label, show, time_label

__all__ = ["add_arguments", "compare", "differences", "run", "summarise", "verdict"]

Row = dict[str, Any]
# What makes two rows the same measurement. Rows of the SE layer have no op.
_IDENTITY = {
    "layers": ("op", "problem", "shape", "dtype", "layout", "direction", "cache", "provider"),
    "model": ("model", "batch", "size", "dtype", "amp", "layout", "mode", "provider"),
}
_DIRECTION = {"layers": "direction", "model": "mode"}
_COMPARED = ("device", "versions", "threads", "revision", "command")
_VERDICTS = ("faster", "same", "slower")

_EPILOG = """\
Both files are what `senet-fused bench --json` has written, or both what `senet-fused bench model --json` has. Rows
belong together that are equal in all of: {identity};
of whole models: {models}.

ratio    b's median / a's: 0.8 says that b takes 0.8 of a's time.
spread   of the ratio: ratio x sqrt((IQR of a / median of a)^2 + (IQR of b / median of b)^2).
verdict  on b: same if 1 is within ratio +- spread, else faster (ratio below 1) or slower.

The spread is that of samples within each run. Between runs a machine may drift by more: the rows of copy, or of stock
in whole models, are code that has not changed and show by how much. What both runs call the same may still have been
asked for differently (--bias, --residual, --act ...): the commands are shown where they differ.

examples:
  senet-fused bench compare before.json after.json
  senet-fused bench compare before.json after.json --fail-slower 1.05 --json compared.json

exit status: 0 compared, 1 with --fail-slower: some row is slower than that, 2 the files cannot be read or are of
different kinds
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand. Imports no torch."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG.format(identity=", ".join(_IDENTITY["layers"]), models=", ".join(_IDENTITY["model"]))
    parser.add_argument("a", type=Path, metavar="A.json", help="the run that is compared with")
    parser.add_argument("b", type=Path, metavar="B.json", help="the run that the verdicts are on")
    parser.add_argument(
        "--fail-slower",
        type=positive(float),
        metavar="RATIO",
        help="exit with 1 if a row's ratio is above this by more than its spread",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="both headers, rows and summary")
    parser.add_argument("--plain", action="store_true", help="no colours even if rich is there")


def verdict(a: Row, b: Row) -> tuple[float, float, str]:
    """Ratio of the medians, its spread, and faster, same or slower, for two rows that have a time."""
    ratio = b["median_s"] / a["median_s"]
    spread = ratio * math.hypot(*(row["iqr_s"] / row["median_s"] for row in (a, b)))
    return ratio, spread, "slower" if ratio - spread > 1 else "faster" if ratio + spread < 1 else "same"


def _identity(kind: str, row: Row) -> Row:
    return {name: row[name] for name in _IDENTITY[kind] if name in row}


def _by_identity(kind: str, rows: Sequence[Row]) -> dict[tuple, Row]:
    """Rows by what identifies them, and by their turn where several are the same measurement."""
    turns: Counter[tuple] = Counter()
    found = {}
    for row in rows:
        key = tuple(_identity(kind, row).items())
        found[(*key, turns[key])] = row
        turns[key] += 1
    return found


def compare(kind: str, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[Row]:
    """One row per measurement of either run, a's first, in its order.

    "in" says which runs have it: "both", "a" or "b". ratio, spread and verdict are None unless both have a time.
    """
    a, b = _by_identity(kind, rows_a), _by_identity(kind, rows_b)
    compared = []
    for key in dict.fromkeys([*a, *b]):
        pair = {"a": a.get(key), "b": b.get(key)}
        row: Row = dict(key[:-1])
        row["in"] = "both" if pair["a"] and pair["b"] else "a" if pair["a"] else "b"
        for name, found in pair.items():
            for value in ("median_s", "iqr_s", "backend", "error"):
                row[f"{name}_{value}"] = found and found[value]
        timed = all(found and found["median_s"] is not None for found in pair.values())
        ratio, spread, says = verdict(pair["a"], pair["b"]) if timed else (None, None, None)
        compared.append(row | {"ratio": ratio, "spread": spread, "verdict": says})
    return compared


def summarise(kind: str, compared: Sequence[Row]) -> list[Row]:
    """One entry per op, direction (or mode) and provider: the ratios' geometric mean, and how many of each verdict."""
    groups: dict[tuple, list[Row]] = {}
    for row in compared:
        key = {name: row[name] for name in ("op", _DIRECTION[kind], "provider") if name in row}
        groups.setdefault(tuple(key.items()), []).append(row)
    summary = []
    for key, members in groups.items():
        ratios = [row["ratio"] for row in members if row["ratio"] is not None]
        verdicts = Counter(row["verdict"] for row in members)
        summary.append(
            {
                **dict(key),
                "ratio": geometric_mean(ratios),
                **{name: verdicts[name] for name in _VERDICTS},
                "compared": len(ratios),
                "rows": len(members),
            }
        )
    return summary


def differences(a: Row, b: Row) -> list[str]:
    """What differs in device, versions, threads, revision and command of two headers, as ``threads: 1, 2``."""
    found = []
    for name in _COMPARED:
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            keys = [key for key in {**left, **right} if left.get(key) != right.get(key)]
            found += [f"{name} {key}: {left.get(key)}, {right.get(key)}" for key in keys]
        elif left != right:
            found.append(f"{name}: {left}, {right}")
    return found


def _title(kind: str, row: Row) -> str:
    if kind == "layers":
        return f"{row['problem']}: {task_label(row)}, {row['dtype']}"
    return f"{row['model']}: {row['mode']}, {dtype_label(row)}"


def _cells(kind: str, row: Row) -> dict[str, str]:
    if kind == "layers":
        cells = {"N x C/R @ plane": shape_label(row), "layout": row["layout"], "cache": row["cache"]}
    else:
        cells = {"input": input_label(row), "layout": row["layout"]}
    cells["provider"] = row["provider"]
    errors = [f"{name}: {row[f'{name}_error']}" for name in "ab" if row[f"{name}_error"]]
    if errors:
        return cells | {"error": "; ".join(errors)}
    return cells | {
        "a": time_label(row["a_median_s"]),
        "b": time_label(row["b_median_s"]),
        "b / a": ratio_label(row["ratio"]),
        "+-": ratio_label(row["spread"]),
        "verdict": row["verdict"] or "no time",
    }


def _tables(kind: str, compared: Sequence[Row], summary: Sequence[Row]) -> list[Table]:
    groups: dict[str, list[dict[str, str]]] = {}
    for row in compared:
        if row["in"] == "both":
            groups.setdefault(_title(kind, row), []).append(_cells(kind, row))
    tables = [Table(title, lines) for title, lines in groups.items()]
    lines = [
        {
            "direction": task_label(entry) if kind == "layers" else entry["mode"],
            "provider": entry["provider"],
            "b / a": ratio_label(entry["ratio"]),
            **{name: str(entry[name]) for name in _VERDICTS},
            "rows": f"{entry['compared']}/{entry['rows']}",
        }
        for entry in summary
    ]
    return [*tables, Table("Geometric means of b / a", lines)] if lines else tables


def _render(
    headers: Sequence[Row], paths: Sequence[Path], compared: Sequence[Row], summary: Sequence[Row], plain: bool
) -> None:
    kind = kind_of(headers[0])
    for name, path, header in zip("ab", paths, headers, strict=True):
        print(f"{name + ':':12} {path}, {header['date']}, revision {header.get('revision') or 'unknown'}")
        for trouble in filter(None, (header.get("warning"), header.get("interrupted"))):
            print(f"{'':12} {trouble}")
    print(f"{'differs:':12} {'; '.join(differences(*headers)) or 'nothing in ' + ', '.join(_COMPARED)}")
    show(_tables(kind, compared, summary), sys.stdout, plain)
    for name, path in zip("ab", paths, strict=True):
        alone = [row for row in compared if row["in"] == name]
        if alone:
            print(f"\nonly in {path}:")
        for row in alone:
            print("  " + ", ".join(f"{key} {value}" for key, value in _identity(kind, row).items()))


def run(args: argparse.Namespace, command: Sequence[str] = ()) -> int:
    """Compares two saved runs and prints the report.

    Returns:
        0; 1 with --fail-slower if a row is slower than that beyond its spread.

    Raises:
        RequestError: a file cannot be read or is no saved run, or the two are of different kinds.
    """
    paths = (args.a, args.b)
    (a, rows_a), (b, rows_b) = (read_json([path]) for path in paths)
    kind = kind_of(a)
    if kind_of(b) != kind:
        raise RequestError(
            f"{args.a} is a run of {COMMANDS[kind]} and {args.b} one of {COMMANDS[kind_of(b)]}; "
            "only two runs of the same command can be compared"
        )
    if args.json is not None:
        require_writable(args.json)
    compared = compare(kind, rows_a, rows_b)
    summary = summarise(kind, compared)
    _render((a, b), paths, compared, summary, args.plain)
    if args.json is not None:
        header = {"tool": "senet-fused bench compare", "kind": "compare", "of": kind, "a": a, "b": b,
                  "files": [str(path) for path in paths], "differs": differences(a, b)}  # fmt: skip
        write_json(args.json, header, compared, summary)
        print(f"\nwrote {args.json}")
    if args.fail_slower is None:
        return 0
    slower = [row for row in compared if row["ratio"] is not None and row["ratio"] - row["spread"] > args.fail_slower]
    print(f"\n{len(slower)} of {len(compared)} rows are slower than {args.fail_slower:g} times, beyond their spread")
    return 1 if slower else 0
