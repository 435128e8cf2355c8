"""`train.vram`: a plan before anything is loaded, refusals that help, and words when memory runs out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mapo_fast.engine import compile as compile_module
from mapo_fast.hardware import gpu
from mapo_fast.hardware.allocator import EXPANDABLE
from mapo_fast.hardware.holders import Gpu, Holder
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.planner import shipped
from mapo_fast.planner.plan import Plan
from mapo_fast.run import budget as run_budget
from mapo_fast.run import preview
from mapo_fast.run.budget import Budget, planned
from mapo_fast.run.train import back_end, fit
from mapo_fast.settings.load import parse_config
from mapo_fast.util.errors import UserError
from mapo_kernels import Backend
from tests.training import make_cache, make_config

train_module = sys.modules["mapo_fast.run.train"]
CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_sdxl, tmp_path_factory.mktemp("cache"))


pytestmark = pytest.mark.usefixtures("planned_here")


def plan_of(name: str, peak: int) -> Plan:
    settings: dict[str, Any] = {"train.layout": name, "train.gradient_checkpointing": True}
    return Plan(settings, {}, peak, peak, 0, 0, 1.0, True)


def budget_of(device: torch.device, vram: int, peak: int, smaller: Plan | None = None) -> Budget:
    return Budget(device, vram, plan_of("joint", peak), smaller, "assumed", "train.vram")


def test_without_a_gpu_nothing_is_planned_unless_asked(tiny_sdxl: Path, tmp_path: Path) -> None:
    config = make_config(tiny_sdxl, tmp_path, tmp_path)
    assert planned(config, lambda: open_sdxl(tiny_sdxl), CPU) == (config, None)


@pytest.mark.slow
def test_vram_drives_a_run_and_its_resume(tiny_sdxl: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    asked = {"vram": "1GiB", "steps": 4, "checkpoint_every": 2}
    assert fit(make_config(tiny_sdxl, cache, output, train=asked)).finished
    recorded = json.loads((output / "run.json").read_text())["config"]["train"]
    assert recorded["layout"] == "joint"  # of what fits, the fastest
    assert recorded["gradient_checkpointing"] is False
    log = (output / "log.jsonl").read_text()
    assert "memory plan: both images at once, activations kept" in log
    assert fit(make_config(tiny_sdxl, cache, output, train=asked | {"steps": 6}), resume=True).finished


@pytest.mark.slow
def test_a_resume_keeps_what_the_updates_depend_on(tiny_sdxl: Path, tmp_path: Path) -> None:
    config = make_config(tiny_sdxl, tmp_path, tmp_path, train={"vram": "1GiB"})
    recorded = config.model_dump(mode="json")
    recorded["train"]["fused_step"] = True
    assert planned(config, lambda: open_sdxl(tiny_sdxl), CPU, recorded)[0].train.fused_step
    assert not planned(config, lambda: open_sdxl(tiny_sdxl), CPU)[0].train.fused_step


@pytest.mark.slow
def test_what_cannot_fit_is_refused_before_weights_are_loaded(
    tiny_sdxl: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "load_unet", lambda *_: pytest.fail("weights are loaded"))
    config = make_config(tiny_sdxl, cache, tmp_path / "run", train={"vram": "560MiB"})
    with pytest.raises(UserError, match=r"no plan fits train\.vram, 0\.55 GiB") as refused:
        fit(config)
    message = str(refused.value)
    assert "\n" not in message
    enough = re.search(r'train\.vram = "([\d.]+GiB)" would do', message)
    assert enough is not None
    config = make_config(tiny_sdxl, cache, tmp_path / "run", train={"vram": enough[1]})
    assert planned(config, lambda: open_sdxl(tiny_sdxl), CPU)[1] is not None
    assert not (tmp_path / "run").exists()


def test_the_first_line_names_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it is not the GPU's kernels, why."""
    monkeypatch.setattr(
        train_module, "backend", lambda device: Backend("eager", "Triton cannot start (no gcc)")
    )
    assert back_end(torch.device("cuda")) == "eager PyTorch: Triton cannot start (no gcc)"
    monkeypatch.setattr(train_module, "backend", lambda device: Backend("triton", "Triton 3.7.1 on RTX 3060"))
    assert back_end(torch.device("cuda")) == "fused Triton kernels: Triton 3.7.1 on RTX 3060"
    monkeypatch.setattr(train_module, "why_no_gpu", lambda: "driver 470 is too old")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert back_end(CPU) == "torch sees no NVIDIA GPU: driver 470 is too old"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert back_end(CPU) == "train.device = 'cpu'"


