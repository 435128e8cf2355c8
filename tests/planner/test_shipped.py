"""The table of plans: what is looked up is what is computed, and nothing else is looked up."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from mapo_fast.hardware.cards import CARDS
from mapo_fast.hardware.holders import Gpu, Holder
from mapo_fast.hardware.host import Host, host
from mapo_fast.models.full_size import SDXL_UNET
from mapo_fast.planner import answer, ask, models, shipped, shipped_traces, store, table
from mapo_fast.planner.plan import Plan, PlanResult
from mapo_fast.planner.question import question
from mapo_fast.planner.report import held_note
from mapo_fast.planner.stages import SDXL_VAE
from mapo_fast.settings.presets import PRESETS
from mapo_fast.util.sizes import GIB

RAM = host(32 * GIB)
SETTINGS = {"train.layout": "split", "train.gradient_checkpointing": ["mid_block"]}


def outcome(plan: Plan | None) -> PlanResult:
    card = next(card for card in CARDS if card.name == "RTX 3060 12GB")
    return PlanResult(card, 12 * GIB, 11 * GIB, RAM, plan, None, [], {"prepare": 3}, "", "", 0)


CHOSEN = Plan(SETTINGS, {"parameters": 5 * GIB}, 5 * GIB, 6 * GIB, 1, 2, 1234.0, True, ("a = 1",), 4)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlanResult:
    """A table with one answer, for the preset `lora` on an RTX 3060 with 12 GiB."""
    monkeypatch.setattr(shipped, "FILE", tmp_path / "plans.json")
    monkeypatch.setattr(shipped_traces, "FILE", tmp_path / "traces.zip")
    monkeypatch.setattr(table, "PRESETS", ("lora",))
    monkeypatch.setattr(table, "SIZES", ())
    monkeypatch.setattr(table, "CARDS", [outcome(None).card])
    monkeypatch.setattr(table, "search", lambda *asked, **_: outcome(CHOSEN))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shipped, "in_wsl", lambda: False)
    monkeypatch.setattr(ask, "search", lambda *asked, **_: "computed")
    for name in shipped._ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    table.main([])
    return replace(outcome(CHOSEN), usable=answer.plan(config(), card="RTX 3060 12GB", model="sdxl").usable)


def config(*settings: str) -> Any:
    return question(None, "lora", settings, None)[0]


def test_what_is_looked_up_is_what_was_computed(made: PlanResult) -> None:
    assert answer.plan(config(), card="RTX 3060 12GB", model="sdxl") == made
    steps = config("train.steps=7", "optim.lr=1e-6", "preview.every=3")  # they change no plan
    assert answer.plan(steps, card="RTX 3060 12GB", model="sdxl") == made


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        (["train.accumulation=1"], {}),
        (["data.resolution=768"], {}),
        (["train.layout=split"], {}),
        (["adapter.base=dense"], {}),
        (["preview.prompts=[]"], {}),
        ([], {"ram": "64"}),
        ([], {"vram": "11.5"}),
        ([], {"card": "RTX 4070"}),
        ([], {"traced": True}),
    ],
    ids=str,
)
def test_other_questions_are_computed(made: PlanResult, settings: list[str], asked: dict[str, Any]) -> None:
    given = {"card": "RTX 3060 12GB", "model": "sdxl"} | asked
    assert answer.plan(config(*settings), **given) == "computed"


def test_a_model_that_is_sdxl_is_looked_up_too(made: PlanResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a config as diffusers writes it, defaults and all."""
    with torch.device("meta"):
        full = dict(UNet2DConditionModel.from_config(SDXL_UNET | {"layers_per_block": 1}).config)
    for change, expected in (({"layers_per_block": 2}, True), ({}, False)):
        written = json.loads(json.dumps({**full, **change, "sample_size": 96, "upcast_attention": None}))
        monkeypatch.setattr(models, "open_model", lambda *_, **__: Folder(written))  # noqa: B023
        monkeypatch.setattr(models, "with_start", lambda config, *_: config)
        monkeypatch.setattr(models, "vae_of", lambda _: SDXL_VAE)
        found = answer.plan(config(), card="RTX 3060 12GB", model="juggernaut")
        assert found == (made if expected else "computed")


class Folder:
    start = None

    def __init__(self, unet: dict[str, Any]) -> None:
        self.unet, self.parts = unet, {"unet": None}

    def config(self, part: str) -> dict[str, Any]:
        return self.unet


