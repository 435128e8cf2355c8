"""Which implementation an op runs on, for which card, and the few things every launcher needs.

Triton is optional (PyPI has it for Linux only). Kernels are decorated with `jit` from here and name `tl` only
inside their bodies, so a module of kernels imports with or without Triton. Whether kernels are compiled or
interpreted is fixed by Triton when it is first imported (`TRITON_INTERPRET=1`), hence once per process.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

WHY_NO_TRITON = ""
try:
    import triton
    import triton.language as tl

    INTERPRETING: bool = triton.knobs.runtime.interpret
    """Triton runs kernels in Python on CPU tensors: a test mode, correct and slow, its masks exact."""
except Exception as error:  # it is missing (Windows, macOS), damaged, too old, or another Python's
    triton = tl = None
    INTERPRETING = False
    missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
    WHY_NO_TRITON = "is not installed" if missing else f"cannot be imported: {error!r:.200}"

__all__ = [
    "INTERPRETING",
    "Backend",
    "Card",
    "assume_card",
    "backend",
    "block_size",
    "card",
    "completion_counter",
    "jit",
    "on_device",
    "tl",
]

OLDEST_CAPABILITY = (7, 5)
"""Oldest NVIDIA compute capability every kernel is compiled for ahead of time in the tests."""


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


@overload
def jit(kernel: Callable[..., Any]) -> Any: ...


@overload
def jit(*, any_value: Sequence[str]) -> Callable[[Callable[..., Any]], Any]: ...


def jit(kernel: Callable[..., Any] | None = None, *, any_value: Sequence[str] = ()) -> Any:
    """`triton.jit`, or the untouched function where Triton is missing (it is never called there).

    Args:
        any_value: integers of the signature that one compiled kernel takes whatever they are. Triton compiles
            the others anew where they are 1 or a multiple of 16, and where they are not.
    """
    if kernel is None:
        return functools.partial(jit, any_value=any_value)
    return kernel if triton is None else triton.jit(do_not_specialize=list(any_value))(kernel)


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
    if torch.cuda.get_device_capability(index) < OLDEST_CAPABILITY:
        have = "{}.{}".format(*torch.cuda.get_device_capability(index))
        return Backend(
            "eager", f"compute capability {have} is below {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
        )
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


LARGEST_INTERPRETED_BLOCK = 65536


def block_size(production: int, size: int) -> int:
    """Elements per program along an axis of `size`: `production`, but few large ones for the interpreter.

    The interpreter's cost is per program, not per element. The result is a power of two.
    """
    if not INTERPRETING or _assumed is not None:
        return production
    return min(LARGEST_INTERPRETED_BLOCK, max(16, 1 << max(0, size - 1).bit_length()))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches on the current device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


_counters: dict[tuple[torch.device, int], Tensor] = {}


def completion_counter(device: torch.device) -> Tensor:
    """Return an int32 (1,) counter that is 0 when the next kernel on the current stream starts.

    A kernel counts its finished programs in it; the last one does the work that needs all the others, and
    sets the counter back to 0. So it has to be cleared only once, not before every launch. Why this is safe:

    - Kernels of one stream run one after another, so one counter per (device, stream) is never shared.
      PyTorch's streams live as long as the process, so a stream's handle is not given to another one.
    - A CUDA graph may be replayed on any stream, next to eager work or to other graphs. A launch that is
      being captured therefore gets its own counter from the graph's pool; its clearing is captured with it.
    - CUDA-graph trees of `torch.compile` would find a cached counter inside their private pool: ops that use
      this counter carry the tag `cudagraph_unsafe`, which makes Inductor run them outside its graphs.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(1, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    counter = _counters.get((device, stream))
    if counter is None:
        counter = _counters[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return counter