def test_compiled_blocks_need_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compile_module, "backend", lambda device: Backend("eager", "Triton is not installed"))
    config = make_config(tmp_path, tmp_path, tmp_path, speed={"compile": True})
    with pytest.raises(
        UserError, match=r"speed\.compile = true needs Triton; Triton is not installed\. Or set"
    ):
        compile_module.refuse_without_triton(config, torch.device("cuda"))
    compile_module.refuse_without_triton(config, CPU)


def test_running_out_of_memory_is_explained() -> None:
    smaller = plan_of("split", 5 * GIB)
    with pytest.raises(UserError) as e, budget_of(CPU, 10 * GIB, 8 * GIB, smaller).kept():
        raise torch.OutOfMemoryError("CUDA out of memory")
    planned = "the plan (both images at once, activations recomputed) expected 8.00 GiB"
    assert str(e.value).startswith(f"out of GPU memory: {planned}")
    name = "one image at a time in each block, activations recomputed"
    assert f'next smaller plan ({name}, 5.00 GiB) is that of --set train.vram="5.56GiB"' in str(e.value)
    with (
        pytest.raises(UserError, match="there is no smaller plan"),
        budget_of(CPU, 10 * GIB, 8 * GIB).kept(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


class PretendedCard:
    """A card of 24 GiB under torch.cuda's names; the cap goes through torch's own checks."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, free: float, reserved: float, display: bool = False
    ) -> None:
        self.caps: list[tuple[float, int]] = []
        monkeypatch.setattr(gpu, "choose_rules", lambda device: EXPANDABLE)
        monkeypatch.setattr(gpu, "load_libraries", lambda device: None)
        monkeypatch.setattr(gpu, "drives_display", lambda device: display)
        fakes: dict[str, Any] = {
            "mem_get_info": lambda device: (int(free * GIB), 24 * GIB),
            "memory_reserved": lambda device: int(reserved * GIB),
            "memory_allocated": lambda device: 0,
            "get_device_name": lambda device: "RTX 4090",
            "get_device_properties": lambda device: SimpleNamespace(
                total_memory=24 * GIB, major=8, minor=9, uuid="12"
            ),
            "current_device": lambda: 0,
            "max_memory_allocated": lambda device: 7 * GIB,
            "max_memory_reserved": lambda device: 9 * GIB,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
        monkeypatch.setattr(
            torch._C,
            "_cuda_setMemoryFraction",
            lambda share, index: self.caps.append((share, index)),
            raising=False,
        )


CUDA = torch.device("cuda")


def test_text_encoders_larger_than_the_budget_run_on_the_cpu(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_sdxl, tmp_path, tmp_path, preview={"prompts": ["red square"]})
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    real = preview.encode_prompts

    def encode(*args: Any, device: torch.device, **settings: Any) -> Any:
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, device=device, **settings)

    monkeypatch.setattr(preview, "encode_prompts", encode)
    folder = open_sdxl(tiny_sdxl)
    small, plain = preview.Previews(config, folder, CUDA), preview.Previews(config, folder, CPU)
    assert emptied == [True]
    assert small.device == CUDA
    assert torch.equal(small.prompts.prompt_embeds, plain.prompts.prompt_embeds)


def test_the_allocator_is_capped_while_a_run_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    card = PretendedCard(monkeypatch, free=20, reserved=0)
    with budget_of(CUDA, int(12.4 * GIB), 8 * GIB).kept():
        assert card.caps == [(pytest.approx(0.5), 0)]
    assert card.caps[1:] == [(1.0, 0)]
    with budget_of(CUDA, 80 * GIB, 8 * GIB).kept():
        assert card.caps[-1] == (1.0, 0)


@pytest.mark.parametrize(
    "words",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_libraries_run_out_of_memory_too(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PretendedCard(monkeypatch, free=0.1, reserved=0)
    budget = budget_of(CUDA, 12 * GIB, 8 * GIB)
    with pytest.raises(UserError, match=r"8\.00 GiB, 7\.00 were allocated and 9\.00 reserved"), budget.kept():
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="illegal memory access"), budget.kept():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("words", "device"),
    [
        ("CUDA error: out of memory", CUDA),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", CPU),
    ],
)
def test_system_ram_that_runs_out_is_named(
    words: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA says the same words where it can pin no more; the card has memory left then."""
    PretendedCard(monkeypatch, free=20, reserved=0)
    with (
        pytest.raises(UserError, match=r"out of system RAM: .*set offload\.optimizer"),
        budget_of(device, 12 * GIB, 8 * GIB).kept(),
    ):
        raise RuntimeError(words)
    with (
        pytest.raises(UserError, match="out of GPU memory"),
        budget_of(device, 12 * GIB, 8 * GIB).kept(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "free", "planned_for", "source", "note"),
    [
        ("1GiB", 20.0, 1.0, "train.vram", ""),
        ("12GiB", 5.6, 6.0, "the card's free memory", "other programs hold the rest (nvidia-smi"),
        ("25GiB", 20.0, 20.4, "the card's free memory", "more than the card's 24.00 GiB"),
        (None, 20.0, 20.4, "the card's free memory", ""),
    ],
)
def test_what_is_not_free_is_not_planned_for(
    tiny_sdxl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str | None,
    free: float,
    planned_for: float,
    source: str,
    note: str,
) -> None:
    """Neither planned for nor under the cap: a driver that is asked for more goes on in system RAM."""
    card = PretendedCard(monkeypatch, free=free, reserved=0)
    config = make_config(tiny_sdxl, tmp_path, tmp_path, train={} if wanted is None else {"vram": wanted})
    budget = planned(config, lambda: open_sdxl(tiny_sdxl), CUDA)[1]
    assert budget is not None
    assert budget.vram == pytest.approx(planned_for * GIB, abs=2)
    assert f"({source})" in budget.notes()[0]
    assert budget.shortage == "" if not note else note in budget.notes()[1]
    with budget.kept():
        assert card.caps[-1][0] == pytest.approx((planned_for - 0.4) / 24)


@pytest.mark.parametrize(
    ("name", "settings", "note"),
    [
        (
            "RTX 4090",
            {"train.layout": "joint"},
            ": close it for both images at once (1.0 s a step), or go on",
        ),
        ("RTX 4090", {"train.layout": "split"}, ": this run is planned as on a free card"),
        ("RTX 9999", {}, ": close it, and a faster plan may fit"),
    ],
)
def test_a_run_names_what_holds_memory_and_what_a_free_card_would_do(
    monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, str], note: str
) -> None:
    PretendedCard(monkeypatch, free=10, reserved=0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    holder = Holder("python (ComfyUI)", int(6.9 * GIB))
    monkeypatch.setattr(run_budget, "gpus", lambda: [Gpu(name, "GPU-12", 12 * GIB, 5 * GIB, [holder])])
    whole = plan_of("joint", 8 * GIB)._replace(settings=settings, ms=1000.0)
    monkeypatch.setattr(shipped, "find", lambda *asked: SimpleNamespace(chosen=whole))
    config = parse_config({"model": {"path": "m"}, "data": {"cache": "c"}, "train": {"output": "r"}})
    chosen = whole._replace(settings={"train.layout": "split"})
    said = run_budget._held(CUDA) + run_budget._whole_card(config, CUDA, chosen)
    assert said.startswith(f"python (ComfyUI) holds 6.9 of 12.0 GiB{note}")


def test_what_the_run_itself_holds_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = budget_of(CUDA, 20 * GIB, 17 * GIB)
    PretendedCard(monkeypatch, free=10, reserved=9.7)
    assert len(budget.notes()) == 1
    PretendedCard(monkeypatch, free=4, reserved=9.7)
    assert "needs 17.6 GiB of GPU memory and only 13.7 are free" in budget.notes()[1]
