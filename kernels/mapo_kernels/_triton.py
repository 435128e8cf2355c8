"""Triton where there is one.

It is optional (PyPI has it for Linux only). Kernels are decorated with `jit` from here and name `tl` only
inside their bodies, so a module of kernels imports with or without Triton. Whether kernels are compiled or
interpreted is fixed by Triton when it is first imported (`TRITON_INTERPRET=1`), hence once per process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

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

__all__ = ["INTERPRETING", "WHY_NO_TRITON", "jit", "tl", "triton"]


@overload
def jit(kernel: Callable[..., Any]) -> Any: ...


@overload
def jit(*, any_value: Sequence[str]) -> Callable[[Callable[..., Any]], Any]: ...


def jit(kernel: Callable[..., Any] | None = None, *, any_value: Sequence[str] = ()) -> Any:
    """`triton.jit`, or the untouched function where Triton is missing (it is never called there).

    Args:
        any_value: integers of the signature that one compiled kernel takes whatever they are. Triton compiles
            the others again where they are 1 or a multiple of 16, and where they are not.
    """
    if kernel is None:
        return functools.partial(jit, any_value=any_value)
    return kernel if triton is None else triton.jit(do_not_specialize=list(any_value))(kernel)
