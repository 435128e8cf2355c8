"""Several processes train what one trains: the same pairs, gradients, checkpoints and stops."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from torch import Tensor

from mapo_fast import MaPOLoss, cli
from mapo_fast.data.cache import PairCache
from mapo_fast.engine import reference
from mapo_fast.engine.build import prepare_unet
from mapo_fast.engine.engine import Engine
from mapo_fast.engine.precision import Precision
from mapo_fast.engine.processes import Processes, ReportedError, environment, in_processes, joined
from mapo_fast.engine.reference import PrecomputedErrors
from mapo_fast.engine.step import PairInputs
from mapo_fast.planner.plan import Plan
from mapo_fast.run import budget
from mapo_fast.run import train as training
from mapo_fast.run.feed import Feed
from mapo_fast.run.folder import FitResult
from mapo_fast.run.log import read_log
from mapo_fast.run.trainer import Trainer
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.schema import Config
from mapo_fast.util.errors import MachineError, UserError
from mapo_fast.util.sealed import write_sealed
from mapo_fast.util.tensorparts import whole
from tests.engine.pair_steps import pair_of_inputs
from tests.processes import together
from tests.training import make_cache, make_config, settings
from tests.unets import make_unet

pytestmark = [
    pytest.mark.forks,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

FP64 = Precision(torch.float64, torch.float64, None, scaled=False)
CPU = torch.device("cpu")
ALONE = Processes()
ROOT = Path(__file__).parents[2]
SHARDED = {"train": {"shard": True}}


# --- Connecting, and losing each other ---


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "one"}, r"RANK = 'one', no number"),
        ({"WORLD_SIZE": "9" * 5000}, r"WORLD_SIZE = '9{90,}\.\.\.9{90,}', no number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK = 2 of WORLD_SIZE = 2"),
        ({"LOCAL_RANK": "1"}, r"LOCAL_RANK = 1 of LOCAL_WORLD_SIZE = 1"),
    ],
)
def test_an_environment_that_no_launcher_sets_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        environment()


def test_a_launch_without_an_address_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    lonely = joined(Processes(0, 2, 0, 2), CPU)
    with pytest.raises(UserError, match=r"the 2 processes cannot be connected: .*MASTER_ADDR"), lonely:
        pass


@pytest.mark.slow
def test_the_survivor_of_a_killed_process_says_so_in_one_line(tmp_path: Path) -> None:
    def call() -> str | None:
        processes = environment()
        try:
            with joined(processes, CPU):
                processes.sum_(torch.ones(1))
                if processes.rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                processes.sum_(torch.ones(1))
        except MachineError as error:
            return str(error)
        return None

    (said,) = together(tmp_path, call, killed=(1,))
    assert said.startswith("process 0 has lost the others, one of which has ended (process 1, pid ")
    assert "--resume" in said
    assert "\n" not in said


# --- One step of the engine ---


def config_of(kind: str, layout: str, checkpointing: bool, shard: bool) -> Config:
    return parse_config(
        {
            "model": {"path": "unused"},
            "data": {"cache": "unused"},
            "train": {
                "output": "unused",
                "precision": "fp32",
                "layout": layout,
                "gradient_checkpointing": checkpointing,
                "shard": shard,
            },
            "adapter": {"kind": kind, "rank": 4},
            "optim": {"lr": 1e-3},
        }
    )


def part(inputs: PairInputs, pairs: slice) -> PairInputs:
    """Some of the pairs, chosen half first."""
    return PairInputs(*(torch.cat([half[pairs] for half in x.chunk(2)]) for x in inputs))


PARTS = (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6))
"""Micro-batches of a step over six pairs, of different sizes."""


def engine_of(config: Config, processes: Processes) -> Engine:
    parts = prepare_unet(make_unet("sdxl"), config, FP64, CPU, processes)
    return Engine(config, parts, MaPOLoss(), FP64, CPU, processes)


def one_step(engine: Engine) -> tuple[dict[str, Tensor], Tensor]:
    """A step's gradients as the optimizer finds them, and their norm."""
    found: dict[str, Tensor] = {}
    step, processes = engine.optimizer.step, engine.processes

    def look() -> Tensor:
        gradients = {n: p.grad for n, p in engine.unet.named_parameters() if p.grad is not None}
        found.update((n, g.clone()) for n, g in whole(gradients, keep=True).items())
        return step()

    engine.optimizer.step = look  # type: ignore[method-assign]
    inputs = pair_of_inputs(6)
    for pairs in PARTS[processes.rank :: processes.size]:
        engine.accumulate(part(inputs, pairs), (pairs.stop - pairs.start) / 6)
    return found, engine.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "checkpointing", "shard"),
    [
        ("full", "split", True, False),
        ("lora", "sequential", False, False),
        ("full", "split", True, True),
        pytest.param("full", "sequential", True, True, marks=pytest.mark.proof),
    ],
)
def test_two_processes_give_the_gradients_of_one(
    tmp_path: Path, kind: str, layout: str, checkpointing: bool, shard: bool
) -> None:
    config = config_of(kind, layout, checkpointing, shard)

    def run() -> Any:
        with joined(environment(), CPU):
            return one_step(engine_of(config, environment()))

    truth, norm = one_step(engine_of(config, ALONE))
    for gradients, found in together(tmp_path, run):
        assert gradients.keys() == truth.keys()
        for name, gradient in gradients.items():
            assert (gradient - truth[name]).norm() <= 1e-10 * truth[name].norm(), name
        assert abs(found - norm) <= 1e-10 * norm


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_what_is_not_finite_in_one_process_is_skipped_by_all(tmp_path: Path, shard: bool) -> None:
    config = config_of("full", "joint", False, shard)

    def run() -> Any:
        processes = environment()
        with joined(processes, CPU):
            engine = engine_of(config, processes)
            before = whole({n: p.detach().clone() for n, p in engine.unet.named_parameters()}, keep=True)
            inputs = pair_of_inputs(1)
            if processes.rank == 1:
                inputs.target.fill_(float("nan"))
            engine.accumulate(inputs, 0.5)
            engine.finish()
            after = whole({n: p.detach() for n, p in engine.unet.named_parameters()}, keep=True)
            same = all(torch.equal(before[n], after[n]) for n in before)
            return same, int(engine.optimizer.skipped), int(engine.optimizer.skipped_in_a_row)

    assert together(tmp_path, run) == [(True, 1, 1)] * 2


