"""Cards, sizes, composition against full traces, and what the search keeps, chooses and refuses."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from mapo_fast.hardware import host as planner_host
from mapo_fast.hardware.allocator import EXPANDABLE, Rules
from mapo_fast.hardware.cards import CARDS, card_with, usable_bytes, vram_for
from mapo_fast.hardware.host import Host, _container_rooms, host
from mapo_fast.hardware.names import find_card
from mapo_fast.models.vae import decode_bytes
from mapo_fast.planner import search as planner_search
from mapo_fast.planner import store
from mapo_fast.planner.family import BLOCKS, Family, prefixes, stated
from mapo_fast.planner.picture import check_picture
from mapo_fast.planner.plan import Plan
from mapo_fast.planner.replay import Allocator, cublas_workspace, reserved
from mapo_fast.planner.search import search
from mapo_fast.planner.stages import Vae
from mapo_fast.planner.timeline import simulate
from mapo_fast.planner.trace import record_step
from mapo_fast.planner.windows import compose, cut
from mapo_fast.settings.load import with_settings
from mapo_fast.settings.schema import Config
from mapo_fast.settings.table import planned
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB, parse_size, size_text
from tests.planner.test_recorder import REDUCED, TWO_BLOCKS, settings
from tests.settings.test_rules import stated_together
from tests.tiers import some_of

PLENTY = Host(64 * GIB, 32 * GIB)
RTX = find_card("RTX 4090")


@pytest.fixture(autouse=True)
def _own_cache(traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' cache folder, and no worker processes."""
    monkeypatch.setattr(store, "folder", lambda: traces)
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture
def exact_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduced UNet is smaller than a CUDA context."""
    monkeypatch.setattr(planner_search, "usable_bytes", lambda vram: vram)


def test_the_slowest_card_with_enough_memory_is_assumed() -> None:
    assert card_with(24 * GIB).name == "RTX 3090"
    assert card_with(200 * GIB) in CARDS
    assert card_with(24 * GIB, capability=89).name == "RTX 4090"
    assert card_with(200 * GIB, capability=89).name == "H200"
    assert usable_bytes(24 * GIB) < 23.5 * GIB


@pytest.mark.parametrize("peak", [1, 3 * GIB + 17, 21 * GIB // 2])
def test_a_proposed_size_is_enough(peak: int) -> None:
    assert usable_bytes(parse_size(size_text(vram_for(peak)), "--vram")) >= peak


def test_memory_limits_of_containers_count(tmp_path: Path) -> None:
    """Less what they hold; of the process's own group and of all above it, in both versions of groups."""

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")

    assert _container_rooms(tmp_path) == []
    write("proc/self/cgroup", "1:name=systemd:/x\n0::/jobs/one")
    write("sys/fs/cgroup/jobs/one/memory.max", "max")
    write("sys/fs/cgroup/jobs/one/memory.high", "7000")
    write("sys/fs/cgroup/jobs/memory.max", "9000")
    write("sys/fs/memory.max", "1")
    assert sorted(_container_rooms(tmp_path)) == [7000, 9000]
    write("sys/fs/cgroup/jobs/one/memory.current", "3000")
    write("sys/fs/cgroup/jobs/one/memory.stat", "anon 2500\ninactive_file 500")
    write("sys/fs/cgroup/jobs/memory.current", "9500")
    assert sorted(_container_rooms(tmp_path)) == [0, 4500]
    write("proc/self/cgroup", "5:cpu,memory:/docker/abc\n2:cpuset:/docker/abc")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "8000")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "5000")
    write("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 2000")
    assert _container_rooms(tmp_path) == [5000]


