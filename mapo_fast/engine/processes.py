"""Several processes, one GPU each: how they find each other, agree, and share a step's gradients.

`torchrun` and `accelerate launch` say by environment variables who is who; torch.distributed does the rest:
NCCL between GPUs, gloo between CPUs and for whatever the hosts tell each other.

Gradients are summed once a step, after the last micro-batch's backward, in buckets. DistributedDataParallel
would sum them during that backward instead. It is not used, because

- it keeps a second set of gradient memory, or holds all gradients throughout forward too (`gradient_as_
  bucket_view`): up to 5.1 GB of bf16 that a plan has no room for, while here it is two buckets;
- it has to see one forward and one backward in its wrapper, which `sequential` has not;
- the sum is a function of .grad and nothing else, so every layout, checkpointing, offload, adapter and
  optimizer works as in one process.

The price is the overlap: 2 (W − 1) / W times the gradients' bytes through the slowest link, once a step
whatever the accumulation; of a LoRA next to nothing. `train.shard` (FSDP2) overlaps.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import FailedRunError, MachineError, UserError, shown
from mapo_fast.util.files import one_line
from mapo_fast.util.signals import StopNow, StopRequest

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20
"""Gradient bytes per all-reduce."""

_PATIENCE = timedelta(hours=2)
"""How long the others wait while process 0 plans, saves or samples previews."""


class ReportedError(UserError):
    """A `UserError` that process 0 reports: the others end too and need not say why."""

    reported = True


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """This process among those of its machine: the number of its GPU."""
    local_size: int = 1
    """Processes on this machine: they share its memory."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and console output."""
        return self.rank == 0

    def shard(self, config: Config) -> bool:
        """Whether the processes split one model among them."""
        return config.train.shard and self.size > 1

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor)

    def smallest(self, value: float) -> float:
        """The smallest of the processes' values."""
        return -self.largest(-value)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.largest(float(flag)) > 0

    def poll(self, stop: StopRequest) -> None:
        """Raise `StopNow` if any process got a signal; all processes call this together."""
        if self.any(stop.requested):
            raise StopNow

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, value: T) -> list[T]:
        """Every process's value (picklable), by rank."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def each(self, call: Callable[[], T]) -> T:
        """What `call` returns in each process, once it has returned in all.

        Raises:
            Exception: what `call` raised, in a process where it did.
            UserError: what it raised elsewhere; a `ReportedError` in all but process 0.
        """
        if self.size == 1:
            return call()
        failed: Exception | None = None
        try:
            value = call()
        except Exception as error:
            failed = error
        if not self.any(failed is not None):
            return value
        said = self.gathered(None if failed is None else _as_line(failed))
        message, machine = next(one for one in said if one is not None)
        if not self.main:
            raise ReportedError(message) from failed
        raise failed or (MachineError if machine else UserError)(message)

    def once(self, call: Callable[[], T]) -> T:
        """What `call` returns (picklable) in process 0, the only one that calls it, for all.

        Raises:
            Exception: what `call` raised, in process 0; a `ReportedError` in the others.
        """
        if self.size == 1:
            return call()
        outcome: list[Any] = [None, None]
        failed: Exception | None = None
        if self.main:
            try:
                outcome[0] = call()
            except Exception as error:
                failed, outcome[1] = error, str(error)
        dist.broadcast_object_list(outcome)
        if failed is not None:
            raise failed
        if outcome[1] is not None:
            raise ReportedError(outcome[1])
        return outcome[0]  # type: ignore[no-any-return]

    def failed(self, message: str) -> UserError:
        """The error of a run that came to nothing: every process raises it, one reports it."""
        return FailedRunError(message) if self.main else ReportedError(message)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up .grad over the processes, which all have the same ones, in place.

        A value that is not finite (inf, NaN) in one process reaches all of them.
        """
        if self.size == 1:
            return
        under_way: tuple[Any, Tensor, list[Tensor]] | None = None
        for gradients in _buckets(p.grad for p in parameters if p.grad is not None):
            flat = torch.cat([g.flatten() for g in gradients])
            work = dist.all_reduce(flat, async_op=True)
            if under_way is not None:
                _put_back(*under_way)
            under_way = work, flat, gradients
        if under_way is not None:
            _put_back(*under_way)


ALONE = Processes()


