"""The processes of a run (torchrun's, or one alone), their collective operations, and the signals that stop a run."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..arguments import RequestError

__all__ = ["CollectiveError", "Processes", "StopSignals", "data_parallel", "ignore_signals", "join"]

T = TypeVar("T")

# How long a collective operation waits for the other processes. If one dies, gloo's connections close and the others
# fail at once; with NCCL torchrun ends them.
_TIMEOUT = datetime.timedelta(minutes=10)


class CollectiveError(RequestError):
    """A RequestError that every process raises at the same place, so that none waits for another. Rank 0 reports it."""


@dataclass(frozen=True)
class Processes:
    """The rank of this process from 0, the number of processes, and the device of this process."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints, logs and saves."""
        return self.rank == 0

    def collective(self, work: Callable[[], T]) -> T:
        """Returns ``work()``, called in every process; ``work`` itself must not communicate.

        Raises:
            CollectiveError: in every process, if ``work`` raised RequestError or OSError in any of them.
        """
        result, problem = None, None
        try:
            result = work()
        except RequestError as error:
            problem = str(error)
        except BrokenPipeError:  # of the terminal
            raise
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            problem = (
                f"cannot read or write{where}: {error.strerror or error}. Make room, or change its permissions; "
                "--resume then continues from the last checkpoint"
            )
        for rank, text in enumerate(self.gather(problem)):
            if text is not None:
                raise CollectiveError(text if rank == 0 else f"process {rank}: {text}")
        return result

    def gather(self, value: T) -> list[T]:
        """The value of each process, by rank, in every process. It must be picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Overwrites the buffers of every process with those of rank 0."""
        if self.size > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)


@contextlib.contextmanager
def join(device: str) -> Iterator[Processes]:
    """The processes that torchrun's environment variables describe; without them this process alone.

    An existing process group is used and left as it is.

    Raises:
        RequestError: this machine has fewer GPUs than processes.
    """
    distributed, several = torch.distributed, int(os.environ.get("WORLD_SIZE", "1")) > 1
    here = _device_of_this_process(device)
    if not distributed.is_available() or not (several or distributed.is_initialized()):
        if several:
            raise RequestError(f"this PyTorch ({torch.__version__}) is built without torch.distributed")
        yield Processes(0, 1, here)
        return
    ours = not distributed.is_initialized()
    if ours:
        # CPU tensors go through gloo also on GPUs: collective decisions need not wait for the GPU.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
    synchronised = True
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), here)
    except BaseException as error:
        # Other processes may be dead or wait elsewhere, unless all of them raised this error.
        synchronised = isinstance(error, (CollectiveError, SystemExit))
        raise
    finally:
        if ours and synchronised:
            # No process leaves before rank 0 has written its files. It also lets gloo's threads finish their sends:
            # one that frees a Python object after Python's end would abort the process.
            distributed.barrier()
            distributed.destroy_process_group()


def _device_of_this_process(device: str) -> torch.device:
    if device != "cuda":
        return torch.device(device)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise RequestError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "start at most one process per GPU (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def data_parallel(network: nn.Module, processes: Processes, *, sync_batchnorm: bool) -> nn.Module:
    """The module to call in training: DistributedDataParallel for several processes, else the network itself."""
    if processes.size == 1:
        return network
    on_gpu = processes.device.type == "cuda"
    if sync_batchnorm and on_gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    devices = [processes.device] if on_gpu else None
    parallel = DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)
    if sync_batchnorm and not on_gpu:
        # DistributedDataParallel rejects SyncBatchNorm on CPUs, whose own forward needs a GPU; that of block tails
        # does not. The conversion keeps the parameter and buffer tensors.
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return parallel


def ignore_signals(worker: int) -> None:
    """``worker_init_fn`` of data loaders: worker processes ignore the signals that :class:`StopSignals` handles.

    Terminals, torchrun and schedulers send them to all processes, and the current step still needs its images. Workers
    end with the training process, also if that is killed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Within the block SIGINT and SIGTERM ask the run to stop after the current step instead of killing it.

    A second Ctrl-C ends it at once, unless torchrun started it, which forwards the first one to processes that the
    terminal has interrupted already. Outside of the main thread, where handlers cannot be set, nothing is caught.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._before: dict[int, Any] = {}
        #: The number of the signal that this process has received, 0 for none.
        self.received = 0

    def __enter__(self) -> StopSignals:
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.received = self.received or number

    def agreed(self) -> int:
        """The signal that any process has received, the same in all; 0 for none. A collective operation."""
        if self._processes.size == 1:
            return self.received
        number = torch.tensor(self.received)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)
