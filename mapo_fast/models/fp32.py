"""Products and convolutions of fp32 numbers in fp32, also where torch would round them to TF32 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def exact_fp32() -> Iterator[None]:
    """No TF32 on NVIDIA GPUs while this is open; by default torch has it in convolutions.

    torch has two interfaces to the same switches and refuses to read one after the other has been set alone:
    both are set here, and the former values are put back.
    """
    backends: Any = torch.backends
    new = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    kept = [switch.fp32_precision for switch in new]
    convolutions = products = None
    with suppress(RuntimeError):  # only the new interface has been used
        convolutions = backends.cudnn.allow_tf32
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    _set(False, "highest")
    for switch in new:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        _set(convolutions, products)
        for switch, value in zip(new, kept, strict=True):
            switch.fp32_precision = value


def _set(convolutions: bool | None, products: str | None) -> None:
    """Set the old interface where a value is known; the new one's follows."""
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
    if products is not None:
        torch.set_float32_matmul_precision(products)
