"""Make Triton's interpreter as strict as a GPU where it is known to be too kind; a pytest plugin.

`TRITON_INTERPRET=1 python -m pytest -p tests.interpreter tests/kernels` runs the tests of `device` once more,
with the real kernels on CPU tensors, and nothing else. What it changes:

- Casts to bf16 round to nearest even; the stock interpreter truncates.
- Arithmetic, comparisons and reductions on bf16 raise; the stock interpreter computes on the raw bits.
- An access outside the arguments raises, and so does a race between programs: `bench.watch.MemoryChecker`.
- Triton 3.6 with NumPy ≥ 2.4: a tensor can again be a loop bound.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.watch import MemoryChecker, watching


def _round_to_bf16(data: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def _widen_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Patch the interpreter of this process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle

    def rounding(stock: Callable[..., Any]) -> Callable[..., Any]:
        def cast(self: Any, source: Any, to: Any, *rest: Any) -> Any:
            has, wants = source.dtype.scalar, to.scalar
            if has == wants or tl.bfloat16 not in (has, wants):
                return stock(self, source, to, *rest)
            if has == tl.bfloat16:
                return stock(self, handle(_widen_bf16(source.data), tl.float32), to, *rest)
            return handle(_round_to_bf16(source.data), tl.bfloat16)

        return cast

    def refusing(stock: Callable[..., Any]) -> Callable[..., Any]:
        def compute(self: Any, *operands: Any) -> Any:
            for operand in operands:
                if getattr(operand, "dtype", None) is not None and operand.dtype.scalar == tl.bfloat16:
                    raise TypeError("bf16 arithmetic in a kernel: convert to fp32 after the load")
            return stock(self, *operands)

        return compute

    builder.cast_impl = rounding(builder.cast_impl)
    builder.create_fp_to_fp = rounding(builder.create_fp_to_fp)
    for name in ("binary_op", "unary_op", "create_fabs", "create_fma", "create_dot", "create_clampf"):
        setattr(builder, name, refusing(getattr(builder, name)))

    check = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, operands: Any) -> None:
        check(self, operands)
        for operand in operands:
            if operand.dtype.scalar == tl.bfloat16:
                raise TypeError("bf16 reduction in a kernel: convert to fp32 first")

    interpreter.ReduceScanOpInterface.check_tensor = check_tensor

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor


if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("set TRITON_INTERPRET=1 with -p tests.interpreter")

install()
_checker = MemoryChecker()
_checking = watching(_checker)  # kept: a collected context manager would undo itself
_checking.__enter__()
_checked: Counter[str] = Counter()
"""Launches of all processes of this run."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs on no device and what needs a GPU has run, or skipped, in the pass without interpreter."""
    chosen, rest = [], []
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        here = parameters.get("device") == "cpu" or "_interpreted" in getattr(item, "fixturenames", ())
        (chosen if here else rest).append(item)
    config.hook.pytest_deselected(items=rest)
    items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """A test of kernels that skips where kernels run is a mistake."""
    report: Any = yield
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"may not skip here: {report.longrepr[2]}"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Count this process's launches, or hand them to the process that started it."""
    mine = {"launches": _checker.launches, "unchecked": _checker.unchecked}
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["checked"] = mine
    else:
        _checked.update(mine)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended, and may have crashed."""
    _checked.update(getattr(node, "workeroutput", {}).get("checked", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how much was checked."""
    some = f"{_checked['launches']:,} launches checked for bounds and races"
    terminalreporter.write_line(f"{some}, {_checked['unchecked']:,} of them only in part or not at all")
