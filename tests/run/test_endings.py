"""Whatever ends a run, no finished step is lost.

A checkpoint of the last one stands, and a resume goes on bit for bit as if nothing had been.
"""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from mapo_fast.data import cache as caches
from mapo_fast.data import shards
from mapo_fast.engine.engine import Engine
from mapo_fast.run import state
from mapo_fast.run import trainer as module
from mapo_fast.run.evaluate import HeldOut
from mapo_fast.run.log import RunLog, read_log
from mapo_fast.run.preview import Previews
from mapo_fast.run.train import fit
from mapo_fast.run.trainer import Trainer
from mapo_fast.util.console import Terminal
from mapo_fast.util.errors import FailedRunError, MachineError, UserError
from mapo_fast.util.signals import Interrupted, exit_code
from tests.tiers import some_of
from tests.training import make_cache, make_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STEPS = 4
LAST = random.Random("issue 11").randrange(1, STEPS)
"""The last step that is finished before something fails."""

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of many shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 9000)
        return make_cache(tiny_sdxl, tmp_path_factory.mktemp("data"))


@pytest.fixture
def make(tiny_sdxl: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Configs of a run that does everything after every step, except saving."""
    monkeypatch.setattr(caches, "VERIFIED_AT_ONCE", 0)  # as a large cache: checked when first read

    def build(output: str = "run", data: Path = cache, **sections: dict[str, Any]) -> Any:
        always = {
            "steps": STEPS,
            "accumulation": 2,
            "log_every": 1,
            "checkpoint_every": 0,
            "evaluate_every": 1,
            "evaluate_pairs": 1,
            "keep_checkpoints": 9,
        }
        return make_config(
            tiny_sdxl,
            data,
            tmp_path / output,
            train=always | sections.pop("train", {}),
            preview=sections.pop("preview", {}),
            adapter={"kind": "lora", "rank": 2},
            **sections,
        )

    return build


@pytest.fixture(scope="module")
def truth(tiny_sdxl: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run makes that nothing disturbs: weights, and its log's figures."""
    output = tmp_path_factory.mktemp("truth") / "run"
    plan = {"steps": STEPS, "accumulation": 2, "log_every": 1, "evaluate_every": 1, "evaluate_pairs": 1}
    fit(make_config(tiny_sdxl, cache, output, train=plan, adapter={"kind": "lora", "rank": 2}))
    return made(output)


def made(output: Path) -> dict[str, Any]:
    figures = ("event", "step", "loss", "margin", "grad_norm", "lr", "accuracy", "drift", "chosen_error")
    kept = [e for e in read_log(output / "log.jsonl") if e["event"] in ("step", "evaluation")]
    return {
        "weights": load_file(output / "lora" / "pytorch_lora_weights.safetensors"),
        "log": [{name: entry[name] for name in figures if name in entry} for entry in kept],
    }


def assert_same(output: Path, truth: dict[str, Any]) -> None:
    found = made(output)
    assert found["weights"].keys() == truth["weights"].keys()
    assert all(torch.equal(found["weights"][name], value) for name, value in truth["weights"].items())
    assert found["log"] == truth["log"]


def saved(output: Path) -> list[str]:
    folder = output / "checkpoints"
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []


def system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Failing(io.StringIO):
    """A console's stream that takes nothing after a while."""

    def __init__(self, error: Exception, after: int) -> None:
        super().__init__()
        self.error, self.left = error, after

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


# --- What ends a run, and saves first ---


def full_log(error: Exception, patch: pytest.MonkeyPatch) -> None:
    step = RunLog.step

    class Full:
        def write(self, _: bytes) -> int:
            raise error

        def close(self) -> None:
            raise error

    def failing(self: RunLog, number: int, figures: Any) -> None:
        if number == LAST:
            self._file.close()
            self._file = Full()  # type: ignore[assignment]
        step(self, number, figures)

    patch.setattr(RunLog, "step", failing)


def no_preview(error: Exception, patch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def failing(self: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if f"step-{LAST:08d}" in str(path):
            raise error
        save(self, path, *args, **kwargs)

    patch.setattr(Image.Image, "save", failing)


def no_evaluation(error: Exception, patch: pytest.MonkeyPatch) -> None:
    calls = []
    errors = HeldOut.errors

    def failing(self: HeldOut, *args: Any) -> Any:
        calls.append(0)
        if len(calls) == 1 + LAST:  # the first is of the start
            raise error
        return errors(self, *args)

    patch.setattr(HeldOut, "errors", failing)


def no_memory(error: Exception, patch: pytest.MonkeyPatch) -> None:
    """In the second half of a step."""
    calls = []
    accumulate = Engine.accumulate

    def failing(self: Engine, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 2 * LAST + 2:
            raise error
        return accumulate(self, *args, **kwargs)

    patch.setattr(Engine, "accumulate", failing)


ENDINGS: dict[str, tuple[Callable[[Exception, pytest.MonkeyPatch], None], Exception]] = {
    "log, disk full": (full_log, system_error(errno.ENOSPC)),
    "log, I/O error": (full_log, system_error(errno.EIO)),
    "preview, disk full": (no_preview, system_error(errno.ENOSPC)),
    "preview, I/O error": (no_preview, system_error(errno.EIO)),
    "evaluation, I/O error": (no_evaluation, system_error(errno.EIO)),
    "evaluation, a mistake in the program": (no_evaluation, ZeroDivisionError("a bug")),
    "a step, no memory": (no_memory, MemoryError()),
    "a step, a warning made an error": (no_memory, RuntimeWarning("odd")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", some_of(ENDINGS, ("log, I/O error", "preview, I/O error")))
def test_what_ends_a_run_saves_the_last_finished_step(
    make: Make, truth: dict[str, Any], tmp_path: Path, name: str
) -> None:
    fault, error = ENDINGS[name]
    previews = {"prompts": ["red"], "steps": 1, "every": 1} if "preview" in name else {}
    console = Console(file=io.StringIO(), width=400)
    with pytest.MonkeyPatch.context() as patch:
        fault(error, patch)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - of several types
            fit(make(preview=previews), callbacks=Terminal(console))
    assert saved(tmp_path / "run") == [f"step-{LAST:08d}"]
    said = f"{caught.value} {console.file.getvalue()}"  # type: ignore[attr-defined]
    assert f"step {LAST} is saved" in said
    assert isinstance(caught.value, MachineError) == (isinstance(error, OSError) and "evaluation" not in name)
    assert fit(make(preview=previews), resume=True).finished
    if "log" in name:  # that line was never written: the next one's figures are of both steps
        truth = truth | {"log": made(tmp_path / "run")["log"]}
    assert_same(tmp_path / "run", truth)
    if previews:
        assert len(list((tmp_path / "run" / "previews").glob("*/00-red.png"))) == 1 + STEPS


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["damaged", "gone"])
def test_a_shard_that_is_damaged_or_gone_ends_the_run_with_all_steps_saved(
    make: Make, cache: Path, truth: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    data = tmp_path / "cache"
    shutil.copytree(cache, data)
    step = Trainer._step

    def failing(self: Trainer, micro_batches: Any) -> Any:
        if self.step == LAST:
            for path in (data / "shards").glob("*.safetensors"):
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.unlink()
                if fault == "damaged":
                    path.write_bytes(content)
        return step(self, micro_batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", failing)
        patch.setattr(HeldOut, "pairs", property(lambda self: [], lambda self, _: None), raising=False)
        with pytest.raises(UserError) as caught:
            fit(make(data=data, train={"evaluate_every": 0}))
    assert saved(tmp_path / "run") == [f"step-{LAST:08d}"]
    assert ("is damaged" if fault == "damaged" else "is missing from the cache") in str(caught.value)
    assert f"step {LAST} is saved" in str(caught.value)
    shutil.rmtree(data)
    shutil.copytree(cache, data)
    assert fit(make(data=data, train={"evaluate_every": 0}), resume=True).finished
    found = made(tmp_path / "run")["weights"]
    assert all(torch.equal(found[name], value) for name, value in truth["weights"].items())


@pytest.mark.slow
def test_a_result_that_cannot_be_written_is_made_by_the_resume(
    make: Make, truth: dict[str, Any], tmp_path: Path
) -> None:
    def full(*args: Any) -> None:
        raise MachineError("cannot write lora: the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "export", full)
        with pytest.raises(MachineError, match=f"disk is full; step {STEPS} is saved"):
            fit(make())
    assert saved(tmp_path / "run") == [f"step-{STEPS:08d}"]
    assert fit(make(), resume=True).finished
    assert_same(tmp_path / "run", truth)


@pytest.mark.slow
def test_a_failing_save_is_not_tried_twice_and_names_the_last_saved_step(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    save = module.CheckpointStore.save

    def full(self: Any, step: int, *args: Any) -> Any:
        tried.append(step)
        if step > 2:
            raise MachineError("the disk is full")
        return save(self, step, *args)

    monkeypatch.setattr(module.CheckpointStore, "save", full)
    with pytest.raises(MachineError, match=r"the disk is full; step 2 is saved, and --resume"):
        fit(make(train={"checkpoint_every": 1}))
    assert tried == [1, 2, 3]


# --- What a run goes on without ---


@pytest.mark.slow
@pytest.mark.parametrize(("terminal", "number"), [(True, errno.EIO), (False, errno.EPIPE)])
def test_a_console_that_fails_ends_no_run(
    make: Make, truth: dict[str, Any], tmp_path: Path, terminal: bool, number: int
) -> None:
    """A terminal that was closed; `| tee` that has ended."""
    file = Failing(system_error(number), after=3)
    console = Console(file=file, force_terminal=terminal, width=100, legacy_windows=False)
    assert fit(make(), callbacks=Terminal(console)).finished
    assert file.left < 0
    assert_same(tmp_path / "run", truth)


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_tensorboard_that_fails_is_left_out_with_a_warning(
    make: Make,
    truth: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    records = []
    write = RecordWriter.write

    def failing(self: Any, data: bytes) -> None:
        records.append(data)
        if len(records) > 20:
            raise system_error(number)
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", failing)
    assert fit(make()).finished
    assert_same(tmp_path / "run", truth)
    warnings = [e["message"] for e in read_log(tmp_path / "run" / "log.jsonl") if e["event"] == "warning"]
    assert sum("TensorBoard failed and is left out from here" in w for w in warnings) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_mirror_that_fails_at_the_end_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Board:
        def __init__(self, *args: Any) -> None:
            pass

        def close(self) -> None:
            raise system_error(errno.ENOSPC)

    class Wandb:
        @staticmethod
        def finish() -> None:
            raise RuntimeError("no connection")

    monkeypatch.setattr("mapo_fast.run.log.TensorBoard", Board)
    monkeypatch.setattr("mapo_fast.run.log.open_wandb", lambda *_: Wandb)
    with RunLog(tmp_path, 1, None, wandb="x") as log:
        log.end(1, finished=True)
    warnings = [e["message"] for e in read_log(tmp_path / "log.jsonl") if e["event"] == "warning"]
    assert ["TensorBoard" in warnings[0], "Weights & Biases" in warnings[1]] == [True, True]


def test_the_last_line_of_a_log_is_no_reason_to_fail(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=400)
    with RunLog(tmp_path, 1, Terminal(console)) as log:
        log._file.close()
        log._file = Failing(system_error(errno.ENOSPC), after=0)  # type: ignore[assignment]
        log.end(1, finished=True)
    assert "the log lacks its last line: cannot write" in console.file.getvalue()  # type: ignore[attr-defined]


# --- Signals ---


def kill(number: int = signal.SIGTERM, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def at_batch(patch: pytest.MonkeyPatch, wanted: int, times: int = 1) -> list[int]:
    """Send SIGTERM in a batch of the evaluations, counted from 1; returns the list of batches taken."""
    from mapo_fast.run import evaluate

    taken: list[int] = []
    predict = evaluate.predict

    def counted(*args: Any) -> Any:
        taken.append(len(taken) + 1)
        if taken[-1] == wanted:
            kill(times=times)
        return predict(*args)

    patch.setattr(evaluate, "predict", counted)
    return taken


BATCHES = 4
"""Batches of an evaluation: eight draws of one pair, two at a time."""


@pytest.mark.slow
def test_a_signal_in_an_evaluation_saves_at_once_and_the_resume_evaluates(
    make: Make, truth: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        taken = at_batch(patch, BATCHES + 2)
        result = fit(make())
    assert taken[-1] == BATCHES + 2
    assert (result.step, result.finished, result.saved_step) == (1, False, 1)
    assert exit_code(result.signal) == 143
    assert saved(tmp_path / "run") == ["step-00000001"]
    assert fit(make(), resume=True).finished
    assert_same(tmp_path / "run", truth)


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_keeps_the_result_for_the_resume(
    make: Make, truth: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, BATCHES * STEPS + 1)
        result = fit(make())
    assert (result.step, result.finished, result.saved_step) == (STEPS, False, STEPS)
    assert fit(make(), resume=True).finished
    assert_same(tmp_path / "run", truth)


@pytest.mark.slow
def test_a_signal_before_the_first_step_has_nothing_to_save(
    make: Make, truth: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        taken = at_batch(patch, 2)
        result = fit(make())
    assert len(taken) == 2
    assert (result.step, result.finished, result.saved_step) == (0, False, None)
    assert saved(tmp_path / "run") == []
    assert fit(make(), resume=True).finished
    assert_same(tmp_path / "run", truth)


@pytest.mark.slow
def test_a_signal_in_a_preview_leaves_it_and_the_resume_makes_it(
    make: Make, truth: dict[str, Any], tmp_path: Path
) -> None:
    previews = {"prompts": ["red", "blue"], "steps": 3, "every": 1}
    write = Previews.write
    sampled: list[int] = []

    def signalled(self: Previews, unet: Any, step: int, *args: Any, **kwargs: Any) -> list[Path]:
        if step != LAST:
            return write(self, unet, step, *args, **kwargs)

        def count(*_: Any) -> None:
            sampled.append(0)
            if len(sampled) == 2:
                kill()

        seen = unet.register_forward_hook(count)
        try:
            return write(self, unet, step, *args, **kwargs)
        finally:
            seen.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Previews, "write", signalled)
        result = fit(make(preview=previews))
    assert len(sampled) == 2
    assert (result.step, result.finished) == (LAST, False)
    assert saved(tmp_path / "run") == [f"step-{LAST:08d}"]
    assert fit(make(preview=previews), resume=True).finished
    assert_same(tmp_path / "run", truth)
    assert len(list((tmp_path / "run" / "previews").glob("*/*.png"))) == 2 * (STEPS + 1)


@pytest.mark.slow
def test_a_checkpoint_that_is_due_is_written_before_the_evaluation(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    errors = HeldOut.errors

    def look(self: HeldOut, *args: Any) -> Any:
        seen.append(saved(tmp_path / "run")[-1:])
        return errors(self, *args)

    monkeypatch.setattr(HeldOut, "errors", look)
    fit(make(train={"checkpoint_every": 1}))
    assert seen == [[], *([f"step-{step:08d}"] for step in range(1, STEPS + 1))]


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_says_what_is_saved(
    make: Make, truth: dict[str, Any], tmp_path: Path
) -> None:
    """In the middle of a step: it is not saved."""
    accumulate = Engine.accumulate
    calls: list[int] = []

    def twice(self: Engine, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == 2 * LAST + 2:
            kill(times=2)
        return accumulate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "accumulate", twice)
        with pytest.raises(
            Interrupted, match=f"interrupted after step {LAST}; step {LAST} is saved"
        ) as caught:
            fit(make(train={"checkpoint_every": 1}))
    assert exit_code(caught.value.number) == 143
    assert len(calls) == 2 * LAST + 2
    assert saved(tmp_path / "run")[-1] == f"step-{LAST:08d}"
    assert fit(make(), resume=True).finished
    assert_same(tmp_path / "run", truth)


@pytest.mark.slow
def test_a_second_signal_without_a_checkpoint_says_so(make: Make, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, BATCHES + 1, times=2)
        with pytest.raises(Interrupted, match="interrupted after step 1; no step was saved"):
            fit(make())
    assert saved(tmp_path / "run") == []


@pytest.mark.slow
def test_a_signal_while_the_model_is_diverged_does_not_call_it_saved(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def diverging(self: Trainer, micro_batches: Any) -> torch.Tensor:
        norm = step(self, micro_batches)
        if self.step == 2:
            with torch.no_grad():
                for tensor in self.engine.parameters:
                    tensor.fill_(float("nan"))
            kill()
        return norm

    monkeypatch.setattr(Trainer, "_step", diverging)
    with pytest.raises(FailedRunError, match="stopped at step 2: the model has diverged"):
        fit(make())
    assert saved(tmp_path / "run") == []
