"""The Python API: twice in a process, in a thread, in an event loop, interrupted; silent, without trace."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mapo_fast
from mapo_fast import Callbacks, Config, FitResult, PrepareResult, UserError, fit, load_config, prepare
from mapo_fast.util.signals import CAUGHT
from tests.training import make_pairs, settings

ROOT = Path(__file__).parent.parent
LORA = {"kind": "lora", "rank": 2}


class Heard(Callbacks):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[int] = []
        self.stages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        self.stages.append(stage)

    def step(self, step: int, total: int, figures: Mapping[str, float]) -> None:
        assert figures["loss"] > 0
        self.steps.append(step)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("api") / "pairs", 8)


@pytest.fixture(scope="module")
def prepared(tiny_sdxl: Path, pairs: Path) -> PrepareResult:
    config = made(tiny_sdxl, pairs, pairs.parent / "unused")
    before = process_state()
    result = prepare(config)
    assert_as(before)
    return result


def made(model: Path, pairs: Path, output: Path, **changes: Any) -> Config:
    """Four steps on the tiny model, from sections as a notebook writes them."""
    table = settings(model, pairs.parent / "cache", output, adapter=LORA, data={"source": pairs})
    table["train"] |= {"steps": 4, "output": output, "log_every": 1} | changes
    return Config(**table)


def weights(result: FitResult) -> bytes:
    assert result.finished
    assert result.model is not None
    return (result.model / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def first(tiny_sdxl: Path, pairs: Path, prepared: PrepareResult) -> bytes:
    """The LoRA of an uninterrupted run."""
    return weights(fit(made(tiny_sdxl, pairs, pairs.parent / "first")))


def process_state() -> dict[str, Any]:
    """What all code of a process shares."""
    loggers = {**logging.root.manager.loggerDict, "": logging.root}
    known = [(name, one) for name, one in sorted(loggers.items()) if isinstance(one, logging.Logger)]
    return {
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        "Python's random state": random.getstate(),
        "threads": torch.get_num_threads(),
        "default type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "products": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "signals": [signal.getsignal(number) for number in CAUGHT],
        "warnings": list(warnings.filters),
        "loggers": {name: (one.level, one.disabled, list(one.handlers)) for name, one in known},
        "other threads": threading.enumerate(),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
    }


def assert_as(before: dict[str, Any]) -> None:
    """Nothing is another than it was; what is imported for the first time makes loggers of its own."""
    now = process_state()
    now["loggers"] = {name: now["loggers"][name] for name in before["loggers"]}
    assert now == before


@pytest.mark.slow
def test_a_second_run_is_the_first_one_again_and_nothing_is_left(
    tiny_sdxl: Path, pairs: Path, first: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heard = Heard()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # another number than the run's
    try:
        before = process_state()
        result = fit(made(tiny_sdxl, pairs, tmp_path / "run"), callbacks=heard)
        assert_as(before)
    finally:
        torch.set_num_threads(threads)
    assert weights(result) == first
    assert capfd.readouterr() == ("", "")
    assert (result.output, result.step, result.saved_step) == (tmp_path / "run", 4, 4)
    assert result.skipped_steps == 0
    assert heard.steps == [1, 2, 3, 4]
    assert heard.stages == ["training"]
    assert any("training on cpu" in text for text in heard.messages)
    lines = [json.loads(line) for line in result.log.read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4]
    (tmp_path / "run" / ".lock").open("a").close()  # nobody holds it: the folder can be taken again
    with pytest.raises(UserError, match="already holds a run"):
        fit(made(tiny_sdxl, pairs, tmp_path / "run"))


@pytest.mark.slow
def test_the_model_is_gone_with_the_run(
    tiny_sdxl: Path, pairs: Path, prepared: PrepareResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run of the process plans for the memory that is free, which waits for no garbage collector."""
    from mapo_fast.run import train as module

    kept: list[weakref.ref[Any]] = []
    build = module.build_unet

    def watched(*args: Any) -> Any:
        parts = build(*args)
        kept.append(weakref.ref(parts.unet))
        return parts

    monkeypatch.setattr(module, "build_unet", watched)
    gc.disable()
    try:
        fit(made(tiny_sdxl, pairs, tmp_path / "run", steps=1))
        assert [one() for one in kept] == [None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_in_another_thread(tiny_sdxl: Path, pairs: Path, first: bytes, tmp_path: Path) -> None:
    results: list[FitResult] = []
    config = made(tiny_sdxl, pairs, tmp_path / "run")
    thread = threading.Thread(target=lambda: results.append(fit(config)))
    thread.start()
    thread.join()
    assert weights(results[0]) == first


class Stopping(Callbacks):
    """Calls something after the second step."""

    def __init__(self, stop: Any) -> None:
        self.stop = stop

    def step(self, step: int, total: int, figures: Mapping[str, float]) -> None:
        if step == 2:
            self.stop()


@pytest.mark.slow
def test_ctrl_c_in_a_cell_leaves_a_run_to_resume(
    tiny_sdxl: Path, pairs: Path, first: bytes, tmp_path: Path
) -> None:
    """A notebook calls from within a running event loop, in the main thread."""
    config = made(tiny_sdxl, pairs, tmp_path / "run")

    async def cell(**how: Any) -> FitResult:
        return fit(config, **how)

    handler = signal.getsignal(signal.SIGINT)
    stopped = asyncio.run(cell(callbacks=Stopping(lambda: signal.raise_signal(signal.SIGINT))))
    assert signal.getsignal(signal.SIGINT) is handler
    assert not stopped.finished
    assert stopped.model is None
    assert stopped.saved_step in (2, 3)
    assert weights(asyncio.run(cell(resume=True))) == first


@pytest.mark.slow
def test_what_a_callback_raises_ends_the_run_and_saves_it(
    tiny_sdxl: Path, pairs: Path, first: bytes, tmp_path: Path
) -> None:
    config = made(tiny_sdxl, pairs, tmp_path / "run", checkpoint_every=0)

    def stop() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(config, callbacks=Stopping(stop))
    assert weights(fit(config, resume=True)) == first


def test_prepare_says_what_it_did(
    tiny_sdxl: Path, pairs: Path, prepared: PrepareResult, tmp_path: Path
) -> None:
    assert (prepared.cache, prepared.pairs, prepared.skipped) == (pairs.parent / "cache", 8, {})
    assert prepared.encoded == prepared.images == 16
    heard = Heard()
    again = prepare(made(tiny_sdxl, pairs, tmp_path / "run"), callbacks=heard)
    assert (again.encoded, again.images) == (0, 16)
    assert "nothing to do" in heard.messages[-1]


@pytest.mark.usefixtures("planned_here")
def test_a_plan_is_of_plain_figures(tiny_sdxl: Path, pairs: Path, tmp_path: Path) -> None:
    config = made(tiny_sdxl, pairs, tmp_path / "run")
    before = process_state()
    found = mapo_fast.plan(config, card="RTX 3060 12GB", ram="64GiB")
    assert_as(before)
    assert found.chosen is not None
    assert 0 < found.chosen.peak < 12 * 2**30
    assert found.chosen.ms > 0
    assert all(loser.reason for loser in found.others)
    planned = found.chosen.apply(config)
    assert {f"train.{name}" for name in ("layout", "fused_step")} <= planned.stated


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "model is missing; data is missing; train is missing"),
        ({"train": {"output": "o", "stps": 3}}, r"unknown key train\.stps \(did you mean train\.steps\?\)"),
        ({"train": {"output": "o", "steps": 0}}, r"train\.steps = 0: .* greater than or equal to 1"),
        ({"trian": {}}, r"unknown key trian \(did you mean train\?\)"),
        ({"adapter": "lora"}, r"adapter = 'lora': "),
        ({"train": {"output": "o", "steps": "3"}}, r"train\.steps = '3': "),
        ({"train": {"output": "o", "steps": True}}, r"train\.steps = True: "),
        ({"train": {"output": ""}}, r"train\.output is empty"),
        ({"data": {"cache": object()}}, r"<object object> is no value of a setting"),
        (
            {"train": {"output": "o", "layout": "split", "gradient_checkpointing": False}},
            "'split' works inside checkpointed blocks",
        ),
    ],
)
def test_a_mistake_in_a_config_is_one_line(sections: dict[str, Any], message: str) -> None:
    whole: dict[str, Any] = {"model": {"path": "m"}, "data": {"cache": "c"}, "train": {"output": "o"}}
    with pytest.raises(UserError, match=message) as error:
        Config(**({**whole, **sections} if sections else {}))
    assert "\n" not in str(error.value)