def test_a_table_of_other_code_or_for_another_system_is_not_used(
    made: PlanResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked() -> Any:
        return answer.plan(config(), card="RTX 3060 12GB", model="sdxl")

    with monkeypatch.context() as patch:
        patch.setattr(shipped, "files", lambda: "comments have changed")
        assert asked() == made
        patch.setattr(shipped, "code", lambda: "code has changed")
        assert asked() == "computed"
    for change in (
        lambda patch: patch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128"),
        lambda patch: patch.setattr(sys, "platform", "win32"),
        lambda patch: shipped.FILE.write_text("{"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            assert asked() == "computed"


def test_comments_and_docstrings_are_no_code(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    codes = []
    for text in ('"""A."""\nX = 1  # one\n"""Of X."""\n', '"""B."""\nX = 1\n', "X = 2\n"):
        file.write_text(text)
        codes.append(shipped._code(file))
    assert codes[0] == codes[1] != codes[2]


def test_rows_are_kept_where_no_answer_has_changed(
    made: PlanResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "CARDS", [])
    monkeypatch.setattr(table, "holds", lambda table, asked: True)
    table.main([])
    assert len(shipped.read()["answers"]) == 1
    monkeypatch.setattr(table, "holds", lambda table, asked: False)
    table.main([])
    assert not shipped.read()["answers"]


def test_every_preset_is_asked_for_every_size_and_every_card_that_can_train_it() -> None:
    asked = list(table.questions("lora"))
    names = {card.name for _, card, _ in asked}
    assert {card.name for card in CARDS if card.capability >= 80} <= names
    assert {vram // GIB for _, _, vram in asked} >= set(table.SIZES)
    keys = {shipped.key(*one, RAM) for preset in PRESETS for one in table.questions(preset)}
    assert len(keys) > len(PRESETS) * len(table.SIZES)


def test_pinnable_memory_of_another_system_is_another_question() -> None:
    asked = next(table.questions("lora"))
    assert shipped.key(*asked, RAM) != shipped.key(*asked, Host(RAM.ram, RAM.ram // 2))


def test_who_holds_memory_that_a_plan_needs_is_named() -> None:
    gpu = Gpu("RTX 3060", "GPU-1", 12 * GIB, 5 * GIB, [Holder("python (ComfyUI)", int(6.9 * GIB))])
    assert held_note(outcome(CHOSEN), gpu) == (
        "python (ComfyUI) holds 6.9 of 12.0 GiB: close it, or see which slower plan fits next to it with "
        'mapo-fast plan --card "RTX 3060 12GB" --vram 5.0'
    )
    assert held_note(outcome(CHOSEN), gpu._replace(free=7 * GIB)) == ""
    assert held_note(outcome(CHOSEN), gpu._replace(holders=[])) == ""


@pytest.mark.slow
def test_looking_up_imports_neither_torch_nor_diffusers() -> None:
    code = """
import sys
from mapo_fast.hardware.host import host
from mapo_fast.planner import answer, report, shipped
from mapo_fast.planner.question import question
config, run = question(None, "lora", [], None)
shipped.find(config, *answer.card_and_memory(config, "RTX 4090", None), host(2**35))
print([m for m in ("torch", "numpy", "diffusers", "transformers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_table_is_that_of_this_code() -> None:
    assert shipped.is_fresh(shipped.read()), (
        "planning or training code has changed: python -m mapo_fast.planner.table"
    )


@pytest.mark.slow
def test_the_table_has_what_is_computed_now() -> None:
    """Rows of one preset share most of their traces."""
    assert table.holds(shipped.read(), [("lora", 24), ("lora", 48), ("lora", 80)])


@pytest.mark.slow
@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "full"])
def test_other_questions_about_a_preset_need_no_trace(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another size of GPU memory and other numbers, on Windows: at most a minute of CPU.

    Not of `full`, whose best plan may recompute other blocks there than on any size in the table.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    monkeypatch.setattr(store, "_record", lambda work: pytest.fail("a trace was made"))
    asked, _ = question(None, preset, ["objective.beta=0.02", "train.accumulation=3"], None)
    before = time.process_time()
    found = answer.plan(asked, card=None, vram="23.5", ram="64", model="sdxl")
    assert found.chosen is not None
    assert time.process_time() - before < 60