# --- Whole runs ---


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_sdxl, tmp_path_factory.mktemp("data"))


@pytest.fixture
def make(tiny_sdxl: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Configs of short runs, which go in fp64."""
    monkeypatch.setattr(training, "choose_precision", lambda config, device: FP64)

    def build(output: Path, **sections: dict[str, Any]) -> Config:
        train = {"evaluate_pairs": 3, **sections.pop("train", {})}
        return make_config(tiny_sdxl, cache, output, train=train, **sections)

    return build


def result(output: Path) -> dict[str, Tensor]:
    return load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    for name, tensor in found.items():
        assert (tensor - truth[name]).norm() <= 1e-10 * truth[name].norm().clamp(min=1e-6), name


OBJECTIVES = {False: {"name": "dpo", "reference": "precomputed"}, True: {"name": "mapo"}}
"""What runs train whose model is whole in each process, and what those that split it."""


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: bool
) -> None:
    """The run is that of one process with two micro-batches a step."""
    from diffusers import UNet2DConditionModel

    output, one, objective = tmp_path / "parts", tmp_path / "one", OBJECTIVES[shard]
    training.fit(make(one, train={"accumulation": 2}, objective=objective))

    def save(*args: Any, **kwargs: Any) -> None:
        with (tmp_path / "writers").open("a") as writers:
            print(environment().rank, file=writers)
        write_sealed(*args, **kwargs)

    monkeypatch.setattr(reference, "write_sealed", save)

    def of(steps: int, accumulation: int) -> Config:
        train = {"steps": steps, "accumulation": accumulation, "shard": shard}
        return make(output, train=train, objective=objective, preview={"prompts": ["red square"], "steps": 1})

    together(tmp_path / "a", lambda: training.fit(of(2, 1)))
    training.fit(of(4, 2), resume=True)
    results = together(tmp_path / "b", lambda: training.fit(of(6, 1), resume=True))
    assert [r.step for r in results] == [6, 6]
    assert_same(result(output), result(one))

    if not shard:  # the start model's errors: each was written once, for two steps at a time
        assert (tmp_path / "writers").read_text().split() == ["0"] * 3
        known = [load_file(folder / "reference" / "errors-000000.safetensors") for folder in (output, one)]
        assert torch.equal(known[0]["errors"], known[1]["errors"])
    logs = [read_log(folder / "log.jsonl") for folder in (output, one)]
    steps, expected = ([e for e in log if e["event"] == "step"] for log in logs)
    assert [e["step"] for e in steps] == [2, 4, 6]
    for figure in ("loss", "chosen_error", "margin", "logits", "saturation", "accuracy", "grad_norm"):
        assert [e[figure] for e in steps] == pytest.approx([e[figure] for e in expected], rel=1e-9), figure
    looks, expected = ([e for e in log if e["event"] == "evaluation"] for log in logs)
    assert looks[0]["accuracy_start"] == expected[0]["accuracy_start"]
    assert looks[-1]["pairs"] == 3
    assert looks[-1]["chosen_error"] == pytest.approx(expected[-1]["chosen_error"], rel=1e-6)
    kept = [sorted(p.name for p in (folder / "checkpoints").iterdir()) for folder in (output, one)]
    assert kept[0] == kept[1]
    assert sorted(p.name for p in (output / "previews").iterdir())[-1] == "step-00000006"
    unet = UNet2DConditionModel.from_pretrained(output / "unet", local_files_only=True)
    assert_same(unet.state_dict(), {name: tensor.float() for name, tensor in result(output).items()})
    assert '"UNet2DConditionModel"' in (output / "unet" / "config.json").read_text()


@pytest.mark.slow
def test_errors_of_the_start_model_are_shared_and_kept_by_all(tmp_path: Path) -> None:
    """Five positions in two processes: the last one has no other to go with."""
    made: list[int] = []

    def errors(position: int) -> Tensor:
        made.append(position)
        return torch.full((4,), float(position))

    def of(processes: Processes) -> PrecomputedErrors:
        batches: Any = SimpleNamespace(pairs_per_batch=2)
        return PrecomputedErrors(tmp_path / "reference", {}, batches, 5, CPU, processes)

    def run() -> Any:
        with joined(environment(), CPU):
            found = of(environment())
            assert list(found.compute(map(errors, found.positions()))) == [0, 1, 2, 3, 4]
            return made, found.missing, [float(found.at(i, 2).mean()) for i in range(5)]

    known = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert together(tmp_path / "answers", run) == [([0, 2, 4], 0, known), ([1, 3, 4], 0, known)]
    assert [p.name for p in (tmp_path / "reference").iterdir()] == ["errors-000000.safetensors"]
    assert of(ALONE).missing == 0


@pytest.mark.slow
def test_every_pair_of_an_epoch_trains_once_in_one_process(
    make: Callable[..., Config], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str]] = []
    inputs = Feed.inputs

    def look(self: Feed, epoch: int, pairs: list[Any]) -> PairInputs:
        seen.extend((epoch, p.id) for p in pairs)
        return inputs(self, epoch, pairs)

    monkeypatch.setattr(Feed, "inputs", look)
    monkeypatch.setattr(Trainer, "healthy", lambda self, **_: True)  # looks at the first pairs again

    def run() -> Any:
        training.fit(make(tmp_path / "run", train={"pairs_per_batch": 3, "evaluate_pairs": 1}))
        return [pair for epoch, pair in seen if epoch == 0]

    first, second = together(tmp_path / "answers", run)
    assert first
    assert second
    assert sorted(first + second) == sorted(p.id for p in PairCache.open(cache).train)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def interrupted(self: Trainer, micro_batches: Any) -> Tensor:
        if self.processes.rank == 1 and self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, micro_batches)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    config = make(tmp_path / "run")
    expected = FitResult(tmp_path / "run", 3, finished=False, skipped_steps=0)
    assert together(tmp_path / "answers", lambda: training.fit(config)) == [expected] * 2
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.slow
def test_what_one_process_cannot_read_ends_all_with_the_step_saved(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Feed.inputs

    step, done = Trainer._step, [0]

    def counted(self: Trainer, micro_batches: Any) -> Tensor:
        done[0] = self.step
        return step(self, micro_batches)

    def failing(self: Feed, epoch: int, pairs: Any) -> PairInputs:
        if self.processes.rank == 1 and done[0] == 3:
            raise OSError(5, "Input/output error", "shard")
        return inputs(self, epoch, pairs)

    monkeypatch.setattr(Trainer, "_step", counted)
    monkeypatch.setattr(Feed, "inputs", failing)
    config = make(tmp_path / "run", train={"checkpoint_every": 0})

    def run() -> Any:
        try:
            training.fit(config)
        except UserError as error:
            return type(error), str(error)

    (kind, said), (other, _) = together(tmp_path / "answers", run)
    assert (kind, other) == (MachineError, ReportedError)
    assert said.endswith("Input/output error (shard); step 3 is saved, and --resume continues from it")
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.slow
def test_all_take_the_plan_of_process_0_for_the_smallest_gpu(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def plan_run(config: Config, folder: Any, vram: int, device: Any, processes: int, rules: Any) -> Any:
        asked.append((vram, processes))
        plan = Plan({"train.layout": "joint"}, {}, 1, 1, 0, 0, 1.0, traced=True)
        card = SimpleNamespace(rates=SimpleNamespace(source="guessed"))
        return SimpleNamespace(chosen=plan, others=[], host=None, card=card)

    monkeypatch.setattr(budget, "plan_run", plan_run)
    config = make(tmp_path / "run", train={"vram": "4GiB"})

    def run() -> Any:
        processes = environment()
        with joined(processes, CPU):
            planned, _ = budget.planned(config, lambda: None, CPU, None, processes)  # type: ignore[arg-type, return-value]
            return planned.train.layout, asked, processes.smallest(processes.rank + 5.0)

    assert together(tmp_path, run) == [("joint", [(4 * 2**30, 2)], 5.0), ("joint", [], 5.0)]


@pytest.mark.slow
def test_a_mistake_is_reported_once(make: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "holiday.jpg").touch()

    def run() -> Any:
        try:
            training.fit(make(tmp_path / "run"))
        except UserError as error:
            return type(error), error.reported, str(error)

    main, other = together(tmp_path / "answers", run)
    assert main[:2] == (UserError, False)
    assert other[:2] == (ReportedError, True)
    assert "is not an empty folder" in main[2]


# --- What cannot work ---


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"fused_step": True}}, "^train.fused_step = true: .* set train.fused_step = false, or"),
        (
            {"offload": {"optimizer": "cpu"}},
            "^offload.optimizer = 'cpu': .* set offload.optimizer = 'gpu', or",
        ),
        (
            {"adapter": {"kind": "lora"}, "offload": {"optimizer": "cpu", "weights": "cpu"}},
            "^offload.optimizer = 'cpu': ",
        ),
        ({"offload": {"weights": "cpu"}}, "^offload.weights = 'cpu': .* set offload.weights = 'gpu', or"),
        ({"speed": {"cuda_graph": True}}, "set speed.cuda_graph = false"),
        ({"train": {"shard": True, "vram": "8GiB"}}, "leave train.vram out"),
    ],
)
def test_what_works_in_one_process_only_is_refused(
    make: Callable[..., Config], tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    config = make(tmp_path / "run", **sections)
    assert in_processes(config, ALONE) is config
    with pytest.raises(UserError, match=message):
        in_processes(config, Processes(0, 2))


def test_no_plan_of_several_processes_fuses_the_step(make: Callable[..., Config], tmp_path: Path) -> None:
    train = in_processes(make(tmp_path / "run"), Processes(0, 2)).train
    assert not train.fused_step
    assert "fused_step" in train.model_fields_set


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"kind": "lora"}, **SHARDED}, 'use train.shard = false, or use adapter.kind = "full"'),
        ({"optim": {"name": "adamw8bit"}, **SHARDED}, 'or use optim.name = "adamw"'),
        ({"train": {"shard": True, "fused_step": True}}, "or use train.fused_step = false"),
        ({"speed": {"channels_last": True}, **SHARDED}, "or use speed.channels_last = false"),
        ({"speed": {"compile": True}, **SHARDED}, "or use speed.compile = false"),
    ],
)
def test_what_cannot_be_split_is_refused(
    make: Callable[..., Config], tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(tmp_path / "run", **sections)


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_launchers_that_want_to_shard_by_themselves_are_refused(
    monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv(flag, "true")
    with pytest.raises(UserError, match=r"train\.shard = true"):
        environment()


# --- The command ---


SUM = """
import torch
from mapo_fast.engine.processes import environment, joined
processes, total = environment(), torch.tensor([1.0])
with joined(processes, torch.device("cpu")):
    processes.sum_(total)
open(f"rank-{processes.rank}", "w").write(f"{processes.size} {total.item()}")
"""


@pytest.mark.slow
def test_accelerate_launch_connects_its_processes(tmp_path: Path) -> None:
    (tmp_path / "sum.py").write_text(SUM, encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "sum.py"]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    done = subprocess.run(
        launch,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["2 2.0"] * 2


@pytest.mark.slow
def test_two_processes_train_say_and_write_once(
    tiny_sdxl: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"steps": 2, "evaluate_pairs": 1}
    table = settings(tiny_sdxl, cache, tmp_path / "run", train=train)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["mapo-fast", "train", str(tmp_path / "config.toml")])

    def run() -> Any:
        out = io.StringIO()
        with redirect_stdout(out), pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, out.getvalue()

    answers = together(tmp_path / "answers", run)
    assert [code for code, _ in answers] == [0, 0]
    said = "".join(text for _, text in answers)
    assert said.count("training on 2 × cpu") == 1
    assert said.count("finished: 2 steps") == 1
    steps = [e["step"] for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "step"]
    assert steps == [2]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