@pytest.fixture
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB, of which 40 are free and this process holds one; in no container."""
    memory = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB))
    monkeypatch.setattr(planner_host.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(planner_host.psutil, "Process", lambda: process)
    monkeypatch.setattr(planner_host, "_container_rooms", lambda root: [])


@pytest.mark.usefixtures("busy_machine")
def test_a_container_is_not_planned_for_the_whole_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_host, "_container_rooms", lambda root: [GIB, 2 * GIB])
    assert host(None).ram == GIB + GIB  # and what the process holds
    assert host(3 * GIB).ram == 3 * GIB


@pytest.mark.usefixtures("busy_machine")
def test_ram_that_other_programs_hold_is_not_planned_for() -> None:
    assert host(None).ram == 41 * GIB
    assert host(None, processes=4).ram == 11 * GIB


def test_prefixes_hold_exactly_the_chosen_blocks() -> None:
    blocks = {f"down_blocks.{i}.resnets.{j}" for i in (1, 10) for j in (0, 1)} | {"mid_block.resnets.1"}
    chosen = {"down_blocks.1.resnets.0", "down_blocks.1.resnets.1", "mid_block.resnets.1"}
    found = prefixes(chosen, blocks)
    assert found == ["down_blocks.1", "mid_block"]
    assert prefixes(blocks, blocks) == ["down_blocks", "mid_block"]


@pytest.mark.slow
def test_a_composed_plan_is_its_full_trace() -> None:
    """Blocks of one level checkpointed, from traces with all and with none."""
    fused = {"fused_step": True}
    plain = record_step(
        settings(train={**fused, "layout": "joint", "gradient_checkpointing": False}), REDUCED
    )
    split = record_step(settings(train={**fused, "layout": "split"}), REDUCED)
    modes = {
        "plain": cut(plain, RTX, keep_gradients=False),
        "split": cut(split, RTX, keep_gradients=False),
    }
    freed = {p.block: "plain" for p in modes["plain"].pieces.values() if p.block.startswith("up_blocks")}
    assert freed
    made = compose(modes, freed, "split")
    lasting = sum(int(split.row(name).max()) for name in ("parameters", "states"))
    lasting += int(split.row("staging").min())
    names = ["down_blocks", "mid_block"]
    full = record_step(settings(train={**fused, "layout": "split", "gradient_checkpointing": names}), REDUCED)
    assert lasting + made.peak == pytest.approx(full.peak, rel=0.01)
    assert 1e3 * (made.forward + made.backward) == pytest.approx(simulate(full, RTX).step, rel=0.05)


@pytest.mark.slow
def test_a_composed_step_lasts_as_long_as_all_its_micro_batches() -> None:
    """Composed as traced: 16 micro-batches take nearly 16 times as long as one."""
    state = {"layout": "split", "gradient_checkpointing": True}
    times = {}
    for count in (1, 16):
        config = settings(train={**state, "fused_step": False, "accumulation": count})
        with closing(store.Tracing()) as tracing:
            family = Family(config, {}, REDUCED, RTX, GIB, tracing)
            family.frugal()
            composed = next(p for p in family.plans() if "cpu" not in p.settings.values())
            traced, _ = family.traced(composed)
        assert composed.accumulation == traced.accumulation == count
        assert composed.ms == pytest.approx(traced.ms, rel=0.1)
        times[count] = traced
    assert times[16].ms == pytest.approx(16 * times[1].ms, rel=0.15)
    assert " s a step of 16 micro-batches (" in times[16].time
    assert "micro-batches" not in times[1].time


@pytest.mark.slow
@pytest.mark.parametrize("rules", some_of([Rules(), EXPANDABLE], [EXPANDABLE]))
def test_a_plan_reserves_no_more_than_the_room_it_was_chosen_for(rules: Rules) -> None:
    """Replayed at just that cap: by default less fits, and a plan that fits runs."""
    large = settings(data={"resolution": 512})
    room = int(0.8 * _chosen(large, GIB).reserved)
    found = search(large, REDUCED, RTX, vram_for(room), PLENTY, rules=rules)
    assert found.chosen is not None
    assert found.trace is not None
    assert found.chosen.peak < found.chosen.reserved <= found.usable
    allocator = Allocator(rules, cublas_workspace(RTX.capability))
    assert reserved(found.trace, allocator, found.usable) <= found.usable


@pytest.mark.slow
def test_a_streamed_copy_of_the_start_model_is_foreseen() -> None:
    """Its memory, its copies and its forward pass, without a trace of the plan itself."""
    config = settings(
        train={"layout": "split", "fused_step": True, "gradient_checkpointing": True},
        objective={"name": "dpo", "reference": "copy"},
        offload=dict.fromkeys(("optimizer", "weights", "activations"), "cpu"),
    )
    with closing(store.Tracing()) as tracing:
        family = Family(config, {}, REDUCED, RTX, GIB, tracing)
        family.frugal()
        (composed,) = family.plans()
        traced, _ = family.traced(composed)
    assert composed.peak == pytest.approx(traced.peak, rel=0.01)
    assert composed.pinned == pytest.approx(traced.pinned, rel=0.01)
    assert composed.ms == pytest.approx(traced.ms, rel=0.2)
    weights = family._loaded()
    assert weights < 21 * 2**20, "of one UNet: they are loaded one after the other"
    assert traced.pinned > 1.5 * weights


@pytest.mark.slow
def test_memory_that_lasts_buys_no_recomputation(exact_budget: None) -> None:
    outcome = search(settings(), REDUCED, RTX, GIB, PLENTY)
    assert outcome.chosen is not None
    assert outcome.chosen.settings[BLOCKS] is False
    assert outcome.chosen.traced
    assert not any(value == "cpu" for value in outcome.chosen.settings.values())


@pytest.mark.slow
def test_little_memory_moves_things_off_the_card_and_little_more_is_refused(exact_budget: None) -> None:
    rich = search(settings(), REDUCED, RTX, GIB, PLENTY)
    least = min(loser.plan.reserved for loser in rich.others)
    poor = search(settings(), REDUCED, RTX, int(least * 1.02), PLENTY)
    assert poor.chosen is not None
    assert poor.chosen.reserved <= least * 1.02
    assert poor.chosen.settings["offload.weights"] == "cpu"
    applied = poor.chosen.apply(settings())
    assert applied.offload.weights == "cpu"
    none = search(settings(), REDUCED, RTX, least // 2, PLENTY)
    assert none.chosen is None
    pinned = search(settings(), REDUCED, RTX, int(least * 1.02), Host(64 * GIB, 0))
    assert pinned.chosen is None
    assert any("system RAM" in loser.reason for loser in pinned.others)


def test_stated_settings_are_kept(exact_budget: None) -> None:
    config = settings(train={"layout": "split", "fused_step": False, "gradient_checkpointing": True})
    assert set(stated(config)) == {"train.layout", "train.fused_step", BLOCKS}
    outcome = search(config, REDUCED, RTX, GIB, PLENTY)
    assert outcome.chosen is not None
    assert outcome.chosen.settings["train.layout"] == "split"
    assert outcome.chosen.settings[BLOCKS] is True
    assert outcome.chosen.settings["train.fused_step"] is False


@pytest.mark.slow
def test_named_blocks_are_kept_and_have_to_exist(exact_budget: None) -> None:
    outcome = search(settings(train={"gradient_checkpointing": ["mid_block"]}), REDUCED, RTX, GIB, PLENTY)
    assert outcome.chosen is not None
    assert outcome.chosen.settings[BLOCKS] == ["mid_block"]
    with pytest.raises(UserError, match="nope"):
        search(settings(train={"gradient_checkpointing": ["nope"]}), REDUCED, RTX, GIB, PLENTY)


def test_pictures_are_refused_before_the_search(tmp_path: Path) -> None:
    for wrong in (tmp_path / "missing" / "memory.png", tmp_path / "memory.docx"):
        with pytest.raises(UserError, match="--plot"):
            check_picture(wrong)
    check_picture(tmp_path / "memory.png")


@pytest.mark.slow
@pytest.mark.usefixtures("exact_budget")
def test_where_no_kernel_runs_eager_operators_are_planned() -> None:
    config = settings(train={"layout": "joint", "gradient_checkpointing": False, "fused_step": False})
    peaks = []
    for kernels in (True, False):
        found = search(config, REDUCED, RTX._replace(kernels=kernels), 24 * GIB, PLENTY)
        assert found.chosen is not None
        peaks.append(found.chosen.peak)
        again = record_step(config, REDUCED, kernels=kernels).peak  # tables are made anew where memory moves
        assert found.chosen.peak == pytest.approx(again, rel=0.01)
    assert peaks[0] < peaks[1]


@pytest.mark.slow
def test_traces_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    config = settings(train={"layout": "joint", "gradient_checkpointing": False})
    (made,) = store.traces([config], REDUCED)
    monkeypatch.setattr(store, "_record", lambda work: pytest.fail("traced again"))
    (read,) = store.traces([config], REDUCED)
    assert read.peak == made.peak
    assert read.marks == made.marks


def test_tracing_does_not_run_the_users_script_again() -> None:
    main = sys.modules["__main__"]
    with store._no_main():
        assert not {"init_main_from_name", "init_main_from_path"} & get_preparation_data("worker").keys()
    assert sys.modules["__main__"] is main


@pytest.mark.slow
def test_traces_are_made_here_where_workers_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(ThreadPoolExecutor):
        def __init__(self, workers: int, mp_context: object) -> None:
            super().__init__(workers)

        def submit(self, *_: object) -> NoReturn:  # type: ignore[override]
            raise BrokenProcessPool

    monkeypatch.setattr(store, "folder", lambda: tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(store, "ProcessPoolExecutor", Dead)
    made = [record_step(settings(), REDUCED)]
    monkeypatch.setattr(store, "_record", lambda work: made[0])
    assert store.traces([settings(), settings(train={"layout": "sequential"})], REDUCED) == made * 2


@pytest.mark.slow
def test_longer_prompts_and_xformers_need_more() -> None:
    def saved(attention: str, max_tokens: int) -> int:
        train = {"layout": "joint", "gradient_checkpointing": False, "attention": attention}
        trace = record_step(settings(train=train, data={"max_tokens": max_tokens}), REDUCED)
        return int(trace.row("saved").max())

    plain = saved("sdpa", 77)
    assert saved("sdpa", 225) > plain
    assert saved("xformers", 77) > plain


@pytest.mark.slow
def test_previews_need_room_beside_what_lies_on_the_card(exact_budget: None) -> None:
    """The VAE comes when a step's activations are gone; a plan without room for it is not chosen."""
    asked = settings(preview={"prompts": ["a square"]})
    small, large = (Vae({"block_out_channels": [1, 1]}, nbytes) for nbytes in (1, GIB))
    chosen = search(asked, REDUCED, RTX, GIB, PLENTY, vae=small).chosen
    assert chosen is not None
    resident = sum(chosen.device[name] for name in ("parameters", "states", "staging"))
    found = search(asked, REDUCED, RTX, GIB, PLENTY, vae=small)
    assert found.stages["previews"] == resident + 1 + decode_bytes(small.config, 128**2, 4)
    refused = search(asked, REDUCED, RTX, GIB, PLENTY, vae=large)
    assert refused.chosen is None
    assert any("for a preview's VAE" in loser.reason for loser in refused.others)
    assert search(settings(), REDUCED, RTX, GIB, PLENTY, vae=large).chosen is not None


