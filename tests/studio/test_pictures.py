"""What is found in folders as people have them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from mapo_fast.studio.pictures import Progress
from mapo_fast.studio.project import Project
from mapo_fast.util.errors import UserError
from tests.studio.conftest import Opener
from tests.studio.pictures import painted


def _png_of(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def scanned(folder: Path) -> Project:
    project = Project.open(folder)
    list(project.scan())
    return project


def test_broken_files_are_listed_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    secret = painted(tmp_path / "elsewhere.png", 1, prompt="x")
    painted(folder / "good.png", 2, prompt="p")
    (folder / "empty.png").touch()
    (folder / "huge.png").write_bytes(_png_of(60_000, 60_000))
    (folder / "flat.png").write_bytes(_png_of(0, 5))
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "drawing.png").write_text("<svg onload='alert(1)'/>")
    (folder / "page.html").write_text("<script>")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    (folder / "link.png").symlink_to(secret)
    (folder / "folder.png").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "fifo.png")
    with scanned(folder) as project:
        broken = {picture.path: picture.broken for picture in project.broken()}
        assert [picture.path for picture in project.pictures()] == ["good.png"]
        assert all(project.picture_file(picture.id) is None for picture in project.broken())
    assert broken.pop("fifo.png", "a FIFO").count("FIFO")
    assert broken == {
        "empty.png": "it is empty (0 bytes)",
        "huge.png": "it has 60,000 x 60,000 pixels: at most 100,000,000 are read",
        "flat.png": "its size is 0",
        "drawing.svg": "it is no PNG, JPEG or WebP picture: convert it",
        "drawing.png": "it is no PNG, JPEG or WebP picture: convert it",
        "page.html": "it is no PNG, JPEG or WebP picture: convert it",
        "cut.jpg": "it is a JPEG file that is damaged or cut off",
        "link.png": "it is a link: copy the picture itself into the folder",
    }


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("size", [(1, 1), (300, 7), (17, 2000)])
def test_sizes_are_read_from_the_first_bytes(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    picture = Image.effect_noise(size, 50)
    picture.save(folder / f"a.{kind}")
    if kind == "webp":
        picture.convert("RGBA").save(folder / "b.webp", lossless=True)
        picture.save(folder / "c.webp", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    if kind == "jpg":
        picture.save(folder / "b.jpg", progressive=True)
    with scanned(folder) as project:
        assert {(p.width, p.height) for p in project.pictures()} == {size}
        assert not project.broken()


def test_prompts_come_from_metadata_then_texts_and_all_are_kept_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    long = "x" * 10_000
    hostile = "<script>alert(1)</script> '; drop table pictures; --"
    painted(folder / "a.png", 1, prompt=hostile, model="m1", sampler="DPM++ 2M", lora="style")
    painted(folder / "b.png", 2)
    (folder / "b.txt").write_text(f"\ufeff{long}\n", encoding="utf-8")
    painted(folder / "c.png", 3)
    (folder / "c.caption").write_text("from a caption")
    painted(folder / "d.png", 4)
    (folder / "d.txt").write_bytes(b"\xff\xfe")
    painted(folder / "e.png", 5, prompt="of metadata")
    (folder / "e.txt").write_text("of a text")
    with scanned(folder) as project:
        found = {p.path: p for p in project.pictures()}
    assert found["a.png"].prompt == hostile
    assert found["a.png"][-5:-1] == ("m1", "DPM++ 2M", "style", "1")
    assert [found[f"{name}.png"].prompt for name in "bcde"] == [long, "from a caption", None, "of metadata"]
    assert "d.txt cannot be read" in found["d.png"].why


def _comfy(path: Path, graph: object) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (8, 8), (len(path.name), 5, 5)).save(path, pnginfo=info)


def _graph(**nodes: tuple[str, dict[str, object]]) -> dict[str, object]:
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def test_comfyui_s_facts_count_where_they_are_certain(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    sampler = {"positive": ["t", 0], "latent_image": ["l", 0], "seed": 7, "sampler_name": "euler"}
    common = {
        "m": ("CheckpointLoaderSimple", {"ckpt_name": "base.safetensors"}),
        "a": ("LoraLoader", {"lora_name": "dir\\one.safetensors", "model": ["m", 0]}),
        "t": ("CLIPTextEncode", {"text": "a cat"}),
    }
    _comfy(folder / "a.png", _graph(**common, s=("KSampler", sampler)))
    _comfy(
        folder / "bb.png",
        _graph(**common, n=("Strange", {}), s=("KSampler", {**sampler, "positive": ["n", 0]})),
    )
    with scanned(folder) as project:
        a, b = project.pictures()
        assert [p.path for p in project.unknown()] == ["bb.png"]
    assert (a.prompt, *a[-5:-1]) == (
        "a cat",
        "base.safetensors",
        "euler",
        "one",
        "7",
    )
    assert (b.prompt, b.model, b.seed) == (None, "base.safetensors", "7")
    assert "comes from a node that is not followed, 'Strange'" in b.why


def test_equal_files_count_once(opened: Opener, folder: Path) -> None:
    shutil.copy(folder / "03-1.png", folder / "copy.png")
    project = opened()
    copies = [picture for picture in project.pictures(limit=500) if picture.of is not None]
    assert [picture.path for picture in copies] == ["copy.png"]
    assert project.picture(copies[0].of or 0)[1] == "03-1.png"  # type: ignore[index]
    assert {group.size for group in project.groups()} == {4}


def test_a_scan_again_reads_only_what_has_changed(opened: Opener, folder: Path) -> None:
    project = opened()
    assert [*project.scan()][-1] == Progress(120, 0, 0, done=True)
    (folder / "00-0.png").unlink()
    painted(folder / "00-1.png", 5000, prompt="changed")
    (folder / "05-0.txt").write_text("beside it")
    assert [*project.scan()][-1][:2] == (119, 2)
    assert len(project.pictures(limit=500)) == 119
    assert "changed" in [group.prompt for group in project.groups()]


def test_a_scan_that_is_stopped_removes_nothing(opened: Opener) -> None:
    project = opened()
    stops = iter([False] * 50 + [True] * 500)
    assert [*project.scan(lambda: next(stops))][-1].done
    assert len(project.pictures(limit=500)) == 120


def test_runs_and_comparisons_are_not_voted_on(opened: Opener, folder: Path) -> None:
    for name in ("runs", "comparisons", "jobs", "configs"):
        painted(folder / name / "x" / "a.png", 1, prompt="p")
    painted(folder / ".hidden" / "a.png", 1, prompt="p")
    painted(folder / "candidates" / "a.png", 1, prompt="new")
    project = opened()
    assert len(project.pictures(limit=500)) == 121


def test_other_folders_are_taken_in_and_remembered(opened: Opener, tmp_path: Path) -> None:
    other = painted(tmp_path / "other folder" / "a.png", 1, prompt="there").parent
    opened().add_folder(other)
    project = opened()
    assert [p.path for p in project.pictures(limit=500) if p.prompt == "there"] == [f"{other}/a.png"]


def test_a_folder_that_vanishes_is_one_sentence(opened: Opener, folder: Path) -> None:
    project = opened()
    pair = project.next_pair("a")
    assert pair is not None
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="cannot"):
        project.vote(pair.id, "left", 1)
    with pytest.raises(UserError, match="cannot read the folder"):
        list(project.scan())
    assert len(project.votes) == 0
    with pytest.raises(UserError, match="is not a folder"):
        Project.open(folder)
    folder.mkdir()


def test_a_full_disk_in_a_vote_is_one_sentence_and_the_pair_stays(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = opened()
    pair = project.next_pair("a")
    assert pair is not None

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(UserError, match="the disk is full"):
            project.vote(pair.id, "left", 1)
    assert project.next_pair("a") == pair
    assert project.vote(pair.id, "left", 1)


@pytest.mark.parametrize("prompt", ["", "  ", "x" * 70_000])
def test_prompts_that_cannot_be_are_refused(opened: Opener, prompt: str) -> None:
    with pytest.raises(UserError, match="a prompt has 1 to"):
        opened().set_prompt([1], prompt)
