"""Which implementation runs on a GPU, and why another one does where it cannot."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from mapo_kernels import _launch as launch
from mapo_kernels import backend

pytest.importorskip("triton", reason="Triton is not installed: the eager path runs everywhere")
pytestmark = pytest.mark.skipif(launch.INTERPRETING, reason="the interpreter runs on every device")


@pytest.fixture
def card() -> Iterator[mock.Mock]:
    """An NVIDIA GPU of compute capability 8.9, as far as torch and Triton's driver say."""
    launch._cuda_backend.cache_clear()
    driver = mock.Mock()
    with (
        mock.patch.object(torch.version, "hip", None),
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 9)),
        mock.patch("torch.cuda.get_device_name", return_value="a card"),
        mock.patch.object(launch.triton.runtime, "driver", driver),
    ):
        yield driver
    launch._cuda_backend.cache_clear()


def test_kernels_run_on_a_card(card: mock.Mock) -> None:
    assert backend("cuda:0").name == "triton"
    assert backend("cuda:0").reason.endswith("on a card")


def test_an_old_card(card: mock.Mock) -> None:
    with mock.patch("torch.cuda.get_device_capability", return_value=(7, 0)):
        assert backend("cuda:0") == ("eager", "compute capability 7.0 is below 7.5")


def test_rocm(card: mock.Mock) -> None:
    with mock.patch.object(torch.version, "hip", "6.3"):
        assert backend("cuda:0").name == "eager"
        assert "ROCm" in backend("cuda:0").reason


def test_no_c_compiler(card: mock.Mock) -> None:
    """Triton builds its launcher with the machine's compiler; slim containers have none."""
    card.active.get_current_target.side_effect = RuntimeError("Failed to find C compiler.\nPlease specify CC")
    assert backend("cuda:0") == ("eager", "Triton cannot start: Failed to find C compiler.")