@pytest.mark.slow
def test_what_a_step_makes_is_there_twice_with_cuda_graphs(exact_budget: None) -> None:
    """The graphs' pool stays reserved during evaluations, previews and the first step of a shape."""
    asked = settings(speed={"cuda_graph": True}, preview={"prompts": ["a square"]})
    eager = search(settings(), REDUCED, RTX, GIB, PLENTY)
    found = search(asked, REDUCED, RTX, GIB, PLENTY)
    assert eager.chosen is not None
    assert found.chosen is not None
    assert found.trace is not None
    made = found.trace.peak - found.trace.lasting
    assert made > found.trace.peak // 10
    assert eager.chosen.settings == found.chosen.settings
    assert found.chosen.device["graph buffers"] == made
    assert found.chosen.peak == sum(found.chosen.device.values()) == eager.chosen.peak + made
    assert found.stages["previews"] == eager.stages["previews"] + made
    assert found.chosen.ms < 0.8 * eager.chosen.ms, "the host issues nothing"


@pytest.mark.slow
def test_blocks_are_recomputed_where_two_steps_do_not_fit(exact_budget: None) -> None:
    """Composed as traced; nothing is offloaded, which no graph holds."""
    large = {"data": {"resolution": 512}}
    asked = settings(speed={"cuda_graph": True}, **large)
    room = int(0.9 * _chosen(asked, GIB, TWO_BLOCKS).reserved)
    assert _chosen(settings(**large), room, TWO_BLOCKS).settings[BLOCKS] is False
    plan = _chosen(asked, room, TWO_BLOCKS)
    assert plan.reserved <= room
    assert plan.settings[BLOCKS] is not False
    with closing(store.Tracing()) as tracing:
        family = Family(asked, {}, TWO_BLOCKS, RTX, room, tracing)
        family.frugal()
        for composed in family.plans():
            assert "cpu" not in composed.settings.values()
            assert composed.peak == pytest.approx(family.traced(composed)[0].peak, rel=0.02)


