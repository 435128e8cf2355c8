"""The side-by-side benchmark: providers agree before they are timed, and what is counted is right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import agreement, overhead, train_step
from bench.flops import model_flops
from bench.providers import switches
from bench.providers.diffusers_loop import DiffusersLoop
from bench.providers.engine import MapoFast, plan
from bench.providers.registry import PROVIDERS, names_for
from bench.providers.switches import SWITCHES
from bench.providers.task import Task
from mapo_fast.settings.schema import Config

CPU = torch.device("cpu")
FULL = Task("tiny", "full", 1, False, CPU)
LORA = replace(FULL, kind="lora", pairs=2, checkpointing=True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("task", [FULL, LORA], ids=["full", "lora"])
def test_all_providers_agree_with_the_truth(task: Task) -> None:
    for name in names_for(task):
        agreed = agreement.check(PROVIDERS[name](task))
        assert agreed.good, (name, agreed)
        assert agreed.gradient_allowed < 0.2, "a band this wide lets anything through"


def test_the_truth_is_not_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(
        agreement, "plain_outcome", lambda *_: found.append(torch.backends.cudnn.conv.fp32_precision)
    )
    before = torch.backends.cudnn.conv.fp32_precision
    agreement.truth(FULL, "mapo")
    assert (found, torch.backends.cudnn.conv.fp32_precision) == (["ieee"], before)
    assert before != "ieee"


@pytest.mark.slow
def test_an_fp8_base_agrees_with_the_truth() -> None:
    agreed = agreement.check(PROVIDERS["mapo_fast, fp8 base"](LORA))
    assert agreed.good, agreed
    assert agreed.gradient_error > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("able", [True, False])
def test_fp8_has_its_row_where_a_gpu_multiplies_it(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches, "in_fp8", lambda device: able)
    on_gpu = [replace(task, device=torch.device("cuda")) for task in (FULL, LORA)]
    full, lora = ({name for name in names_for(task) if "fp8" in name} for task in on_gpu)
    assert full == ({"mapo_fast, fp8 on"} if able else set())
    assert lora == ({"mapo_fast, fp8 base"} if able else set())


class WrongByHalves(DiffusersLoop):
    """Takes the rejected image for the chosen one."""

    def accumulate(self, inputs: object) -> Tensor:
        swapped = type(inputs)(*(torch.cat(list(reversed(x.chunk(2)))) for x in inputs))  # type: ignore
        return super().accumulate(swapped)


class WrongByALittle(MapoFast):
    """Leaves the time ids out."""

    def accumulate(self, inputs: object) -> Tensor:
        return super().accumulate(inputs._replace(time_ids=0 * inputs.time_ids))  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [WrongByHalves, WrongByALittle])
def test_what_disagrees_is_not_timed(
    wrong: type[DiffusersLoop], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train_step.PROVIDERS, "diffusers", wrong)
    monkeypatch.setattr("sys.argv", ["train_step", "--device", "cpu", "--provider", "diffusers"])
    assert train_step.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("no time: ")


@pytest.mark.slow
def test_a_row_has_what_the_table_needs() -> None:
    (row,) = train_step.measure(["diffusers"], FULL, blocks=1)
    assert row["pairs_per_s"] == pytest.approx(1e3 / row["ms"], rel=1e-3)
    assert sum(row["phases_ms"].values()) == pytest.approx(row["ms"], rel=0.1)
    assert all(ms > 0 for ms in row["phases_ms"].values())
    assert 0 < row["mfu"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "full", "--provider", "dpo_lora"], "--provider dpo_lora is for --kind lora"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train_step", *arguments])
    with pytest.raises(SystemExit):
        train_step.main()
    assert message in capsys.readouterr().err


def test_switches_are_the_other_way_than_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switches, "in_fp8", lambda device: True)
    on_cpu = {switch.label for switch in SWITCHES if switch.suits(FULL)}
    assert on_cpu == {"fused_ops on", "channels_last on", "compile on", "prefetch on"}
    on_gpu = {switch.label for switch in SWITCHES if switch.suits(replace(FULL, device=torch.device("cuda")))}
    assert {"fused_ops off", "cuda_graph on", "step after backward", "fp32 masters"} <= on_gpu


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"fused_step": True}, {}], ids=["fused", "not fused"])
def test_steps_follow_the_agreement_and_it_has_changed_nothing(
    changes: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the plan of a full fine-tune is fused."""

    def fused(*args: Any) -> Config:
        config = plan(*args)
        return config.model_copy(update={"train": config.train.model_copy(update=changes)})

    monkeypatch.setattr("bench.providers.engine.plan", fused)
    provider = MapoFast(FULL)
    before = [p.detach().clone() for p in provider.unet.parameters()]
    assert agreement.check(provider).good
    assert all(torch.equal(p, old) for p, old in zip(provider.unet.parameters(), before, strict=True))
    for step in range(2):
        provider.accumulate(provider.data(step))
        provider.update()
    assert not all(torch.equal(p, old) for p, old in zip(provider.unet.parameters(), before, strict=True))


@pytest.mark.slow
def test_counted_operations() -> None:
    mapo, dpo = (model_flops(FULL, objective) for objective in ("mapo", "dpo"))
    assert 1.3 < dpo / mapo < 1.35, "a reference is a third forward-sized pass"
    assert model_flops(replace(FULL, pairs=4), "mapo") == 4 * mapo
    assert model_flops(replace(FULL, kind="lora"), "mapo") < mapo


@pytest.mark.slow
def test_the_engine_keeps_up_with_a_bare_loop() -> None:
    row = overhead.run(clear_of=overhead.TARGET)
    assert row["ratio"] >= overhead.TARGET, row


@pytest.mark.slow
def test_a_slow_engine_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "LEAST", 8)

    class Slow(DiffusersLoop):
        def update(self) -> None:
            super().update()
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass

    row = overhead.measure(Slow(FULL), DiffusersLoop(FULL), precise=0.1)
    assert row["ratio"] < overhead.TARGET
