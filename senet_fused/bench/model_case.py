"""One case of a whole network: input and loss, the check of variants against stock, the timed call, its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import senet_fused

from ..accuracy import relative_error
from .cuda_timing import capture
from .model_memory import Saved, peak_bytes
from .variants import ModelCase, Network, Variant

__all__ = ["Cell", "Results"]

_LEARNING_RATE = 1e-5  # weights stay where they were, and with them the time
_FLOAT32_LIMIT = 1e-3
_MAGNIFIED = 10  # times the effect of the input's last bit; a variant rounds at every layer


class Results(NamedTuple):
    """What a variant is judged by: its floating outputs; in training every parameter's gradient, and of every
    normalisation the running mean and standard deviation in one tensor: the larger error of the two counts."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]
    statistics: list[Tensor]


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating tensors in whatever a network returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    if dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    for value in values:
        yield from _tensors(value)


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
        if mean is not None and var is not None:
            yield torch.cat((mean.double(), var.double().sqrt()))


def _all_finite(tensors: Sequence[Tensor | None]) -> bool:
    return all(tensor is None or bool(tensor.isfinite().all()) for tensor in tensors)


def _largest_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max((relative_error(ours, stock.double()) for ours, stock in pairs), default=0.0)


def _loss(output: Any, seed: int) -> Callable[[Any], Tensor]:
    """The loss for outputs like this one."""
    if isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point():
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(output.shape[1], output.shape[:1], generator=generator).to(output.device)
        return lambda logits: F.cross_entropy(logits.float(), labels)
    return lambda output: sum(tensor.float().square().mean() for tensor in _tensors(output))


