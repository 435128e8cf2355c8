"""The kernels in place: a patched tiny SDXL UNet, forward and backward, against the plain one in fp64."""

import copy

import pytest
import torch

from mapo_fast import patch_unet
from tests.unets import make_unet, run

pytestmark = [
    pytest.mark.usefixtures("_nan_in_fresh_memory"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bound", "channels_last"),
    [  # both memory orders where a mistake shows best; of the other types the operators' own tests know more
        (torch.float64, 1e-9, False),
        (torch.float64, 1e-9, True),
        pytest.param(torch.float32, 1e-4, False, marks=pytest.mark.proof),
        (torch.bfloat16, 0.5, True),
    ],
)
def test_patched_sdxl_unet(device: str, dtype: torch.dtype, bound: float, channels_last: bool) -> None:
    """Relative error per tensor. The bounds in half and single precision only tell arithmetic from mistakes;
    tests/models/test_patch.py compares them with the plain UNet's own errors.
    """
    unet = make_unet("sdxl", dtype=dtype).to(device)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    want = run(copy.deepcopy(unet).double(), "sdxl", dtype, compute=torch.float64)
    got = run(patch_unet(unet), "sdxl", dtype)
    assert got.keys() == want.keys()
    for name, truth in want.items():
        assert (got[name] - truth).norm() <= bound * truth.norm(), name
