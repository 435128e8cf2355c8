"""Settings out of pictures of A1111 and ComfyUI: what is known is taken, the rest is named in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from mapo_fast.data.picture_settings import picture_settings
from mapo_fast.models.sampling import Sampling, sampling
from mapo_fast.util.errors import UserError

A1111 = (
    "a (red:1.2) cat,\nin snow\nNegative prompt: (worst quality:1.4),\nugly\n"
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1, Size: 832x1216, "
    "Model hash: 0123456789, Model: mine, Version: v1.10.1"
)


def png(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def workflow(**changes: Any) -> str:
    sampler = {
        "steps": 20, "cfg": 7, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1,
        "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0], "seed": 3,
    }  # fmt: skip
    nodes = {
        "3": node("KSampler", **sampler),
        "4": node("CheckpointLoaderSimple", ckpt_name="mine.safetensors"),
        "5": node("EmptyLatentImage", width=896, height=1152, batch_size=1),
        "6": node("CLIPTextEncode", text="a cat", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="blurry", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", images=["8", 0]),
    }
    for number, value in changes.items():
        key = number.removeprefix("n")
        nodes[key] = value if "class_type" in value else node("KSampler", **{**sampler, **value})
    return json.dumps(nodes)


def test_a1111(tmp_path: Path) -> None:
    found = picture_settings(png(tmp_path / "a.png", parameters=A1111))
    assert sampling(None, found.values, {}) == Sampling(
        steps=28,
        cfg=6.5,
        width=832,
        height=1216,
        sampler="dpmpp_2m",
        schedule="karras",
        negative="(worst quality:1.4),\nugly",
        unconditional="zeros",
        spacing="linspace",
    )
    assert found.remark == ""


@pytest.mark.parametrize(
    ("fields", "sampler", "schedule", "unknown"),
    [
        ("Sampler: Euler a, Schedule type: Automatic", "euler_ancestral", "normal", ""),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "karras", ""),
        ("Sampler: DPM++ 2M SDE Karras", "dpmpp_2m_sde", "karras", ""),
        ("Sampler: DPM++ 2M", "dpmpp_2m", "normal", ""),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "dpmpp_2m_sde", "normal",
         "schedule Automatic of DPM++ 2M SDE"),
        ("Sampler: DDIM, Schedule type: SGM Uniform", "ddim", "normal", "schedule SGM Uniform of DDIM"),
        ("Sampler: Euler a, Schedule type: Karras", "euler_ancestral", "normal",
         "schedule karras of euler_ancestral"),
        ("Sampler: Restart, Schedule type: Karras", "euler", "normal", "sampler Restart"),
        ('Sampler: Euler, Clip skip: 2, Lora hashes: "a: 1, Steps: 9", Hires upscale: 2', "euler", "normal",
         "Clip skip, Lora hashes, Hires upscale"),
        ("Sampler: Euler, Size: 30x40", "euler", "normal", "width"),
        ("Sampler: Euler, Size: x", "euler", "normal", "width, height"),
        ("Sampler: Euler, CFG scale: nan", "euler", "normal", "cfg"),
        ("Sampler: Euler, CFG scale: 1e400", "euler", "normal", "cfg"),
    ],
)  # fmt: skip
def test_fields_of_a1111(tmp_path: Path, fields: str, sampler: str, schedule: str, unknown: str) -> None:
    path = png(tmp_path / "a.png", parameters=f"a cat\nSteps: 20, {fields}")
    found = picture_settings(path)
    how = sampling(None, found.values, {})
    assert (how.sampler, how.schedule, how.steps, how.negative) == (sampler, schedule, 20, "")
    assert found.remark == (f"not taken from {path}: {unknown}" if unknown else "")


def test_comfyui(tmp_path: Path) -> None:
    found = picture_settings(png(tmp_path / "a.png", prompt=workflow(), workflow="{}"))
    assert sampling("comfyui", found.values, {}) == Sampling(
        steps=20,
        cfg=7,
        width=896,
        height=1152,
        sampler="euler_ancestral",
        negative="blurry",
        unconditional="empty",
        spacing="linspace",
    )
    assert found.remark == ""


@pytest.mark.parametrize(
    ("changes", "values", "unknown"),
    [
        ({"n3": {"sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras"}},
         {"sampler": "dpmpp_2m_sde", "schedule": "karras"}, ""),
        ({"n3": {"sampler_name": "res_multistep", "scheduler": "beta"}}, {},
         "sampler res_multistep, schedule beta"),
        ({"n3": {"steps": ["20", 0], "cfg": True}}, {}, "steps, cfg"),
        ({"n3": {"steps": 10**400}}, {}, "steps"),
        ({"n7": node("ConditioningZeroOut", conditioning=["6", 0])},
         {"negative": "", "unconditional": "zeros"}, ""),
        ({"n7": node("ConditioningCombine", a=["6", 0])}, {}, "negative, node ConditioningCombine"),
        ({"n5": node("EmptyLatentImage", width="1\n", height=2**40)}, {}, "width, height"),
        ({"n10": node("RescaleCFG", multiplier=0.7), "n11": node("\x1b[31mx", a=1)}, {},
         "node \\x1b[31mx, node RescaleCFG"),
        ({"n12": {"latent_image": ["3", 0], "steps": 9}}, {"steps": 20}, ""),  # a second pass
    ],
)  # fmt: skip
def test_graphs_of_comfyui(
    tmp_path: Path, changes: dict[str, Any], values: dict[str, Any], unknown: str
) -> None:
    path = png(tmp_path / "a.png", prompt=workflow(**changes))
    found = picture_settings(path)
    assert found.values.items() >= values.items()
    assert found.remark == (f"not taken from {path}: {unknown}" if unknown else "")
    sampling(None, found.values, {})


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({}, "it holds no settings of A1111 or ComfyUI"),
        ({"parameters": "a cat"}, "has no line «Steps:»"),
        ({"parameters": "a\nSteps: 1, " + "x" * 200_000}, "its settings have more than 20,000 characters"),
        ({"prompt": "{}"}, "no sampler that begins with an empty latent image"),
        ({"prompt": workflow(n3={"latent_image": "x"})}, "its graph is not as ComfyUI writes it"),
        ({"prompt": workflow(n20={"steps": 3})}, "more than one sampler"),
        ({"prompt": "[" * 200_000}, "nested too deeply"),
        ({"prompt": '{"3": ' + "9" * 5000 + "}"}, "its text «prompt» is not ComfyUI's"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, texts: dict[str, str], said: str) -> None:
    path = png(tmp_path / "a.png", **texts)
    with pytest.raises(UserError, match=f"--like {path}: .*{said}") as error:
        picture_settings(path)
    assert "\n" not in str(error.value)


def test_what_is_no_picture(tmp_path: Path) -> None:
    svg = tmp_path / "a.png"
    svg.write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    with pytest.raises(UserError, match="are read from PNG, JPEG and WebP files"):
        picture_settings(svg)
    with pytest.raises(UserError, match="No such file"):
        picture_settings(tmp_path / "none.png")


@pytest.mark.parametrize("piece", ["a: ", 'a: "', 'a: "\\', "a", ", ", "a: b, ", '"'])
def test_hostile_fields_take_no_time(tmp_path: Path, piece: str) -> None:
    text = f"a\nSteps: 20, {piece * (19_000 // len(piece))}"
    start = time.perf_counter()
    found = picture_settings(png(tmp_path / "a.png", parameters=text))
    assert time.perf_counter() - start < 3
    assert len(found.remark) < 1000
