"""GEGLU against its fp64 definition. This file runs in every implementation: see conftest.py."""

import math
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.autograd import grad as gradient

from mapo_kernels import _launch as launch
from mapo_kernels import backend
from mapo_kernels.hardware import Card, assume_card
from mapo_kernels.ops.geglu import geglu, geglu_backward, geglu_forward
from mapo_kernels.reference import geglu_reference
from tests.saved import compiled, saved_bytes
from tests.tolerances import assert_three_way

op = sys.modules["mapo_kernels.ops.geglu"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("_nan_in_fresh_memory")


def make(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (1.5 * torch.randn(shape)).to(device, dtype).requires_grad_()


def plain(projected: Tensor) -> Tensor:
    """What diffusers' GEGLU does with the projection."""
    value, gate = projected.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def check(projected: Tensor) -> None:
    """Output, gradient and recomputed output, by the three-way rule."""
    out, truth, eager = geglu(projected), geglu_reference(projected), plain(projected)
    assert_three_way(out.detach(), truth.detach(), eager.detach(), name="out")
    assert out.is_contiguous()
    grad = torch.randn(out.shape, device=out.device).to(out.dtype)
    (want,) = gradient(truth, projected, grad.double())
    (expected,) = gradient(eager, projected, grad)
    (got,) = gradient(out, projected, grad)
    assert_three_way(got, want.double(), expected, name="grad")
    recomputed = geglu_backward(projected.detach(), grad, with_output=True)
    assert torch.equal(recomputed[0], got)
    assert torch.equal(recomputed[1], out)
    assert torch.equal(geglu_forward(projected.detach()), out)
    assert geglu_backward(projected.detach(), grad, with_output=False)[1] is None


# --- Values and gradients ---


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(2, 6, 2560), (3, 10), (1, 2), (14,), (7, 2 * 127), (2, 3, 5, 2 * 129), (1, 2 * 1031), (5, 2 * 64)],
)
def test_matches_fp64(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(make(shape, device, dtype))


@pytest.mark.slow
@hypothesis.settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    rows=st.lists(st.integers(1, 7), max_size=3), features=st.integers(1, 300), half=st.booleans()
)
def test_any_shape(device: str, rows: list[int], features: int, half: bool) -> None:
    check(make((*rows, 2 * features), device, torch.bfloat16 if half else torch.float32))


