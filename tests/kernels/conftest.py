"""What every kernel test needs: the three implementations as one fixture, and NaN in fresh memory.

Tests that ask for `device` run eagerly on the CPU, on CUDA where there is a GPU, and once more in Triton's
interpreter, where the real kernels run on CPU tensors: `TRITON_INTERPRET=1 pytest -p tests.interpreter`.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from mapo_kernels import backend

if torch.cuda.is_available():  # it also changes what the planner counts, for all tests of the process
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode wants it

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_KERNEL = "launches kernels, which a CPU does in Triton's interpreter only"


PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    """The device's name where the kernels do not matter: nothing is run in the interpreter."""
    return str(request.param)


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device's name; cuDNN's convolutions in fp32 are that there, not TF32, its default."""
    expected = "triton" if request.param == "cuda" else "interpreter" if INTERPRETED else "eager"
    assert backend(request.param).name == expected
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield str(request.param)
    convolutions.fp32_precision = before


@pytest.fixture
def _launches(device: str) -> None:
    """For what only kernels promise or have."""
    if backend(device).name == "eager":
        pytest.skip(NO_KERNEL)


@pytest.fixture
def _interpreted() -> None:
    """For tests of the interpreter itself."""
    if not INTERPRETED:
        pytest.skip(NO_KERNEL)


@pytest.fixture
def _nan_in_fresh_memory() -> Iterator[None]:
    """`torch.empty` comes filled with NaN, so that an output nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
