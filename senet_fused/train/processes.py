"""The processes of a run: torchrun's, or one alone; what they agree on; and the signals that end a run."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..arguments import RequestError

__all__ = ["AgreedError", "Processes", "StopSignals", "distribute", "join", "leave_signals_to_the_run"]

T = TypeVar("T")

# How long a process waits for the others. Where one has died, gloo's connections close and nobody waits that long;
# NCCL's may stay, and torchrun then ends the others.
_TIMEOUT = datetime.timedelta(minutes=10)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class AgreedError(RequestError):
    """What was asked for cannot be done, and every process knows: the first one tells."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: its rank from 0, how many there are, and the device that is its own."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that prints, logs and saves."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns, unless it fails in a process; it must not wait for other processes.

        Raises:
            AgreedError: ``work`` raised RequestError in at least one of them. All raise it, so nobody is waited for.
        """
        try:
            result, problem = work(), None
        except RequestError as error:
            result, problem = None, str(error)
        problems = self.of_all(problem)
        if any(problems):
            rank = next(rank for rank, problem in enumerate(problems) if problem)
            raise AgreedError(problems[rank] if rank == 0 else f"process {rank}: {problems[rank]}")
        return result

    def of_all(self, value: T) -> list[T]:
        """The value of each process, by rank, in every process. It can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Element by element over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """Gives all processes the first one's buffers."""
        if self.size > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)


@contextlib.contextmanager
def join(device: str) -> Iterator[Processes]:
    """The processes that torchrun's environment variables tell of; without them, this one alone.

    A process group that is there already is used and left as it is.

    Raises:
        RequestError: torch has no torch.distributed, or the machine has fewer GPUs than processes.
    """
    distributed = torch.distributed
    if not distributed.is_available():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RequestError(f"this PyTorch ({torch.__version__}) is built without torch.distributed")
        yield Processes(0, 1, torch.device(device))
        return
    ours = not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    here = _device_of_this_process(device)
    if ours:
        # CPU tensors go by gloo also where GPUs do the work: what the processes agree on need not wait for a GPU.
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=_TIMEOUT)
    if distributed.is_initialized():
        left = True
        try:
            yield Processes(distributed.get_rank(), distributed.get_world_size(), here)
        except BaseException as error:
            # Others may be dead, or wait for this one in another place; of an agreed error all know.
            left = isinstance(error, (AgreedError, SystemExit))
            raise
        finally:
            if ours and left:
                # Nobody leaves before the first one's files are there. And gloo's threads are done by then with what
                # was sent before: one that frees a Python object after Python's end would abort the process.
                distributed.barrier()
                distributed.destroy_process_group()
    else:
        yield Processes(0, 1, here)


def _device_of_this_process(device: str) -> torch.device:
    if device != "cuda":
        return torch.device(device)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise RequestError(
            f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
            "start no more processes than GPUs (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def distribute(network: nn.Module, processes: Processes, *, sync_batchnorm: bool) -> nn.Module:
    """What is called in the network's place to train it: with several processes DistributedDataParallel.

    Running statistics that the forward pass only writes are not sent at every step, as it would by default: they are
    the first process's, and :meth:`Processes.share_buffers` gives them to the others where they are needed.
    """
    if processes.size == 1:
        return network
    on_gpu = processes.device.type == "cuda"
    if sync_batchnorm and on_gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    only_written = sum(len(module._buffers) for module in network.modules() if isinstance(module, _BATCH_NORMS))
    # torch 2.13 renamed it.
    known = inspect.signature(DistributedDataParallel).parameters
    sending = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    parallel = DistributedDataParallel(
        network,
        device_ids=[processes.device] if on_gpu else None,
        gradient_as_bucket_view=True,
        **{sending: only_written != len(list(network.buffers()))},
    )
    if sync_batchnorm and not on_gpu:
        # DistributedDataParallel refuses them on CPUs, where torch's own forward does not run, but block tails' does.
        # Weights and buffers stay the same tensors.
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return parallel


def leave_signals_to_the_run(worker: int) -> None:
    """For worker processes that load images: the signals that StopSignals catches go by.

    Terminals, torchrun and schedulers send them to all processes, and the step at hand still wants its images. Workers
    end when the run does, or when its process has died.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Within the block, SIGINT and SIGTERM ask the run to stop at the next step, instead of killing it.

    A second Ctrl-C ends it at once, unless torchrun started it, which passes on the one that the terminal has sent
    already. Elsewhere than in the main thread, where no handlers can be set, nothing is caught.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._received = 0
        self._before: dict[int, Any] = {}
        self._question: torch.distributed.Work | None = None
        self._number = torch.zeros((), dtype=torch.int64)

    def __enter__(self) -> StopSignals:
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None and self._question is not None:
            self._question.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._received and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self._received = self._received or number

    @property
    def received(self) -> int:
        """The number of the signal that this process has got, 0 for none."""
        return self._received

    def agreed(self) -> int:
        """The signal that the processes stop for, in all of them at the same call; 0 for none.

        Every process calls it after every step. Among several, the answer is to the question of the call before, so
        that nobody waits for it.
        """
        if self._processes.size == 1:
            return self._received
        answer = 0
        if self._question is not None:
            self._question.wait()
            answer = int(self._number)
        self._number.fill_(self._received)
        self._question = torch.distributed.all_reduce(self._number, torch.distributed.ReduceOp.MAX, async_op=True)
        return answer