class Cell:
    """One case at work: its input and loss, and what is done with a variant."""

    def __init__(self, case: ModelCase, device: str, seed: int) -> None:
        self.case, self.device, self.seed = case, device, seed
        self.dtype = getattr(torch, case.dtype)
        generator = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(case.batch, *case.size, generator=generator)
        x = x.to(device, torch.float32 if case.amp else self.dtype)
        self.x = x.contiguous(memory_format=case.memory_format)
        self.loss: Callable[[Any], Tensor] | None = None

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        autocast = torch.autocast(self.device, self.dtype) if self.case.amp else contextlib.nullcontext()
        with contextlib.nullcontext() if self.case.training else torch.inference_mode(), autocast:
            yield

    # ------------------------------------------------------------------------------------------------- the check

    def results(self, variant: Variant) -> Results:
        """One forward, in training with a backward, from the same random state for every variant."""
        before = Counter(senet_fused.call_counts())
        torch.manual_seed(self.seed + 2)
        outputs = self._replayed(variant) if variant.graphed else self._forward_and_backward(variant)
        gradients, statistics = [], []
        if self.case.training:
            gradients = [parameter.grad for parameter in variant.model.parameters()]
            variant.model.zero_grad(set_to_none=True)
            statistics = list(_statistics(variant.model))
        variant.require_a_graph()
        ran = {key.rpartition(".")[0] for key, n in (Counter(senet_fused.call_counts()) - before).items() if n}
        variant.backend = "+".join(sorted(ran)) or ("inductor" if variant.compiled else "aten")
        return Results(outputs, gradients, statistics)

    def _forward_and_backward(self, variant: Variant) -> list[Tensor]:
        """The outputs; in training every parameter has its gradient afterwards."""
        with self._modes():
            output = variant.call(self.x)
            if self.case.training:
                self.loss = self.loss or _loss(output, self.seed + 3)
                loss = self.loss(output)
        if self.case.training:
            loss.backward()
        return [tensor.detach() for tensor in _tensors(output)]

    def _replayed(self, variant: Variant) -> list[Tensor]:
        """The same by one replay of a CUDA graph, from the buffers that the network has now."""

        def call() -> list[Tensor]:
            variant.model.zero_grad(set_to_none=True)
            return self._forward_and_backward(variant)

        buffers = [(buffer, buffer.clone()) for buffer in variant.model.buffers()]
        captured = capture(call)
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.manual_seed(self.seed + 2)
        captured.replay()
        # The next capture takes the graph's memory.
        for parameter in variant.model.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        return [tensor.clone() for tensor in captured.result]

    def _outputs(self, variant: Variant, x: Tensor, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        with torch.no_grad(), self._modes():
            return list(_tensors(variant.call(x)))

    def is_stochastic(self, stock: Variant, found: Results) -> bool:
        """Whether another random state gives stock another output, as dropout does."""
        if not self.case.training:
            return False
        again = self._outputs(stock, self.x, self.seed + 4)
        return any(not torch.equal(a, b) for a, b in zip(found.outputs, again, strict=True))

    def in_float32(self, network: Network, name: str) -> Results:
        """What the same network gives in float32, for the same input."""
        cell = Cell(dataclasses.replace(self.case, dtype="float32", amp=False), self.device, self.seed)
        cell.x = self.x.float()
        variant = Variant(name)
        network.build(variant, cell.case)
        return cell.results(variant)

    def moved_by_rounding(self, stock: Variant, found: Results) -> float:
        """How far stock's output moves when every input moves by about one unit in the last place."""
        generator = torch.Generator().manual_seed(self.seed + 5)
        noise = torch.randn(self.x.shape, generator=generator).to(self.x)
        moved = self._outputs(stock, self.x + self.x * noise * torch.finfo(self.dtype).eps, self.seed + 2)
        return _largest_error(moved, found.outputs)

    def compare(self, variant: Variant, found: Results, wanted: Results) -> None:
        """Notes the variant's errors. Raises ValueError for outputs of other shapes."""
        shapes = [[list(t.shape) for t in result.outputs] for result in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"wrong output: shapes {shapes[0]}, expected {shapes[1]}")
        if not _all_finite(wanted.outputs):
            variant.remark("not compared: the reference's output has infinities or NaN")
            return
        variant.output_error = _largest_error(found.outputs, wanted.outputs)
        if self.case.training:
            variant.statistics_error = _largest_error(found.statistics, wanted.statistics)
        if not math.isfinite(variant.output_error):
            variant.remark("its output has infinities or NaN")
        elif not _all_finite(found.gradients):
            variant.remark("its gradients have infinities or NaN")
        elif not _all_finite(wanted.gradients):
            variant.remark("the reference's gradients have infinities or NaN")
        elif self.case.training:
            variant.gradient_error = self._gradient_error(found.gradients, wanted.gradients)

    def _gradient_error(self, found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
        """The largest of |ours - stock| / |stock| over parameters.

        Of a gradient that is zero but for rounding, as that of a bias in front of a normalisation, only rounding would
        be seen: |stock| counts as at least sqrt(eps) times the largest of all parameters.
        """
        pairs = [(ours, stock) for ours, stock in zip(found, wanted, strict=True) if stock is not None]
        norms = [stock.double().norm().item() for _, stock in pairs]
        least = torch.finfo(self.dtype).eps ** 0.5 * max(norms, default=0.0)
        worst = 0.0
        for (ours, stock), norm in zip(pairs, norms, strict=True):
            off = norm if ours is None else (ours.double() - stock.double()).norm().item()
            worst = max(worst, off / max(norm, least) if off else 0.0)
        return worst

    def judge(self, variant: Variant, stock: Variant, wanted: Results) -> None:
        """Raises ValueError if the output or running statistics are wrong, which float32 can tell; else notes why not.

        A network may magnify rounding beyond any limit, as normalisations over two values do.
        """
        errors = {"output": variant.output_error, "running statistics": variant.statistics_error}
        what, error = max(errors.items(), key=lambda item: item[1] or 0.0)
        if self.case.dtype != "float32" or error is None or error <= _FLOAT32_LIMIT:
            return
        moved = self.moved_by_rounding(stock, wanted)
        if not error <= _MAGNIFIED * moved:
            raise ValueError(f"wrong {what}: off by {error:.1e}, allowed {_FLOAT32_LIMIT:.0e}")
        variant.remark(f"the network magnifies rounding: the last bit of its input moves stock's output by {moved:.0e}")

    # -------------------------------------------------------------------------------------------------- the time

    def timed(self, variant: Variant) -> Callable[..., object]:
        """The call that is timed. Its first argument, a buffer's number, is ignored: there is one input.

        In training it takes a context for its forward as well, but for a CUDA graph: that is captured here.
        """
        call = self._step(variant) if self.case.training else self._inference(variant)
        if not variant.graphed:
            return call
        captured = capture(lambda: call(0))
        variant.peak_bytes = captured.peak_bytes if self.case.training else None
        return lambda number: captured.replay()

    def _inference(self, variant: Variant) -> Callable[[int], object]:
        def forward(number: int) -> object:
            with self._modes():
                return variant.call(self.x)

        return forward

    def _step(self, variant: Variant) -> Callable[..., None]:
        optimizer = torch.optim.SGD(variant.model.parameters(), lr=_LEARNING_RATE, momentum=0.9)
        plain = contextlib.nullcontext()

        def step(number: int, around: contextlib.AbstractContextManager = plain) -> None:
            with self._modes(), around:
                loss = self.loss(variant.call(self.x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def measure_memory(self, variant: Variant, step: Callable[..., object]) -> None:
        """Notes the memory of one more step, the timed call in training. The optimizer has its own already.

        The peak of a CUDA graph is known from its capture. The allocator does not see what the graphs of
        torch.compile's max-autotune use in a replay.
        """
        if variant.graphed:
            return
        if variant.name == "max-autotune" and self.device == "cuda":
            variant.remark("its memory is that of torch.compile's CUDA graphs, which is not told")
            return
        saved = Saved((self.x, *variant.model.parameters(), *variant.model.buffers()))
        variant.peak_bytes = peak_bytes(lambda: step(0, saved), self.device)
        variant.saved_bytes = saved.bytes
