"""The doctor: works with what is there, says what is missing, and never fails."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mapo_fast import doctor as module
from mapo_fast.doctor import doctor, examine
from mapo_fast.util.errors import UserError
from tests.files_of_models import make_file


@pytest.fixture(scope="module")
def findings() -> dict[str, str]:
    return {line.label: line.text for line in examine()}


@pytest.mark.slow
def test_versions_are_those_installed(findings: dict[str, str]) -> None:
    assert findings["torch"].startswith(torch.__version__)
    for name in ("safetensors", "diffusers", "transformers", "peft", "bitsandbytes"):
        assert findings[name] == metadata.version(name)
    assert sys.executable in findings["python"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU will use")
def test_a_machine_without_a_gpu(findings: dict[str, str]) -> None:
    assert findings["device"].startswith("cpu")
    assert findings["gpu"].startswith(("none", "not usable"))
    assert findings["loss kernels"].startswith(("eager PyTorch", "Triton's interpreter"))
    assert "math" in findings["attention"]
    assert "works on this CPU" in findings["8-bit AdamW"]
    assert "GiB free" in findings["memory"]
    assert "GiB free" in findings["disk"]


@pytest.mark.slow
@pytest.mark.gpu
def test_a_machine_with_a_gpu(findings: dict[str, str]) -> None:
    assert torch.cuda.get_device_name() in findings["gpu"]
    assert findings["device"].startswith("cuda")
    assert findings["loss kernels"].startswith("fused Triton kernels")
    assert "flash" in findings["attention"]
    assert "works on this GPU" in findings["8-bit AdamW"]


@pytest.mark.slow
def test_the_loss_line_is_what_the_kernels_say(findings: dict[str, str]) -> None:
    from mapo_kernels.hardware import backend

    assert findings["loss kernels"].endswith(backend("cuda" if torch.cuda.is_available() else "cpu").reason)


@pytest.mark.slow
def test_the_interpreter_is_reported() -> None:
    pytest.importorskip("triton")
    code = "from mapo_fast.doctor import _loss_kernels; print(_loss_kernels('cpu'))"
    root = Path(module.__file__).parents[1]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert run.stdout.startswith("Triton's interpreter (for tests; slow): TRITON_INTERPRET=1")


def test_the_console_shows_every_finding_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [module.Line("A", "x", "[train] one"), module.Line("A", "y", "two"), module.Line("B", "z", "3")]
    monkeypatch.setattr(module, "examine", lambda: lines)
    console = Console(file=io.StringIO(), width=40)
    doctor(console)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.splitlines() == [
        "",
        "A",
        "  x:                    [train] one",
        "  y:                    two",
        "",
        "B",
        "  z:                    3",
    ]


def test_without_rich_it_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "examine", lambda: [module.Line("A", "x", "one")])
    doctor()
    assert capsys.readouterr().out == "\nA\n  x:                    one\n"


@pytest.mark.slow
def test_runs_with_the_base_install_only() -> None:
    """Every package beyond the base install is hidden: the doctor names them and ends well."""
    code = """
import importlib.util, sys
from importlib import metadata
BASE = {"torch", "safetensors", "triton", "mapo_fast", "mapo_kernels", "kernels"}
HIDDEN = {"diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "tensorboard", "pyarrow",
          "datasets", "xformers", "rich", "typer", "pydantic", "psutil", "numpy"}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
find, version = importlib.util.find_spec, metadata.version
importlib.util.find_spec = lambda name, *a: None if name.partition(".")[0] in HIDDEN else find(name, *a)
def hidden_version(name):
    if name in HIDDEN:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = hidden_version
import runpy
runpy.run_module("mapo_fast.doctor", run_name="__main__")
"""
    root = Path(module.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    assert 'diffusers:            not installed (pip install "mapo_fast[train]")' in run.stdout
    assert "8-bit AdamW:          works on this" in run.stdout
    assert "memory:               unknown (psutil is missing" in run.stdout
    assert "loss kernels:         cannot" not in run.stdout


def test_a_probe_that_fails_becomes_a_line() -> None:
    def broken() -> str:
        warnings.warn("noise", stacklevel=1)
        raise RuntimeError("no driver\nsecond line")

    assert module._probed(broken) == "cannot be used: no driver"


@pytest.fixture
def installed_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A site folder with an installed distribution named `kernels`."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("")
    (site / "kernels-1.2.3.dist-info").mkdir()
    (site / "kernels-1.2.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 1.2.3\n"
    )
    monkeypatch.syspath_prepend(str(site))
    sys.modules.pop("kernels", None)
    yield site
    sys.modules.pop("kernels", None)


@pytest.mark.usefixtures("installed_kernels")
def test_an_installed_kernels_package_wins() -> None:
    assert module._kernels_package() == "1.2.3 (Hugging Face's)"


def test_a_shadowed_kernels_package_is_reported(
    installed_kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow = tmp_path / "project"
    (shadow / "kernels").mkdir(parents=True)
    (shadow / "kernels" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(shadow))
    found = module._kernels_package()
    assert found.startswith(f"1.2.3 is SHADOWED by {shadow}")


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert module._package("peft", "pip install peft") == "not installed (pip install peft)"


def test_an_optimizer_that_does_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from mapo_kernels.ops import adamw8bit

    monkeypatch.setattr(adamw8bit, "take_step", lambda *_: None)
    assert module._eight_bit("cpu").startswith("cannot be used")


def test_xformers_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert module._xformers("cpu") == "no: it has no CPU attention"


def test_a_model_is_described(tiny_sdxl: Path, tmp_path: Path) -> None:
    file = make_file(tiny_sdxl, tmp_path / "tiny.safetensors", dtype=torch.float16)
    for path, kind, dtype in ((tiny_sdxl, "pipeline folder", "F32"), (file, "single file", "F16")):
        text = io.StringIO()
        doctor(Console(file=text, width=300), path)
        lines = dict(line.strip().split(":", 1) for line in text.getvalue().splitlines() if ":" in line)
        assert kind in lines["model"]
        assert lines["predicts"].strip().startswith("epsilon")
        assert f"M in {dtype}" in lines["unet"]
    (tmp_path / "no.safetensors").write_bytes(bytes(100))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        doctor(Console(file=io.StringIO()), tmp_path / "no.safetensors")
