"""What a run compiles: few kernels, all of them before its first step, and none more for another bucket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mapo_fast.data.buckets import make_buckets
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.planner import kernels, store
from mapo_fast.planner.kernels import compiling, kernels_of, kinds_of_shapes
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config
from mapo_kernels import Backend, hardware
from mapo_kernels.hardware import INTERPRETING, Card
from tests.planner.test_recorder import REDUCED, TWO_BLOCKS

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")
pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="nothing is compiled in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

RTX = Card(89, 128)
LEVELS = 3


def settings(kind: str = "full", **speed: Any) -> Config:
    return parse_config(
        {
            "model": {"path": "unused"},
            "data": {"cache": "unused"},
            "train": {"output": "unused", "precision": "pure_bf16", "layout": "joint", "accumulation": 2},
            "adapter": {"kind": kind},
            "optim": {"name": "adamw8bit"},
            "speed": speed,
        }
    )


def target() -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 89, 32)


def test_sdxls_buckets_divide_in_few_ways() -> None:
    buckets = make_buckets(1024, 64)
    assert len(buckets) > 30
    kinds = kinds_of_shapes(buckets, LEVELS)
    assert max(buckets, key=lambda size: size[0] * size[1]) == kinds[0]
    assert len(kinds) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, pytest.param(True, marks=pytest.mark.proof)])
def test_sdxl_compiles_few_kernels_and_none_for_another_bucket(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(channels_last=channels_last)
    if not channels_last:
        one = kernels_of(config, SDXL_UNET, [(1024, 1024)], target(), RTX)
        assert len(one) <= 34, sorted(kernel.function.__name__ for kernel in one.values())
    all_of_them = kernels_of(config, SDXL_UNET, make_buckets(1024, 64), target(), RTX)
    assert len(all_of_them) <= 43
    monkeypatch.setattr(kernels, "kinds_of_shapes", lambda buckets, levels: buckets)
    other = (512, 1856) if channels_last else (1728, 576)
    assert kernels_of(config, SDXL_UNET, [other], target(), RTX).keys() <= all_of_them.keys()


@pytest.mark.slow
def test_fewer_blocks_launch_the_same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointed by name too, where the few blocks have other names."""
    config, unet_config = settings("lora"), TWO_BLOCKS
    names = ("down_blocks.1.attentions.0.transformer_blocks.1",)
    named = config.model_copy(
        update={"train": config.train.model_copy(update={"gradient_checkpointing": names})}
    )
    few = kernels_of(named, unet_config, [(256, 256)], target(), RTX)
    monkeypatch.setattr(kernels, "_smaller", lambda config, unet_config: (config, unet_config))
    all_blocks = {**config.train.model_dump(), "gradient_checkpointing": True}
    config = config.model_copy(update={"train": type(config.train).model_validate(all_blocks)})
    assert few.keys() == kernels_of(config, unet_config, [(256, 256)], target(), RTX).keys()


@contextmanager
def pretended_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A card whose kernels are compiled by noting their names."""
    compiled: list[str] = []
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    monkeypatch.setattr(hardware, "backend", lambda device: Backend("triton", ""))
    monkeypatch.setattr(hardware, "card", lambda device: RTX)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=target))
    monkeypatch.setattr(kernels, "kernels_of", lambda *_: {i: Noting(compiled, i) for i in range(5)})
    monkeypatch.setattr(kernels.triton, "runtime", SimpleNamespace(driver=driver))
    yield compiled


class Noting(SimpleNamespace):
    def __init__(self, compiled: list[str], name: int) -> None:
        super().__init__(compile=lambda target: compiled.append(str(name)))


def test_kernels_are_compiled_once_on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    with pretended_card(monkeypatch, tmp_path) as compiled:
        with pytest.raises(KeyboardInterrupt), compiling(settings(), REDUCED, [(64, 64)], cuda):
            raise KeyboardInterrupt
        compiled.clear()
        with compiling(settings(), REDUCED, [(64, 64)], cuda) as count:
            assert count == 5
        assert sorted(compiled) == list("01234")  # all, when the context has ended
        with compiling(settings(), REDUCED, [(64, 64)], cuda) as count:
            assert count == 0
        with compiling(settings(), REDUCED, [(64, 128)], cuda) as count:
            assert count == 5
        assert len(compiled) == 10


def test_nothing_is_compiled_on_the_cpu() -> None:
    with compiling(settings(), REDUCED, [(64, 64)], torch.device("cpu")) as count:
        assert count == 0


@pytest.mark.slow
def test_a_kernel_is_found_in_tritons_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiled for a card that is not there, by the same compiler that a launch asks."""
    from triton import knobs

    found = kernels_of(settings(), REDUCED, [(256, 256)], target(), RTX)
    kernel = next(k for k in found.values() if k.function.__name__ == "_add_rounded_kernel")
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        kernel.compile(target())
    assert list(tmp_path.rglob("*.cubin"))
