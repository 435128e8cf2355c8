"""What every kernel test needs: the three implementations as one fixture, and NaN in fresh memory.

The files run eagerly on the CPU, again under Triton's interpreter, where the real kernels run on CPU tensors
(test_interpreted.py starts those processes), and on CUDA where there is a GPU.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from mapo_kernels import backend

if torch.cuda.is_available():  # it also changes what the planner counts, for all tests of the process
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode wants it

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device's name; cuDNN's convolutions in fp32 are that there, not TF32, its default."""
    expected = "triton" if request.param == "cuda" else "interpreter" if INTERPRETED else "eager"
    assert backend(request.param).name == expected
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield str(request.param)
    convolutions.fp32_precision = before


@pytest.fixture
def _nan_in_fresh_memory() -> Iterator[None]:
    """`torch.empty` comes filled with NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
