"""The command line: its surface, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from mapo_fast import cli
from mapo_fast.run.settings import Shown
from mapo_fast.settings.page import help_text
from mapo_fast.settings.view import Known
from mapo_fast.util.errors import UserError
from tests.training import make_cache, make_pairs, settings


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_sdxl, tmp_path_factory.mktemp("data"))


def _run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mapo-fast", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def _write(path: Path, table: dict[str, Any]) -> str:
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return str(path)


def test_the_surface() -> None:
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback}
    assert names == {
        *("prepare", "plan", "train", "show", "export", "sample", "evaluate", "report", "demo", "doctor"),
        "studio",
    }


@pytest.mark.parametrize("command", ["prepare", "train", "plan", "show"])
def test_help_of_a_command_that_reads_a_config_has_all_settings(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, command, "--help") == 0
    out = capsys.readouterr().out
    assert "--set" in out
    assert out.rstrip().endswith(help_text())


@pytest.mark.slow
def test_prepare_then_train_then_resume(
    tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_pairs(tmp_path / "pairs")
    table = settings(tiny_sdxl, tmp_path / "cache", tmp_path / "run", data={"source": str(source)})
    config = _write(tmp_path / "config.toml", table)
    assert _run(monkeypatch, "prepare", config) == 0
    assert _run(monkeypatch, "train", config, "--set", "train.steps=2") == 0
    out = capsys.readouterr().out
    assert "training on cpu" in out
    assert "step 2/2" in out
    assert f"result in {tmp_path / 'run' / 'unet'}" in out
    assert _run(monkeypatch, "train", config, "--resume", "--set", "train.steps=4") == 0
    assert "step 4/4" in capsys.readouterr().out
    assert (tmp_path / "run" / "unet" / "config.json").is_file()
    for start, steps in enumerate(("train.steps=2", "train.steps=4")):
        assert _run(monkeypatch, "show", config, "--json", "--set", steps) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["train.steps"] == {"value": 2 + 2 * start, "from": "command line"}
        assert shown["train.output"] == {"value": str(tmp_path / "run"), "from": "file"}
        assert shown["speed.fused_ops"] == {"value": False, "from": "device"}
        kept = json.loads((tmp_path / "run" / "settings.json").read_text())["starts"][start]
        assert (kept["step"], kept["settings"]) == (2 * start, shown)


def test_show_prints_what_is_known(
    tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    table = settings(
        tmp_path / "none", tmp_path / "cache", tmp_path / "run", preview={"prompts": ["\u202eé"]}
    )
    del table["train"]["gradient_checkpointing"]
    config = _write(tmp_path / "config.toml", table)
    assert _run(monkeypatch, "show", config) == 0
    out, error = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert error == ""
    assert {"[train]", 'layout "split" default', 'device "cpu" device'} <= {*lines}
    assert 'prompts ["\\u202eé"] file' in lines
    assert _run(monkeypatch, "show", config, "--set", "train.vram=1GiB") == 0
    out, error = capsys.readouterr()
    assert "layout chosen when the run starts plan" in [" ".join(line.split()) for line in out.splitlines()]
    assert error.startswith(f"no memory plan yet: model not found: {tmp_path / 'none'}")
    assert error.count("\n") == 1
    assert _run(monkeypatch, "show", config, "--set", "train.stps=1") == 2
    assert "did you mean train.steps?" in capsys.readouterr().err


def test_show_ends_with_what_a_run_would_end_with(
    tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write(tmp_path / "config.toml", settings(tiny_sdxl, tmp_path / "cache", tmp_path / "run"))
    found = Shown({"train.layout": Known(None, "plan")}, refused=UserError("no plan fits"))
    monkeypatch.setattr("mapo_fast.run.settings.look", lambda _: found)
    assert _run(monkeypatch, "show", config) == 2
    assert capsys.readouterr() == (
        "[train]\n  layout  chosen when the run starts  plan\n",
        "mapo-fast: no plan fits\n",
    )


@pytest.mark.parametrize(("rank", "ended", "code"), [("0", True, 2), ("1", True, -15), ("1", False, 2)])
def test_the_first_process_reports_or_the_only_one_with_the_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, ended: bool, code: int
) -> None:
    """A launcher ends all processes after the first that ends."""

    def wait(seconds: float) -> None:
        if ended:
            sys.exit(-15)

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli.time, "sleep", wait)
    assert _run(monkeypatch, "train", "nothing.toml") == code
    said = "mapo-fast: config file not found: nothing.toml\n"
    assert capsys.readouterr().err == (said if code == 2 else "")


def test_an_interrupted_prepare_says_how_to_go_on(
    tmp_path: Path, tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mapo_fast.data.prepare.prepare", interrupted)
    data = {"source": str(make_pairs(tmp_path / "pairs", count=2))}
    table = settings(tiny_sdxl, tmp_path / "cache", tmp_path / "run", data=data)
    config = _write(tmp_path / "config.toml", table)
    assert _run(monkeypatch, "prepare", config) == 130
    assert capsys.readouterr().err == "interrupted; what is encoded is kept, the same command continues\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "train.lr=1"), "unknown key train.lr"),
        (("--set", "model.path=/nowhere"), "model not found: /nowhere"),
        (("--set", "data.cache=/nowhere"), "/nowhere"),
        (("--set", "data.resolution=64"), "resolution"),
        (("--set", "model.vae=/nowhere"), "/nowhere"),
        (("--set", "train.device=cuda"), "no NVIDIA GPU"),
        (("--set", "optim.name=paged_adamw8bit"), "it was removed. Use 'adamw8bit'"),
        (("--set", "adapter.kind=lora", "--set", "adapter.targets=['to_w']"), "to_w"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path,
    tiny_sdxl: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = _write(tmp_path / "config.toml", settings(tiny_sdxl, cache, tmp_path / "run"))
    assert _run(monkeypatch, "train", config, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("mapo-fast: ")
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet/config.json", "unet/config.json is missing"),
        ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors is missing"),
        ("text_encoder_2/config.json", "text_encoder_2/config.json is missing"),
        ("tokenizer_2/tokenizer_config.json", "tokenizer_2/tokenizer_config.json is missing"),
        ("scheduler/scheduler_config.json", "scheduler_config.json is missing"),
        ("model_index.json", "model_index.json is missing"),
    ],
)
def test_a_folder_that_is_not_sdxl_names_the_missing_part(
    tmp_path: Path,
    tiny_sdxl: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    message: str,
) -> None:
    model = tmp_path / "model"
    for file in tiny_sdxl.rglob("*"):
        target = model / file.relative_to(tiny_sdxl)
        if file.is_file() and str(file.relative_to(tiny_sdxl)) != part:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    config = _write(tmp_path / "config.toml", settings(model, cache, tmp_path / "run"))
    assert _run(monkeypatch, "train", config) == 2
    assert message in capsys.readouterr().err


def test_pickled_weights_and_other_models_are_refused(tmp_path: Path, tiny_sdxl: Path) -> None:
    import shutil

    from mapo_fast.models.open import open_sdxl
    from mapo_fast.util.errors import UserError

    model = shutil.copytree(tiny_sdxl, tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"only pickled \.bin weights"):
        open_sdxl(model)
    weights.with_suffix(".bin").rename(weights)
    config = model / "unet" / "config.json"
    config.write_text(config.read_text().replace('"text_time"', "null"))
    with pytest.raises(UserError, match=r"addition_embed_type = None, SDXL has 'text_time'"):
        open_sdxl(model)
    weights.write_bytes(b"not weights")
    config.write_text(config.read_text().replace("null", '"text_time"', 1))
    with pytest.raises(UserError, match=r"model_index|cannot load|unet"):
        open_sdxl(model).load_unet()


@pytest.mark.slow
def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mapo_fast", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("prepare", "train", "demo", "doctor"):
        assert command in done.stdout


def test_one_message_of_bitsandbytes_is_left_out_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU with AVX512-BF16 importing it writes the message."""
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING, log.name):  # also where a test before has switched logging off
        log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
        log.warning("anything else")
    assert caplog.messages == ["anything else"]
    package = importlib.util.find_spec("bitsandbytes")
    assert package is not None
    ops = Path(str(package.origin)).parent / "backends" / "cpu" / "ops.py"
    assert '"Failed to load CPU gemm_4bit_forward' in ops.read_text("utf-8"), (
        "no such message: drop the filter"
    )


def test_options_that_name_a_model_replace_its_settings(
    tiny_sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[model]\npath = "none"\n[data]\ncache = "cache"\n[train]\noutput = "out"\nsteps = 1\n')
    odd = tmp_path / 'a "quoted" = näme.safetensors'
    options = [
        "--model",
        str(tiny_sdxl),
        "--unet",
        str(odd),
        "--vae",
        "v",
        "--lora",
        f"{odd}=0.5",
        "--lora",
        "l",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mapo-fast", "show", str(path), "--json", *options])
    with pytest.raises(SystemExit):
        cli.main()
    shown = json.loads(capsys.readouterr().out)
    assert shown["model.path"] == {"value": str(tiny_sdxl), "from": "command line"}
    assert shown["model.unet"]["value"] == str(odd)
    assert shown["model.vae"]["value"] == "v"
    assert shown["model.lora"]["value"] == [f"{odd}=0.5", "l=1.0"]
