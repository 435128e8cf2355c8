"""A prepared cache, and pipelines that differ from the tiny one in one part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mapo_fast.data.prepare import prepare
from tests.data.pair_sources import config, jsonl_folder


@pytest.fixture(scope="session")
def prepared(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of 12 pairs in `../s`; tests must not write into it."""
    folder = tmp_path_factory.mktemp("prepared")
    source = jsonl_folder(folder / "s", 12)
    prepare(config(tiny_sdxl, source, folder / "c"))
    return folder / "c"


@pytest.fixture
def other_model(tiny_sdxl: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the tiny pipeline in which one component has other weights (or another vocabulary)."""

    def make(part: str) -> Path:
        model = tmp_path / f"other-{part}"
        shutil.copytree(tiny_sdxl, model)
        if part.startswith("tokenizer"):
            path = model / part / "tokenizer_config.json"
            settings = json.loads(path.read_text())
            path.write_text(json.dumps(settings | {"pad_token": "?"}))
            return model
        path = next((model / part).glob("*.safetensors"))
        tensors = load_file(path)
        name = max(tensors, key=lambda n: tensors[n].numel())
        tensors[name] *= 1.001  # as a little training would, it moves every value
        save_file(tensors, path, metadata={"format": "pt"})
        return model

    return make


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "c"))
