"""``senet-fused bench compare a.json b.json``: two saved runs, row by row."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..arguments import RequestError, positive
from .model_report import dtype_label, input_label
from .report import shape_label, task_label
from .saved import KINDS, Row, geometric_mean, grouped, kind_of, read_json
from .tables import Table, ratio_label, show, time_label

__all__ = ["add_arguments", "compare", "differences", "run", "summarise", "verdict"]

_COMPARED = ("device", "versions", "threads", "revision", "command")
_VERDICTS = ("faster", "same", "slower")

_EPILOG = """\
Both files are of `senet-fused bench --json`, or both of `senet-fused bench model --json`. Rows are compared that are
equal in {layers}; of whole networks in {model}.

ratio    b's median / a's: 0.8 says that b takes 0.8 of a's time.
spread   of the ratio: ratio x sqrt((IQR of a / median of a)^2 + (IQR of b / median of b)^2).
verdict  on b: same if 1 is within ratio +- spread, else faster (ratio below 1) or slower.

The spread is that of samples within each run; between runs a machine may drift by more. The rows of copy, or of stock
in whole networks, show by how much: their code has not changed. The commands are shown where they differ.

examples:
  senet-fused bench compare before.json after.json
  senet-fused bench compare before.json after.json --fail-slower 1.05

exit status: 0 compared, 1 with --fail-slower: some row is slower than that, 2 the files cannot be read or are of
different kinds
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the subcommand. Imports no torch."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG.format(**{name: ", ".join(kind.identity) for name, kind in KINDS.items()})
    parser.add_argument("a", type=Path, metavar="A.json", help="the run that is compared with")
    parser.add_argument("b", type=Path, metavar="B.json", help="the run that the verdicts are on")
    ratio = "exit with 1 if a row's ratio is above this by more than its spread"
    parser.add_argument("--fail-slower", type=positive(float), metavar="RATIO", help=ratio)
    parser.add_argument("--plain", action="store_true", help="no colours")


def verdict(a: Row, b: Row) -> tuple[float, float, str]:
    """Ratio of the medians, its spread, and faster, same or slower, for two rows that have a time."""
    ratio = b["median_s"] / a["median_s"]
    spread = ratio * math.hypot(*(row["iqr_s"] / row["median_s"] for row in (a, b)))
    return ratio, spread, "slower" if ratio - spread > 1 else "faster" if ratio + spread < 1 else "same"


def _by_identity(kind: str, rows: Sequence[Row]) -> dict[tuple, Row]:
    """Rows by what identifies them, and by their turn where several are the same measurement."""
    groups = grouped(rows, lambda row: tuple((name, row[name]) for name in KINDS[kind].identity if name in row))
    return {(*key, turn): row for key, members in groups.items() for turn, row in enumerate(members)}


def compare(kind: str, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> list[Row]:
    """One row per measurement of either run, a's first.

    "in" says which runs have it: "both", "a" or "b". ratio, spread and verdict are None unless both have a time.
    """
    a, b = _by_identity(kind, rows_a), _by_identity(kind, rows_b)
    compared = []
    for key in dict.fromkeys([*a, *b]):
        pair = {"a": a.get(key), "b": b.get(key)}
        row: Row = dict(key[:-1])
        row["in"] = "both" if pair["a"] and pair["b"] else "a" if pair["a"] else "b"
        for name, found in pair.items():
            for value in ("median_s", "error"):
                row[f"{name}_{value}"] = found and found[value]
        timed = all(found and found["median_s"] is not None for found in pair.values())
        ratio, spread, says = verdict(pair["a"], pair["b"]) if timed else (None, None, None)
        compared.append(row | {"ratio": ratio, "spread": spread, "verdict": says})
    return compared


def summarise(kind: str, compared: Sequence[Row]) -> list[Row]:
    """One entry per op, direction (or mode) and provider: the ratios' geometric mean, and how many of each verdict."""
    names = ("op", "direction" if kind == "layers" else "mode", "provider")
    groups = grouped(compared, lambda row: tuple((name, row[name]) for name in names if name in row))
    return [
        dict(key)
        | {"ratio": geometric_mean(row["ratio"] for row in members), "rows": len(members)}
        | dict.fromkeys(_VERDICTS, 0)
        | Counter(row["verdict"] for row in members if row["verdict"])
        for key, members in groups.items()
    ]


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


def _tables(kind: str, compared: Sequence[Row]) -> list[Table]:
    both = grouped([row for row in compared if row["in"] == "both"], lambda row: _title(kind, row))
    tables = [Table(title, [_cells(kind, row) for row in members]) for title, members in both.items()]
    means = [
        {
            "direction": task_label(entry) if kind == "layers" else entry["mode"],
            "provider": entry["provider"],
            "b / a": ratio_label(entry["ratio"]),
            **{name: str(entry[name]) for name in _VERDICTS},
            "rows": f"{sum(entry[name] for name in _VERDICTS)}/{entry['rows']}",
        }
        for entry in summarise(kind, compared)
    ]
    return [*tables, Table("Geometric means of b / a", means)] if means else tables


def run(args: argparse.Namespace, command: Sequence[str] = ()) -> int:
    """Compares two saved runs and prints the report.

    Returns:
        0; 1 with --fail-slower if a row is slower than that beyond its spread.

    Raises:
        RequestError: a file cannot be read or is no saved run, or the two are of different kinds.
    """
    paths = (args.a, args.b)
    headers, rows = zip(*(read_json([path]) for path in paths), strict=True)
    kind, other = map(kind_of, headers)
    if kind != other:
        raise RequestError(
            f"{args.a} is a run of {KINDS[kind].command} and {args.b} one of {KINDS[other].command}; "
            "only two runs of the same command can be compared"
        )
    compared = compare(kind, *rows)
    for name, path, header in zip("ab", paths, headers, strict=True):
        print(f"{name + ':':12} {path}, {header['date']}, revision {header.get('revision') or 'unknown'}")
        for trouble in filter(None, (header.get("warning"), header.get("interrupted"))):
            print(f"{'':12} {trouble}")
    print(f"{'differs:':12} {'; '.join(differences(*headers)) or 'nothing in ' + ', '.join(_COMPARED)}")
    show(_tables(kind, compared), sys.stdout, args.plain)
    for name, path in zip("ab", paths, strict=True):
        alone = [row for row in compared if row["in"] == name]
        if alone:
            print(f"\nonly in {path}:")
        for row in alone:
            print("  " + ", ".join(f"{key} {row[key]}" for key in KINDS[kind].identity if key in row))
    if args.fail_slower is None:
        return 0
    slower = [row for row in compared if row["ratio"] is not None and row["ratio"] - row["spread"] > args.fail_slower]
    print(f"\n{len(slower)} of {len(compared)} rows are slower than {args.fail_slower:g} times, beyond their spread")
    return 1 if slower else 0