@pytest.mark.slow
def test_without_graphs_is_the_first_advice(exact_budget: None) -> None:
    asked = settings(speed={"cuda_graph": True})
    with closing(store.Tracing()) as tracing:
        least = Family(asked, {}, REDUCED, RTX, GIB, tracing).frugal().reserved
    outcome = search(asked, REDUCED, RTX, int(0.9 * least), PLENTY)
    assert outcome.chosen is None
    assert outcome.advice.startswith("speed.cuda_graph = false would fit")


@pytest.mark.slow
def test_too_little_system_ram_says_how_much_would_do_and_that_does(exact_budget: None) -> None:
    refused = search(settings(), REDUCED, RTX, GIB, Host(GIB, GIB // 2))
    assert refused.chosen is None
    found = re.fullmatch(r"(\S+) of system RAM would do \((.*)\), 1.00GiB are free", refused.advice)
    assert found is not None
    enough = parse_size(found[1], "--ram")
    assert search(settings(), REDUCED, RTX, GIB, Host(enough, enough // 2)).chosen is not None
    less = enough - GIB // 50
    assert search(settings(), REDUCED, RTX, GIB, Host(less, less // 2)).chosen is None


@pytest.mark.slow
def test_a_stated_offload_without_system_ram_for_it_is_what_to_give_up(exact_budget: None) -> None:
    """The plan with all on the host has no room there either; another one has."""
    outcome = search(settings(offload={"weights": "cpu"}), REDUCED, RTX, GIB, Host(64 * GIB, 1))
    assert outcome.chosen is None
    assert outcome.advice.startswith('without offload.weights = "cpu" would fit')


@pytest.mark.slow
def test_a_stated_optimizer_with_larger_states_is_what_to_give_up(exact_budget: None) -> None:
    config = settings(optim={"name": "adamw"}, offload={"optimizer": "gpu", "weights": "gpu"})
    with closing(store.Tracing()) as tracing:
        least = Family(config, {}, REDUCED, RTX, GIB, tracing).frugal().reserved
    outcome = search(config, REDUCED, RTX, int(0.9 * least), Host(64 * GIB, 1))
    assert outcome.chosen is None
    assert outcome.advice.startswith('optim.name = "adamw8bit" would fit')


def _chosen(config: Config, vram: int, unet_config: dict[str, Any] = REDUCED) -> Plan:
    plan = search(config, unet_config, RTX, vram, PLENTY).chosen
    assert plan is not None
    return plan


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("count", [1, 2])
def test_whatever_is_stated_there_are_plans_to_compose_and_traces_to_compose_them_from(
    count: int, kind: str
) -> None:
    for some in stated_together(count):
        try:
            config = with_settings(settings(adapter={"kind": kind}), some)
        except UserError:
            continue  # tests/settings/test_rules.py
        family = Family(config, {}, REDUCED, RTX, GIB, store.Tracing())
        assert family.combinations
        for combination in family.combinations:
            assert not {k: v for k, v in some.items() if k != BLOCKS}.items() - combination.items()
            assert set(family._modes(combination)) <= set(family.names)
        moved = any("cpu" in (s["offload.weights"], s["offload.optimizer"]) for s in family.combinations)
        assert any("offloaded" not in name for name in family.names)
        assert any("offloaded" in name for name in family.names) or not moved
        for name in family.names:
            with_settings(config, family._settings(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("full", {"train.layout": "split", "offload.activations": "cpu", BLOCKS: True}),
        ("full", {BLOCKS: False, "offload.optimizer": "cpu"}),
        pytest.param("lora", {"offload.optimizer": "cpu"}, marks=pytest.mark.proof),
        ("lora", {"train.layout": "sequential", "offload.weights": "cpu"}),
    ],
    ids=str,
)
def test_what_is_stated_is_kept_where_it_is_not_best(
    kind: str, some: dict[str, Any], exact_budget: None
) -> None:
    config = with_settings(settings(adapter={"kind": kind}), some)
    plan = search(config, REDUCED, RTX, GIB, PLENTY).chosen
    assert plan is not None
    assert plan.traced
    assert not some.items() - {k: v for k, v in plan.settings.items() if k in some}.items()
    assert stated(plan.apply(config)).keys() == planned("exact").keys()


@pytest.mark.slow
def test_what_does_not_fit_costs_one_trace(exact_budget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights alone are too many: nothing else of the family is traced."""
    config = settings(
        adapter={"kind": "lora", "base": "dense"}, offload={"weights": "gpu"}, data={"resolution": 64}
    )
    asked: list[str] = []
    real = store._record
    monkeypatch.setattr(store, "_record", lambda work: asked.append(work[1]) or real(work))
    monkeypatch.setattr(planner_search._Search, "_attempts", lambda search: iter(()))
    outcome = search(config, REDUCED, RTX, 1 << 20, PLENTY)
    assert outcome.chosen is None
    assert len(asked) == 1
    assert outcome.enough > 1 << 20
