"""Prompts in pictures: those of A1111 and ComfyUI are found, and nothing is guessed."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from mapo_fast.data.picture_prompts import picture_prompt
from mapo_fast.data.picture_texts import TEXT_BYTES, NoPromptError
from tests.data.pair_sources import encoded, picture

A1111 = (
    "a (red:1.2) cat,\nin snow\nNegative prompt: blurry\nugly\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"
)


def written(path: Path, *, zip: bool = False, itxt: bool = False, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        if itxt:
            info.add_itxt(name, text, zip=zip)
        else:
            info.add_text(name, text, zip=zip)
    path.write_bytes(encoded(picture(0), pnginfo=info))
    return path


def with_comment(path: Path, kind: str, comment: bytes, order: str = "<") -> Path:
    """A picture with an EXIF comment, as piexif writes it."""
    tiff = b"II*\0" if order == "<" else b"MM\0*"
    tiff += struct.pack(f"{order}IHHHIII", 8, 1, 0x8769, 4, 1, 26, 0)
    tiff += struct.pack(f"{order}HHHIII", 1, 0x9286, 7, len(comment), 44, 0) + comment
    path.write_bytes(encoded(picture(0), kind, exif=b"Exif\0\0" + tiff))
    return path


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def graph(**nodes: dict[str, Any]) -> str:
    return json.dumps({key.removeprefix("n"): value for key, value in nodes.items()})


SAMPLER = node("KSampler", positive=["6", 0], negative=["7", 0], latent_image=["5", 0], seed=1)
NEGATIVE = node("CLIPTextEncode", text="blurry", clip=["4", 1])
CAT = node("CLIPTextEncode", text="a red cat\n", clip=["4", 1])


@pytest.mark.parametrize("zip", [False, True])
@pytest.mark.parametrize("itxt", [False, True])
def test_parameters_of_a1111_in_a_png(tmp_path: Path, zip: bool, itxt: bool) -> None:
    assert picture_prompt(written(tmp_path / "a.png", zip=zip, itxt=itxt, parameters=A1111)) == (
        "a (red:1.2) cat,\nin snow"
    )


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "猫 café\nSteps: 20, Sampler: x".encode("utf-16-be"),
        b"UNICODE\0" + "猫 café\nSteps: 20, Sampler: x".encode("utf-16-le"),
        b"ASCII\0\0\0" + "猫 café\nSteps: 20, Sampler: x".encode(),
    ],
    ids=["big end first", "little end first", "utf-8"],
)
def test_the_comment_of_a_jpeg_or_webp(tmp_path: Path, kind: str, order: str, comment: bytes) -> None:
    assert picture_prompt(with_comment(tmp_path / "a", kind, comment, order)) == "猫 café"


def test_the_graph_of_comfyui_in_a_webp(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + graph(n3=SAMPLER, n6=CAT, n7=NEGATIVE)
    exif[0x010F] = "workflow:{}"
    (tmp_path / "a.webp").write_bytes(encoded(picture(0), "WEBP", exif=exif))
    assert picture_prompt(tmp_path / "a.webp") == "a red cat"


FOUND = {
    "plain": {"n3": SAMPLER, "n6": CAT, "n7": NEGATIVE},
    "a text node": {
        "n3": SAMPLER,
        "n6": node("CLIPTextEncode", text=["9", 0]),
        "n9": node("PrimitiveStringMultiline", value="a red cat"),
    },
    "SDXL's two encoders": {
        "n3": SAMPLER,
        "n6": node("CLIPTextEncodeSDXL", text_g="a red cat", text_l="a red cat"),
    },
    "ControlNet": {
        "n3": node("KSampler", positive=["8", 0], latent_image=["5", 0]),
        "n8": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0]),
        "n6": CAT,
        "n7": NEGATIVE,
    },
    "base and refiner": {
        "n3": SAMPLER,
        "n6": CAT,
        "n10": node("KSamplerAdvanced", positive=["11", 0], latent_image=["3", 0]),
        "n11": node("CLIPTextEncodeSDXLRefiner", text="a red cat"),
    },
}
NOT_FOUND = {
    "no sampler": ({"n6": CAT}, "its graph has no sampler"),
    "two prompts": (
        {
            "n3": SAMPLER,
            "n6": CAT,
            "n8": node("KSampler", positive=["7", 0], latent_image=[]),
            "n7": NEGATIVE,
        },
        "its samplers have different prompts",
    ),
    "two encoders": (
        {"n3": SAMPLER, "n6": node("CLIPTextEncodeSDXL", text_g="a", text_l="b")},
        "its two text encoders have different prompts",
    ),
    "combined": (
        {"n3": SAMPLER, "n6": node("ConditioningCombine", conditioning_1=["7", 0]), "n7": NEGATIVE},
        "its prompt comes from a node that is not followed, 'ConditioningCombine'",
    ),
    "computed text": (
        {
            "n3": SAMPLER,
            "n6": node("CLIPTextEncode", text=["9", 0]),
            "n9": node("Wildcards", value="a {b|c}"),
        },
        "its prompt comes from a node that is not followed, 'Wildcards'",
    ),
    "the negative": (
        {
            "n3": node("KSampler", positive=["8", 1], latent_image=["5", 0]),
            "n8": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0]),
            "n6": CAT,
        },
        "its prompt comes from a node that is not followed, 'ControlNetApplyAdvanced'",
    ),
    "a circle": (
        {"n3": SAMPLER, "n6": node("ControlNetApply", conditioning=["6", 0])},
        "its prompt comes from a node that is not followed, 'ControlNetApply'",
    ),
    "no link": (
        {"n3": node("KSampler", positive=3, latent_image=0)},
        "its graph is not as ComfyUI writes it",
    ),
    "blank": ({"n3": SAMPLER, "n6": node("CLIPTextEncode", text=" ")}, "its prompt is empty"),
    "half a surrogate pair": (
        {"n3": SAMPLER, "n6": node("CLIPTextEncode", text="\ud800")},
        "its prompt is not valid Unicode",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_positive_prompt_of_a_graph(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "a.png", prompt=graph(**FOUND[case]), workflow="{}")
    assert picture_prompt(path) == "a red cat"


@pytest.mark.parametrize("case", NOT_FOUND)
def test_what_is_not_certain_is_not_guessed(tmp_path: Path, case: str) -> None:
    nodes, line = NOT_FOUND[case]
    with pytest.raises(NoPromptError) as caught:
        picture_prompt(written(tmp_path / "a.png", prompt=graph(**nodes)))
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        ({}, "it holds no prompt of A1111 or ComfyUI"),
        ({"Comment": A1111}, "it holds no prompt of A1111 or ComfyUI"),
        ({"parameters": "a cat"}, "its text «parameters» has no line «Steps:»"),
        ({"parameters": "Negative prompt: x\nSteps: 1, Sampler: y"}, "its prompt is empty"),
        ({"prompt": "a cat"}, "its text «prompt» is not ComfyUI's"),
        ({"prompt": "[" * 100_000}, "its text «prompt» is not ComfyUI's: it is nested too deeply"),
        ({"prompt": "[1]"}, "its graph has no sampler"),
        ({"prompt": '{"1": 1, "2": {"class_type": 1, "inputs": 2}}'}, "its graph has no sampler"),
    ],
)
def test_texts_that_are_no_prompt(tmp_path: Path, texts: dict[str, str], line: str) -> None:
    with pytest.raises(NoPromptError) as caught:
        picture_prompt(written(tmp_path / "a.png", **texts))
    assert str(caught.value).startswith(line)


def test_large_and_damaged_texts_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for zip in (False, True):
        written(path, zip=zip, parameters="x" * TEXT_BYTES + A1111)
        with pytest.raises(NoPromptError, match="holds no prompt"):
            picture_prompt(path)
    data = written(path, parameters=A1111).read_bytes()
    path.write_bytes(data.replace(b"red", b"rod"))  # the checksum tells
    with pytest.raises(NoPromptError, match="holds no prompt"):
        picture_prompt(path)
    bad = zlib.compress(A1111.encode())[:-9]
    chunk = b"zTXtparameters\0\0" + bad
    part = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    plain = encoded(picture(0))
    path.write_bytes(plain[:33] + part + plain[33:])
    with pytest.raises(NoPromptError, match="holds no prompt"):
        picture_prompt(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_is_cut_off_anywhere_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "PNG":
        written(path, parameters=A1111)
    else:
        with_comment(path, kind, b"UNICODE\0" + A1111.encode("utf-16-be"))
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        try:
            assert picture_prompt(path) == "a (red:1.2) cat,\nin snow"
        except NoPromptError:
            continue
    for at in range(min(len(data), 900)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            picture_prompt(path)
        except NoPromptError:
            continue


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(encoded(picture(0), "GIF"))
    for path, line in {
        tmp_path / "a.gif": "prompts are read from PNG, JPEG and WebP files",
        tmp_path / "b.png": "No such file or directory",
    }.items():
        with pytest.raises(NoPromptError, match=line):
            picture_prompt(path)
