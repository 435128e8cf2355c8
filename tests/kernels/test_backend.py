"""Which implementation runs on a GPU, and why another one does where it cannot."""

import importlib.util
import subprocess
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from mapo_kernels import _triton, backend, hardware

pytest.importorskip("triton", reason="Triton is not installed: the eager path runs everywhere")
pytestmark = pytest.mark.skipif(hardware.INTERPRETING, reason="the interpreter runs on every device")


@pytest.fixture
def card() -> Iterator[mock.Mock]:
    """An NVIDIA GPU of compute capability 8.9, as far as torch and Triton's driver say."""
    hardware._cuda_backend.cache_clear()
    driver = mock.Mock()
    with (
        mock.patch.object(torch.version, "hip", None),
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 9)),
        mock.patch("torch.cuda.get_device_name", return_value="a card"),
        mock.patch.object(hardware.triton.runtime, "driver", driver),
        mock.patch.object(hardware, "_run_a_kernel"),
    ):
        yield driver
    hardware._cuda_backend.cache_clear()


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
    assert backend("cuda:0").name == "eager"
    assert "Triton cannot start (Failed to find C compiler.); it needs a C comp" in backend("cuda:0").reason


def test_no_python_headers(card: mock.Mock) -> None:
    command = subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"])
    card.active.get_current_target.side_effect = command
    assert str(backend("cuda:0")).startswith("eager PyTorch: Triton cannot start (Command '['/usr/bin/gcc'")
    assert "apt install gcc python3-dev" in backend("cuda:0").reason


def test_a_first_kernel_that_fails(card: mock.Mock) -> None:
    """Its launcher is built, or ptxas runs, at the first launch only."""
    with mock.patch.object(hardware, "_run_a_kernel", side_effect=OSError("ptxas: no version of it")) as run:
        assert backend("cuda:1").name == "eager"
        assert "(ptxas: no version of it)" in backend("cuda:1").reason
    run.assert_called_once_with(1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ModuleNotFoundError(\"No module named 'triton'\", name='triton')", "Triton is not installed"),
        ("ImportError('libtriton.so: wrong ELF class')", "Triton cannot be imported: ImportError('libtriton"),
        ("RuntimeError('another Python')", "Triton cannot be imported: RuntimeError('another Python"),
    ],
)
def test_a_triton_that_cannot_be_imported(error: str, reason: str) -> None:
    """Import the module a second time; the real one, which others hold, stays."""
    import builtins

    real = builtins.__import__

    def no_triton(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "triton":
            raise eval(error)
        return real(name, *args, **kwargs)

    again = importlib.util.module_from_spec(_triton.__spec__)
    assert _triton.__spec__.loader is not None
    with mock.patch.object(builtins, "__import__", no_triton):
        _triton.__spec__.loader.exec_module(again)
    with mock.patch.multiple(hardware, triton=again.triton, WHY_NO_TRITON=again.WHY_NO_TRITON):
        assert backend("cuda:0").name == "eager"
        assert backend("cuda:0").reason.startswith(reason)
