"""Which implementation an operator runs on, and for which card."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mapo_kernels._triton import INTERPRETING, WHY_NO_TRITON, jit, tl, triton
from mapo_kernels.capability import OLDEST_CAPABILITY

__all__ = ["INTERPRETING", "Backend", "Card", "assume_card", "assumed_card", "backend", "card"]


class Backend(NamedTuple):
    """What runs for tensors on a device, and why."""

    name: Literal["triton", "interpreter", "eager"]
    reason: str

    def __str__(self) -> str:
        """In words, with the reason."""
        what = {
            "triton": "fused Triton kernels",
            "interpreter": "Triton's interpreter (for tests; slow)",
            "eager": "eager PyTorch",
        }
        return f"{what[self.name]}: {self.reason}"


def backend(device: torch.device | str) -> Backend:
    """Return the implementation that ops of this package use for tensors on `device`."""
    device = torch.device(device)
    if triton is None:
        return Backend("eager", f"Triton {WHY_NO_TRITON}")
    if _assumed is not None and not INTERPRETING:
        return Backend("triton", f"assumed: {_assumed}")
    if INTERPRETING:
        return Backend("interpreter", "TRITON_INTERPRET=1 was set before Triton was imported")
    if device.type != "cuda":
        return Backend("eager", f"Triton kernels need a CUDA device, not {device.type!r}")
    return _cuda_backend(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_backend(index: int) -> Backend:
    if torch.version.hip is not None:
        return Backend("eager", "the kernels have only been compiled for NVIDIA GPUs, not for ROCm")
    oldest = divmod(OLDEST_CAPABILITY, 10)
    have = torch.cuda.get_device_capability(index)
    if have < oldest:
        return Backend("eager", "compute capability {}.{} is below {}.{}".format(*have, *oldest))
    try:
        triton.runtime.driver.active.get_current_target()
        _run_a_kernel(index)
    except Exception as error:  # of many kinds: with a C compiler and Python's headers it builds its launcher
        first = (str(error).splitlines() or [type(error).__name__])[0]
        needs = "it needs a C compiler and Python's headers: apt install gcc python3-dev"
        return Backend("eager", f"Triton cannot start ({first:.200}); {needs}")
    return Backend("triton", f"Triton {triton.__version__} on {torch.cuda.get_device_name(index)}")


@jit
def _answer_kernel(out):  # type: ignore[no-untyped-def]
    tl.store(out, 42)


def _run_a_kernel(index: int) -> None:
    """Compile, launch and check a kernel: whatever of that fails, fails here and not in a training step."""
    with unset_fake_temporarily(), torch.cuda.device(index):
        out = torch.zeros(1, dtype=torch.int32, device="cuda")
        _answer_kernel[(1,)](out)
        if int(out) != 42:
            raise RuntimeError("its first kernel did not write what it should")


class Card(NamedTuple):
    """What launchers choose grids and block sizes by."""

    capability: int
    """Compute capability as one number, 89 for 8.9."""
    multiprocessors: int


_assumed: Card | None = None

_INTERPRETER = Card(capability=90, multiprocessors=4)
"""What the interpreter pretends to be: few programs, since each one costs time."""


def card(device: torch.device) -> Card:
    """The card that a launch on `device` is for."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return _INTERPRETER
    return _cuda_card(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(10 * properties.major + properties.minor, properties.multi_processor_count)


def assumed_card() -> Card | None:
    """The card of the surrounding `assume_card`, if there is one."""
    return _assumed


@contextlib.contextmanager
def assume_card(assumed: Card) -> Iterator[None]:
    """Launch as on another card, for tools that compile or count what production launches there.

    Grids and block sizes are that card's, also for CPU tensors and under the interpreter; without the
    interpreter the caller has to intercept the launches.
    """
    global _assumed
    before, _assumed = _assumed, assumed
    try:
        yield
    finally:
        _assumed = before
