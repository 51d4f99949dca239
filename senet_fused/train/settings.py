"""The settings of a run that change its result. A checkpoint holds them, and a resumed run must have the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .checkpoint import CheckpointError

__all__ = ["Settings", "check_same"]


@dataclass(frozen=True)
class Settings:
    """Resolved: no default is left open. ``senet-fused train --help`` explains the options of these names."""

    model: str
    data: str
    size: int | None
    epochs: int
    batch_size: int
    accumulate: int
    processes: int
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    schedule: str
    step_epochs: int
    warmup: float
    label_smoothing: float
    amp: str
    channels_last: bool
    drop_path: float
    dropout: float | None
    ema: float
    fuse: str
    no_se: bool
    reduction: int | None
    sync_batchnorm: bool
    broken_images: str
    augment: bool
    seed: int
    device: str

    @property
    def effective_batch(self) -> int:
        """Images of one optimizer step, over all processes and micro-batches."""
        return self.batch_size * self.accumulate * self.processes


_SPELLINGS = {"processes": "the number of processes"}


def check_same(saved: Mapping[str, Any], settings: Settings) -> None:
    """Raises CheckpointError if a run with other settings wrote the checkpoint; names both values of each."""
    here = asdict(settings)
    different = [
        f"{_SPELLINGS.get(name, '--' + name.replace('_', '-'))} was {saved.get(name)} and is {value}"
        for name, value in here.items()
        if saved.get(name) != value
    ]
    if different:
        raise CheckpointError(
            f"a resumed run needs the settings that its checkpoint was made with: {'; '.join(different)}. Give the "
            "former, or begin a new run in another --output"
        )
