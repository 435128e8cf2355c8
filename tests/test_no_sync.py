"""A training step makes the host wait for nothing, whatever the layout, the optimizer, and where it steps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mapo_fast.data.cache import PairCache
from mapo_fast.train import train
from mapo_fast.trainer import Trainer
from tests.training import make_cache, make_config

pytestmark = pytest.mark.filterwarnings("ignore")

READING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2")
"""Operations whose result the host needs: a value, or a size that depends on values."""


class NoSync(TorchDispatchMode):  # type: ignore[misc]
    """Fails on what would make the host wait if tensors were on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert name not in READING, f"the host waits in {name}"
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"the host waits in {name} with a mask"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`NoSync`, and none of the methods that read a CPU tensor without an operation."""

    def waits(x: Tensor, *args: Any) -> Any:
        raise AssertionError("the host waits for a copy")

    with monkeypatch.context() as patch, NoSync():
        for name in ("cpu", "tolist", "numpy", "__array__"):
            patch.setattr(Tensor, name, waits)
        yield


def test_the_guard_sees_every_way_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3.0)
    for wait in (
        lambda: float(x[0]),
        lambda: bool(x.any()),
        lambda: x[x > 1],
        lambda: x.masked_fill_(x > 1, 0.0)[(x > 1).nonzero()],
        lambda: torch.equal(x, x),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.unique(),
    ):
        with pytest.raises(AssertionError, match="the host waits"), no_sync(monkeypatch):
            wait()
    with no_sync(monkeypatch):
        x[torch.tensor([0, 1])] = 2.0 * x[:2].sum()


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_sdxl, tmp_path_factory.mktemp("data"))


@pytest.fixture
def inputs_and_steps_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on the CPU anyway, or on a GPU as a kernel, may read."""

    def unwatched(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes(), monkeypatch.context() as patch:
                for name, method in ORIGINAL.items():
                    patch.setattr(Tensor, name, method)
                return function(*args, **kwargs)

        return run

    monkeypatch.setattr(PairCache, "batch", unwatched(PairCache.batch))
    eight_bit = sys.modules["mapo_kernels.adamw8bit"]
    monkeypatch.setattr(eight_bit, "eager_step", unwatched(eight_bit.eager_step))


ORIGINAL = {name: getattr(Tensor, name) for name in ("cpu", "tolist", "numpy", "__array__")}

PLANS = [
    (kind, layout, optimizer, fused)
    for kind in ("full", "lora")
    for layout in ("joint", "split", "sequential")
    for optimizer in ("adamw", "adamw8bit")  # torch's Adafactor reads the norm of every tensor
    for fused in (False, True)
    if not (fused and layout == "sequential") and (kind == "full" or optimizer == "adamw")
]


@pytest.mark.usefixtures("inputs_and_steps_as_on_a_gpu")
@pytest.mark.parametrize(("kind", "layout", "optimizer", "fused"), PLANS)
def test_a_step_reads_nothing_from_the_device(
    tiny_sdxl: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    layout: str,
    optimizer: str,
    fused: bool,
) -> None:
    step, steps = Trainer._step, []

    def watched(self: Trainer, micro_batches: Any) -> Tensor:
        with no_sync(monkeypatch):
            norm = step(self, micro_batches)
            self.metrics.add_step(norm)
        steps.append(self.step)
        return norm

    monkeypatch.setattr(Trainer, "_step", watched)
    config = make_config(
        tiny_sdxl,
        cache,
        tmp_path / "run",
        train={
            "steps": 2,
            "layout": layout,
            "fused_step": fused,
            "checkpoint_every": 0,
            "pairs_per_batch": 1,
            "evaluate_pairs": 1,
        },
        adapter={"kind": kind, "rank": 4},
        optim={"name": optimizer},
        speed={"prefetch": False},
    )
    train(config)
    assert steps == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(("kind", "layout", "optimizer", "fused"), PLANS)
def test_a_step_on_a_gpu_waits_for_nothing(
    tiny_sdxl: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    layout: str,
    optimizer: str,
    fused: bool,
    prefetch: bool,
) -> None:
    """From the second step on: the first one compiles kernels and makes tables."""
    step = Trainer._step

    def watched(self: Trainer, micro_batches: Any) -> Tensor:
        if self.step == 0:
            return step(self, micro_batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, micro_batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", watched)
    config = make_config(
        tiny_sdxl,
        cache,
        tmp_path / "run",
        train={"steps": 4, "layout": layout, "fused_step": fused, "pairs_per_batch": 1, "evaluate_pairs": 1},
        adapter={"kind": kind, "rank": 4},
        optim={"name": optimizer},
        speed={"prefetch": prefetch},
    )
    assert train(config).finished