def test_a_config_takes_what_a_program_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    made = Config(
        model={"path": "~/sdxl"},
        data={"cache": Path("cache"), "source": "pairs"},
        train={"output": "run", "steps": np.int64(3)},
        optim={"lr": np.float32(0.5)},
        preview={"prompts": ["a", "b"]},
    )
    assert (made.model.path, made.data.cache) == (Path("/home/me/sdxl"), Path("cache"))
    assert (made.train.steps, made.optim.lr, made.preview.prompts) == (3, 0.5, ("a", "b"))
    again = Config(model=made.model, data=made.data, train=made.train, optim={"lr": 0.5})
    assert again.model_copy(update={"preview": made.preview}) == made


def test_files_that_are_not_there_are_named(pairs: Path, tmp_path: Path) -> None:
    config = made(tmp_path / "no_model", pairs, tmp_path / "run")
    for call in (prepare, fit):
        with pytest.raises(UserError, match="no_model"):
            call(config)
    with pytest.raises(UserError, match=r"no\.toml"):
        load_config("no.toml")
    assert not (tmp_path / "run").exists()


def test_every_public_name_is_there() -> None:
    assert {*mapo_fast.__all__} <= {*dir(mapo_fast)}
    for name in mapo_fast.__all__:
        assert getattr(mapo_fast, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        mapo_fast.fitt  # noqa: B018


LIGHT = """import sys
import mapo_fast
assert not {"torch", "pydantic", "numpy", "mapo_kernels"} & {*sys.modules}
from mapo_fast import Callbacks, Config, FitResult, MachineError, UserError, load_config
assert "pydantic" in sys.modules and not {"torch", "numpy", "diffusers"} & {*sys.modules}
"""


@pytest.mark.slow
def test_in_a_fresh_process_the_page_s_code_imports_what_it_uses_and_only_callbacks_print(
    tiny_sdxl: Path, pairs: Path, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "sdxl").symlink_to(tiny_sdxl, target_is_directory=True)
    (tmp_path / "pairs").symlink_to(pairs, target_is_directory=True)
    small = {
        '"resolution": 1024': '"resolution": 32, "bucket_step": 32',
        '"steps": 300': '"steps": 2, "log_every": 1',
    }
    for shown, tiny in small.items():
        assert shown in code
        code = code.replace(shown, tiny)
    done = subprocess.run([sys.executable, "-c", LIGHT + code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines if "loss" in line] == ["1/2", "2/2"]
    assert lines[-1] == "8 {} True run/lora"


@pytest.mark.parametrize("name", ["fit", "plan", "prepare"])
def test_a_path_in_place_of_a_config_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=r"must be a Config, not str: load_config\(path\) reads a file"):
        getattr(mapo_fast, name)("config.toml")
