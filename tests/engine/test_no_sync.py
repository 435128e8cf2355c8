"""A training step makes the host wait for nothing, whatever the layout, the optimizer, and where it steps.

Nor does what it compares with: a reference, labels, the baseline of Diffusion-KTO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mapo_fast.data.cache import PairCache
from mapo_fast.run.metrics import Metrics
from mapo_fast.run.train import fit
from mapo_fast.run.trainer import Trainer
from mapo_fast.settings.schema import Config
from mapo_kernels.ops import adamw8bit
from tests.covering import covering
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
def caches(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Caches of pairs with soft labels, and of single images."""
    folder = tmp_path_factory.mktemp("data")
    return {
        True: make_cache(tiny_sdxl, folder / "paired", labelled=True),
        False: make_cache(tiny_sdxl, folder / "single", paired=False),
    }


@pytest.fixture
def inputs_and_steps_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on the CPU anyway, or on a GPU as a kernel, may read; and what is made once in a process."""
    adamw8bit.new_state(torch.empty(4096))  # its code books

    def unwatched(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes(), monkeypatch.context() as patch:
                for name, method in ORIGINAL.items():
                    patch.setattr(Tensor, name, method)
                return function(*args, **kwargs)

        return run

    for name in ("batch", "samples", "labels", "wanted"):
        monkeypatch.setattr(PairCache, name, unwatched(getattr(PairCache, name)))
    monkeypatch.setattr(adamw8bit, "eager_step", unwatched(adamw8bit.eager_step))


ORIGINAL = {name: getattr(Tensor, name) for name in ("cpu", "tolist", "numpy", "__array__")}

PLANS = [
    (kind, layout, optimizer, fused)
    for kind in ("full", "lora")
    for layout in ("joint", "split", "sequential")
    for optimizer in ("adamw", "adamw8bit")  # torch's Adafactor reads the norm of every tensor
    for fused in (False, True)
    if not (fused and layout == "sequential") and (kind == "full" or optimizer == "adamw")
]
REFERENCES = [
    (objective, kind, reference, layout)
    for objective in ("dpo", "smpo", "kto")  # pairs, pairs with soft labels, single images
    for kind, reference in (("lora", "adapter"), ("full", "copy"), ("full", "precomputed"))
    for layout in ("joint", "split", "sequential")
    if objective != "smpo" or layout == "joint"
]


def any_two(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Those in which any two settings meet: what reads from the device does so whatever else is set."""
    return [rows[i] for i in covering(rows, strength=2)]


Watched = Callable[[Callable[[], Tensor]], Tensor]


def steps_of_a_run(monkeypatch: pytest.MonkeyPatch, config: Config, watched: Watched) -> list[int]:
    """Train, with every step inside `watched`; returns the steps."""
    step, add, steps = Trainer._step, Metrics.add_step, []

    def taken(self: Trainer, micro_batches: Any) -> Tensor:
        def step_and_figures() -> Tensor:
            norm = step(self, micro_batches)
            add(self.metrics, norm)
            return norm

        norm = watched(step_and_figures)
        steps.append(self.step)
        return norm

    monkeypatch.setattr(Trainer, "_step", taken)
    monkeypatch.setattr(Metrics, "add_step", lambda self, norm: None)  # it is in the step
    assert fit(config).finished
    return steps


@pytest.fixture
def make(tiny_sdxl: Path, caches: dict[bool, Path], tmp_path: Path) -> Callable[..., Config]:
    def build(
        kind: str,
        layout: str,
        optimizer: str = "adamw",
        fused: bool = False,
        objective: str = "mapo",
        reference: str = "auto",
        steps: int = 2,
        prefetch: bool = False,
    ) -> Config:
        return make_config(
            tiny_sdxl,
            caches[objective != "kto"],
            tmp_path / "run",
            objective={"name": objective, "reference": reference},
            train={
                "steps": steps,
                "layout": layout,
                "fused_step": fused,
                "checkpoint_every": 0,
                "pairs_per_batch": 1,
                "evaluate_pairs": 1,
            },
            adapter={"kind": kind, "rank": 4},
            optim={"name": optimizer},
            speed={"prefetch": prefetch},
        )

    return build


def check_on_the_cpu(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    def watched(step: Callable[[], Tensor]) -> Tensor:
        with no_sync(monkeypatch):
            return step()

    assert steps_of_a_run(monkeypatch, config, watched) == [1, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("inputs_and_steps_as_on_a_gpu")
@pytest.mark.parametrize(("kind", "layout", "optimizer", "fused"), any_two(PLANS))
def test_a_step_reads_nothing_from_the_device(
    make: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    layout: str,
    optimizer: str,
    fused: bool,
) -> None:
    check_on_the_cpu(monkeypatch, make(kind, layout, optimizer, fused))


@pytest.mark.slow
@pytest.mark.usefixtures("inputs_and_steps_as_on_a_gpu")
@pytest.mark.parametrize(("objective", "kind", "reference", "layout"), any_two(REFERENCES))
def test_a_step_with_a_reference_reads_nothing_from_the_device(
    make: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    kind: str,
    reference: str,
    layout: str,
) -> None:
    check_on_the_cpu(monkeypatch, make(kind, layout, objective=objective, reference=reference))


def check_on_a_gpu(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    """From the second step on: the first one compiles kernels and makes tables."""
    first = True

    def watched(step: Callable[[], Tensor]) -> Tensor:
        nonlocal first
        torch.cuda.set_sync_debug_mode("default" if first else "error")
        first = False
        try:
            return step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert steps_of_a_run(monkeypatch, config, watched) == [1, 2, 3, 4]


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(("kind", "layout", "optimizer", "fused"), PLANS)
def test_a_step_on_a_gpu_waits_for_nothing(
    make: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    layout: str,
    optimizer: str,
    fused: bool,
    prefetch: bool,
) -> None:
    check_on_a_gpu(monkeypatch, make(kind, layout, optimizer, fused, steps=4, prefetch=prefetch))


@pytest.mark.gpu
@pytest.mark.parametrize(("objective", "kind", "reference", "layout"), REFERENCES)
def test_a_step_with_a_reference_on_a_gpu_waits_for_nothing(
    make: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    kind: str,
    reference: str,
    layout: str,
) -> None:
    check_on_a_gpu(monkeypatch, make(kind, layout, objective=objective, reference=reference, steps=4))
