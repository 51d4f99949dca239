"""block_tail: check the call, choose the backend, run its operator, keep the running statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import torch_private
from ..activations import Activation
from ..call import Call
from .checks import check_functions, check_tail, checked
from .layer import Function
from .serve import serve, tail_route

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["block_tail"]


def block_tail(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    w1: Tensor | None = None,
    w2: Tensor | None = None,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pre_act: Function | None = None,
    act: Function = "relu",
    gate: Function = "sigmoid",
    residual: Tensor | None = None,
    post_act: str | None = None,
    factor: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """BatchNorm -> [activation] -> Squeeze-and-Excitation -> + residual -> ReLU, fused: the tail of a block.

    The outputs of BatchNorm and of the activation are never stored: two sweeps over x forward (three with an activation
    and a gate) and two backward, where PyTorch's own operators make 11 and 18 passes over memory (equations in
    ``senet_fused.reference``; Ioffe & Szegedy 2015; Hu et al. 2018).

    Equivalent to::

        z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        z = pre_act(z)                                          # with pre_act, e.g. F.silu
        z = z * sigmoid(linear(relu(linear(z.mean(spatial_dims), w1, b1)), w2, b2))[:, :, None, None]  # with w1 and w2
        y = relu(z * factor[:, None, None, None] + residual)    # with factor, residual and post_act="relu" as given

    Args:
        x: [N, C, *spatial] with one to three spatial dimensions; float64, float32, bfloat16 or float16. Contiguous and
            channels_last memory (and slices of a batch in either) is read in place; other strides are copied once.
        running_mean, running_var: [C], or None. In training they are updated in place, as F.batch_norm does.
        weight, bias: BatchNorm's [C], or None for ones and zeros.
        w1, w2, b1, b2, act, gate: the SE layer's, as in :func:`senet_fused.squeeze_excite`, which squeezes by the mean.
            Without w1 and w2 there is no gate.
        training: normalise by the statistics of x; otherwise by the running ones.
        momentum, eps: as F.batch_norm's.
        pre_act: the activation behind BatchNorm, one of those that ``act`` may be, or None. Kernels for it are there on
            CPUs; elsewhere "auto" takes plain PyTorch.
        residual: a tensor of x's shape that is added, or None.
        post_act: "relu" or None, applied last.
        factor: [N], multiplies each sample's branch before the residual is added (stochastic depth), or None. It
            gets no gradient.
        group: processes whose samples share the statistics in training (synchronised BatchNorm), None for this one
            alone. All of them have to make the same calls.
        backend: as in :func:`senet_fused.squeeze_excite`.

    Returns:
        y with x's shape and memory layout, and dtype ``torch.result_type(x, residual)``. Sums, statistics and the
        excitation are float32, float64 for float64 x.

    Raises:
        ValueError: a shape, name or memory layout that does not fit, running statistics that are missing, or a single
            value per channel in training; the message says what was expected.
        TypeError: an argument that is not a tensor, or not floating point.
        BackendUnavailableError: the named backend cannot serve this call.
    """
    act, gate = Activation.of(act), Activation.of(gate)
    pre_act = None if pre_act is None else Activation.of(pre_act)
    tensors = (x, running_mean, running_var, weight, bias, w1, w2, b1, b2, residual, factor)
    if has_torch_function(tensors):
        return handle_torch_function(
            block_tail, tensors, x, running_mean, running_var, weight, bias, w1=w1, w2=w2, b1=b1, b2=b2,
            training=training, momentum=momentum, eps=eps, pre_act=pre_act and pre_act.spec, act=act.spec,
            gate=gate.spec, residual=residual, post_act=post_act, factor=factor, group=group, backend=backend,
        )  # fmt: skip
    check_functions(act, gate, pre_act)
    mean, var = (None, None) if training else (running_mean, running_var)
    call = Call(
        x, weight, bias, mean, var, w1, b1, w2, b2, residual, factor, eps, "batch" if training else "given",
        act.spec, gate.spec, "avg", post_act or "", "" if group is None else group.group_name,
        "" if pre_act is None or pre_act.name == "identity" else pre_act.spec,
    )  # fmt: skip
    checked(check_tail, call, running_mean, running_var)
    y, statistics, *_ = serve(call, tail_route(x, backend, call.pre_act))
    if training and running_mean is not None and running_var is not None and statistics is not None:
        at_once = x.is_cuda and not torch.compiler.is_compiling()
        _track(running_mean, running_var, statistics, momentum, at_once)
    return y


@torch.no_grad()
def _track(running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float, at_once: bool) -> None:
    """Moves the running statistics towards those of the batch, in place. at_once: in one launch, if it can be."""
    running, now = [running_mean, running_var], [statistics[0], statistics[2]]
    if at_once and running_mean.dtype == running_var.dtype == statistics.dtype:
        torch_private.lerp_all(running, now, momentum)
        return
    for r, s in zip(running, now, strict=True):
        if r.dtype == s.dtype:
            r.lerp_(s, momentum)
        else:
            r.copy_(torch.lerp(r.to(s.dtype), s, momentum))