def in_processes(config: Config, processes: Processes) -> Config:
    """The config as several processes train it: the step is not fused into backward.

    Raises:
        UserError: a setting that works in one process only.
    """
    if processes.size == 1:
        return config
    if config.train.fused_step:
        causes = _fusing(config)
        raise UserError(
            f"{' and '.join(f'{name} = {value}' for name, value, _ in causes)}: a step fused into backward "
            f"updates weights before the gradients of {processes.size} processes are summed; set "
            f"{' and '.join(f'{name} = {other}' for name, _, other in causes)}, or train in one process"
        )
    if config.speed.cuda_graph:
        raise UserError(
            f"speed.cuda_graph = true makes a step one graph of one GPU, and {processes.size} processes sum "
            "gradients within a step: set speed.cuda_graph = false, or train in one process"
        )
    if processes.shard(config) and config.train.vram is not None:
        raise UserError(
            "train.vram plans for a whole model on each GPU and train.shard = true splits it: leave "
            "train.vram out, or set train.shard = false"
        )
    return with_settings(config, {"train.fused_step": False}, "device")  # stated: no plan changes it


def _fusing(config: Config) -> list[tuple[str, str, str]]:
    """The settings in a config that fuse the step: name, value, and the value that does not."""
    causes = [("train.fused_step", "true", "false")] if "fused_step" in config.train.model_fields_set else []
    for part in ("optimizer", "weights") if config.adapter.kind == "full" else ("optimizer",):
        if part in config.offload.model_fields_set and getattr(config.offload, part) == "cpu":
            causes.append((f"offload.{part}", "'cpu'", "'gpu'"))
    return causes


def environment() -> Processes:
    """The processes that the launcher started; one process without a launcher.

    Raises:
        UserError: the launcher asks for a feature that this trainer has settings for, or sets odd values.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError(
            "accelerate launch --use_fsdp: this trainer shards by train.shard = true; launch it with "
            "--multi_gpu instead"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "accelerate launch --use_deepspeed: DeepSpeed is not used here; launch with --multi_gpu, and set "
            "train.shard = true to split weights and states among the GPUs"
        )
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    rank, size, local_rank, local_size = (_number(name, default) for name, default in names)
    if not (rank < size and local_rank < local_size <= size):
        raise UserError(
            f"the environment says RANK = {rank} of WORLD_SIZE = {size}, LOCAL_RANK = {local_rank} of "
            f"LOCAL_WORLD_SIZE = {local_size}, which no launcher sets: unset them, or use torchrun"
        )
    return Processes(rank, size, local_rank, local_size)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,6}", text):
        raise UserError(f"the environment has {name} = {shown(text)}, no number: unset it, or use torchrun")
    return int(text)


@contextmanager
def joined(processes: Processes, device: torch.device) -> Iterator[None]:
    """Connect the processes of a launch, until the context ends.

    Raises:
        MachineError: another process has ended.
    """
    if processes.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        kind = UserError if isinstance(error, ValueError) else MachineError  # torch's of a missing variable
        raise kind(f"the {processes.size} processes cannot be connected: {_first_line(error)}") from error
    try:
        peers = processes.gathered((socket.gethostname(), os.getpid()))
        try:
            yield
        except Exception as error:
            if connection_lost(error):
                raise _lost(error, processes.rank, peers) from error
            raise
    finally:
        dist.destroy_process_group()


_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)
"""Matches the message of a collective's error after another process has ended; gloo raises `RuntimeError`."""


def connection_lost(error: Exception) -> bool:
    """Whether torch raised this error because another process of the run no longer answers."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None
    )


def _lost(error: Exception, rank: int, peers: list[tuple[str, int]]) -> MachineError:
    """A survivor's message that names the processes that ended; the first survivor reports it for all."""
    gone: list[int] = []
    until = time.monotonic() + 1.0  # a process closes its connections a moment before it is gone
    while not gone and time.monotonic() < until:
        gone = [r for r, (host, pid) in enumerate(peers) if host == peers[rank][0] and _is_gone(pid)]
        time.sleep(0.02)
    known = " and ".join(f"process {r}, pid {peers[r][1]}: its own output says why" for r in gone)
    lost = MachineError(
        f"process {rank} has lost the others, one of which has ended ({known or _first_line(error)}): what "
        "was saved is whole, --resume continues from there"
    )
    lost.reported = any(r not in gone for r in range(rank))
    return lost


def _is_gone(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _as_line(error: Exception) -> tuple[str, bool]:
    """An error as one line for the other processes, and whether the machine is to blame."""
    line = one_line(error)
    return str(line or repr(error)), line is None or isinstance(line, MachineError)


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in order, of one type and at least `BUCKET_BYTES` at a time."""
    bucket: list[Tensor] = []
    nbytes = 0
    for gradient in gradients:
        if bucket and (nbytes >= BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(gradient)
        nbytes += gradient.nbytes
    if bucket:
        yield bucket


def _put_back(work: Any, flat: Tensor, gradients: list[Tensor]) -> None:
    work.wait()
    parts = torch.split(flat, [g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
