"""Runs without output, made-up rows and saved runs, for the tests of senet_fused.bench."""

from __future__ import annotations

from senet_fused.bench import report, saved, timing

FAST = timing.Settings(budget_s=0.0, min_rounds=2, max_rounds=2, sample_s=1e-5, max_inner=3)
HEADER = {
    "device": {"type": "cuda", "name": "a GPU"},
    "threads": 2,
    "versions": {"torch": "2", "senet_fused": "0"},
    "date": "2020-01-01T00:00",
    "command": "senet-fused bench",
    "revision": "abc",
}


class Quiet:
    """A progress display that shows nothing."""

    def case(self, case): ...
    def stage(self, text): ...
    def tick(self): ...
    def done(self): ...


def by_provider(rows):
    return {row["provider"]: row for row in rows}


def layer_row(provider="fused", speedup=2.0, **changes):
    row = dict(
        problem="senet154",
        shape="8,256,16,56,56",
        count=3,
        dtype="float32",
        layout="contiguous",
        direction="forward",
        cache="cold",
        provider=provider,
        backend="cpu",
        form=None,
        median_s=1e-3 / speedup,
        iqr_s=1e-5,
        samples=9,
        calls_per_sample=1,
        speedup_vs_eager=speedup,
        copies=3 / speedup,
        passes=2,
        gbps=10.0,
        fraction_of_copy=0.5,
        max_error=1e-7,
        error=None,
    )
    return row | changes


def failed_row(provider="compile", **changes):
    times = ("median_s", "iqr_s", "speedup_vs_eager", "copies", "gbps", "fraction_of_copy", "backend")
    error = "wrong output: y is off by 1.0e+00"
    return layer_row(provider, **dict.fromkeys(times), error=error) | changes


def model_row(provider="fused", **changes):
    row = dict.fromkeys(saved.KINDS["model"].figures) | {
        "model": "net", "batch": 8, "size": "3,8,8", "dtype": "float16", "amp": True, "layout": "channels_last",
        "mode": "training", "provider": provider, "backend": "cpu", "median_s": 1e-3, "iqr_s": 1e-5,
    }  # fmt: skip
    return row | changes


def save(path, rows, **changes):
    summary = report.summarise(rows) if "kind" not in changes else []
    saved.write_json(path, HEADER | changes, rows, summary)
    return path
