"""What a result's files say of it: a thumbnail, and prompts and paths only where they are wanted."""

from __future__ import annotations

import base64
import getpass
import io
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mapo_fast.run.convert import convert
from mapo_fast.run.metadata import THUMBNAIL, _thumbnail
from mapo_fast.run.train import fit
from mapo_fast.util.tensorheader import read_header
from tests.training import make_cache, make_config

PROMPT = "an unmistakable heron"
RESULTS = {
    "lora": ("lora/lora_kohya.safetensors", "lora/pytorch_lora_weights.safetensors"),
    "full": ("model.safetensors",),
}


def picture(previews: Path, step: int, size: tuple[int, int] = (512, 300)) -> None:
    folder = previews / f"step-{step:08d}"
    folder.mkdir(parents=True)
    Image.new("RGB", size, (step, 0, 0)).save(folder / "00.png")


def shown(url: str | None) -> Image.Image:
    assert url is not None
    kind, data = url.split(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_a_thumbnail_is_the_last_preview_made_small(tmp_path: Path) -> None:
    assert _thumbnail(tmp_path, None) is None
    picture(tmp_path, 10)
    picture(tmp_path, 200)
    image = shown(_thumbnail(tmp_path, None))
    assert (image.format, image.size) == ("JPEG", (THUMBNAIL, 150))
    assert image.getpixel((9, 9))[0] == pytest.approx(200, abs=3)  # type: ignore[index]
    assert shown(_thumbnail(tmp_path, 10)).getpixel((9, 9))[0] == pytest.approx(10, abs=3)  # type: ignore[index]
    assert _thumbnail(tmp_path, 11) is None
    (tmp_path / "step-00000200" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert _thumbnail(tmp_path, None) is None


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_sdxl, tmp_path_factory.mktemp("secretfolder"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("prompts", [False, True])
def test_prompts_and_paths_are_written_only_where_wanted(
    tiny_sdxl: Path, cache: Path, tmp_path: Path, kind: str, prompts: bool
) -> None:
    run = tmp_path / "run"
    sections: dict[str, Any] = {
        "adapter": {"kind": "lora", "rank": 2} if kind == "lora" else {"kind": "full"},
        "train": {"steps": 1, "checkpoint_every": 1},
        "preview": {"prompts": [PROMPT], "steps": 1},
        "export": {"prompts": prompts},
    }
    fit(make_config(tiny_sdxl, cache, run, **sections))
    convert(run, "kohya" if kind == "lora" else "single-file", tmp_path / "result.safetensors")
    convert(run, "kohya" if kind == "lora" else "single-file", tmp_path / "step.safetensors", step=1)
    for file in [
        *(run / name for name in RESULTS[kind]),
        tmp_path / "result.safetensors",
        tmp_path / "step.safetensors",
    ]:
        said = read_header(file).metadata
        assert shown(said["modelspec.thumbnail"]).size == (32, 32)
        text = json.dumps(said)
        for private in (PROMPT, "secretfolder", str(tmp_path)):
            assert (private in text) == (prompts and private != str(tmp_path)), (file.name, private)
        if prompts:
            assert json.loads(said["mapo_fast.prompts"]) == [PROMPT]
            assert said["mapo_fast.data"] == str(cache)
        else:
            assert not [key for key in said if key in ("mapo_fast.prompts", "mapo_fast.data")]
        for name in (socket.gethostname(), getpass.getuser()):
            assert not [key for key, value in said.items() if value == name or f"/{name}/" in value]
    card = (run / "README.md").read_text()
    assert (PROMPT in card) == prompts
    assert "secretfolder" not in card


@pytest.mark.slow
def test_without_metadata_there_is_no_thumbnail(tiny_sdxl: Path, cache: Path, tmp_path: Path) -> None:
    sections = {"train": {"steps": 1}, "preview": {"prompts": [PROMPT], "steps": 1}}
    run = tmp_path / "run"
    fit(make_config(tiny_sdxl, cache, run, **sections, export={"metadata": False, "prompts": True}))
    assert not read_header(run / "model.safetensors").metadata.keys() - {"format"}
    fit(make_config(tiny_sdxl, cache, run2 := tmp_path / "other", **sections, export={"prompts": True}))
    convert(run2, "single-file", tmp_path / "o.safetensors", with_metadata=False)
    assert not read_header(tmp_path / "o.safetensors").metadata.keys() - {"format"}