@pytest.mark.parametrize(("rows", "features"), [(3, 300), (11, 37), (2, 130)])
def test_many_tiles(device: str, rows: int, features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Production cuts rows and columns into tiles of 1024 elements; the interpreter would take all in one."""
    monkeypatch.setattr(launch, "LARGEST_INTERPRETED_BLOCK", 128)
    monkeypatch.setattr(op, "WIDEST", 128)
    height, block, blocks, programs = op._tiling(rows, features)
    if backend(device).name == "interpreter":
        assert programs >= 4
        assert blocks * block >= features
        assert programs * height * block >= rows * features
    check(make((rows, 2 * features), device))


def test_tiles_of_sdxl_are_whole() -> None:
    with assume_card(Card(89, 128)):
        for features, width in ((1280, 256), (2560, 512), (5120, 1024)):
            height, block, _, programs = op._tiling(2048, features)
            assert (height, block) == (1024 // width, width)
            assert programs * 1024 == 2048 * features  # no lane is idle
        assert op._tiling(3, 1)[1] == 1
        assert op._tiling(3, 1031)[:3] == (8, 128, 9)


@pytest.mark.parametrize("shape", [(3, 0), (0,)])
def test_no_features(device: str, shape: tuple[int, ...]) -> None:
    projected = make(shape, device)
    out = geglu(projected)
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    assert gradient(out.sum(), projected)[0].shape == shape


def test_rows_of_a_slice_are_read_where_they_lie() -> None:
    rows = torch.zeros(4, 3, 48)[..., 16:32]
    assert op.as_rows(rows).data_ptr() == rows.data_ptr()
    assert op.as_rows(rows).stride() == (48, 1)


def test_fp64_is_fp64(device: str) -> None:
    projected = make((5, 2 * 37), device, torch.float64)
    out, truth = geglu(projected), geglu_reference(projected)
    assert (out - truth).norm() <= 1e-14 * truth.norm()
    grad = torch.randn_like(out)
    (got,), (want,) = gradient(out, projected, grad), gradient(truth, projected, grad)
    assert (got - want).norm() <= 1e-14 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_whole_range_of_gates(device: str, dtype: torch.dtype) -> None:
    """Where Φ is 0 and 1 to the last bit, where its tails matter, and at 0 of either sign."""
    gate = torch.cat([torch.linspace(-40, 40, 97), torch.tensor([0.0, -0.0, 1e-30, 6e4, -6e4])])
    projected = torch.cat([torch.full_like(gate, 1.25), gate]).to(device, dtype).requires_grad_()
    if dtype == torch.float64:
        assert (geglu(projected) - geglu_reference(projected)).abs().max() <= 1e-14 * 6e4
    else:
        check(projected)


def test_nan_and_inf_stay_in_their_place(device: str) -> None:
    projected = make((3, 20), device).detach()
    clean = geglu(projected)
    for column, value in ((4, math.nan), (14, math.nan), (4, math.inf)):
        bad = projected.clone()
        bad[1, column] = value
        out = geglu(bad)
        assert not out[1, 4].isfinite()
        out[1, 4] = clean[1, 4]
        assert torch.equal(out, clean)


def test_rows_beyond_32_bits(device: str) -> None:
    """Row offsets are 64 bits wide: 9 rows 2**28 elements apart, backed by few pages of one large mapping."""
    width, rows = 2**28, 9
    storage = torch.UntypedStorage(2 * ((rows - 1) * width + 6), device=device)
    projected = torch.tensor([], dtype=torch.bfloat16, device=device).set_(storage, 0, (rows, 6), (width, 1))
    values = torch.randn(rows, 6, device=device).bfloat16()
    projected.copy_(values)
    grad = torch.randn(rows, 3, device=device).bfloat16()
    assert (rows - 1) * width >= 2**31
    assert torch.equal(geglu_forward(projected), geglu_forward(values))
    got, want = (geglu_backward(p, grad, with_output=True) for p in (projected, values))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


# --- The operator ---


def test_autocast_keeps_the_dtype(device: str) -> None:
    projected = make((3, 8), device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(geglu(projected), geglu(projected.detach()))
        assert geglu(projected).dtype == torch.float32


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning")  # inside Inductor
def test_only_the_projection_is_saved(device: str, compile: bool) -> None:
    """Plain PyTorch saves 4F values per row for 2F inputs: the projection, gelu(gate), product operands."""
    torch.use_deterministic_algorithms(False)
    function = compiled(lambda x: geglu(x * 2) * 3) if compile else lambda x: geglu(x * 2) * 3
    projected = make((16, 64), device)
    function(projected)
    assert saved_bytes(lambda: function(projected), besides=[projected]) == projected.nbytes
    assert saved_bytes(lambda: plain(projected * 2)) > projected.nbytes


def test_gradcheck(device: str) -> None:
    projected = make((2, 4), device, torch.float64)
    assert torch.autograd.gradcheck(geglu, projected)
    assert torch.autograd.gradcheck(geglu_reference, projected)


class Counting:
    """Counts the launches of a kernel."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


def test_one_launch_each_way(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = Counting(op._geglu_fwd_kernel), Counting(op._geglu_bwd_kernel)
    monkeypatch.setattr(op, "_geglu_fwd_kernel", forward)
    monkeypatch.setattr(op, "_geglu_bwd_kernel", backward)
    projected = make((6, 20), device)
    gradient(geglu(projected).sum(), projected)
    launches = 0 if backend(device).name == "eager" else 1
    assert (forward.launches, backward.launches) == (launches, launches)


@pytest.mark.parametrize(
    ("projected", "error", "message"),
    [
        (torch.zeros(3, 7), ValueError, r"projected: shape \(3, 7\) is not \(\.\.\., 2F\)"),
        (torch.zeros(()), ValueError, r"projected: shape \(\)"),
        (torch.zeros(3, 8, dtype=torch.long), TypeError, "projected: pass a fp16"),
        ([1.0, 2.0], TypeError, "projected: pass a fp16"),
    ],
)
def test_bad_input(projected: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        geglu(projected)
    assert "\n" not in str(caught.value)
