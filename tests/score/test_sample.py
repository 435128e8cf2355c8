"""Folders of sampled images: killed anywhere they go on, and nothing else changes an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from mapo_fast.models.lora import add_lora, save_lora
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.sampling import Sampling, sampling, wrong
from mapo_fast.run.train import fit
from mapo_fast.score import sample as module
from mapo_fast.score.manifest import MANIFEST, Made, paired, read
from mapo_fast.score.sample import open_for_sampling, sample
from mapo_fast.settings.load import parse_config
from mapo_fast.settings.loras import Lora
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import sha256_file
from mapo_fast.util.signals import STOP_FILE, Interrupted
from tests.files_of_models import edit_file, make_file
from tests.training import make_cache, settings

PROMPTS = ["a red cat", "</script><script>alert(1)</script>", "日本語 " + "x" * 200]
HOW = Sampling(steps=2, width=32, height=48, sampler="dpmpp_2m_sde", negative="blue")


def made(folder: Path) -> dict[tuple[str, int], bytes]:
    """The pixels of each image that a folder lists."""
    return {(one.prompt, one.seed): Image.open(one.path).tobytes() for one in read(folder)}


def run(model: Path, out: Path, prompts: Sequence[str] = PROMPTS, how: Sampling = HOW, seeds: int = 2) -> int:
    return sample(open_for_sampling(model), prompts, range(seeds), how, out)


@pytest.fixture(scope="module")
def whole(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "images"
    assert run(tiny_sdxl, folder) == 6
    return folder


def test_images_and_what_they_are_made_of(whole: Path) -> None:
    images = read(whole)
    assert [(one.prompt, one.seed) for one in images] == [(p, s) for p in PROMPTS for s in (0, 1)]
    assert len({*made(whole).values()}) == 6
    for one in images:
        assert one.settings["sampler"] == "dpmpp_2m_sde"
        assert (one.settings["unconditional"], one.settings["dtype"]) == ("zeros", "float32")
        with Image.open(one.path) as image:
            assert image.size == (32, 48)
            head, negative, last = image.text["parameters"].split("\n")  # type: ignore[attr-defined]
        assert (head, negative) == (one.prompt, "Negative prompt: blue")
        assert last.startswith("Steps: 2, Sampler: dpmpp_2m_sde, Schedule type: normal, CFG scale: 5, Seed: ")
    assert {path.name for path in whole.iterdir()} >= {MANIFEST, "a-red-cat-ff966ff162b9-0.png"}


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("when", ["before the image", "before the line"])
def test_killed_anywhere_it_goes_on(
    tiny_sdxl: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, when: str
) -> None:
    calls, name = 0, "_save" if when == "before the image" else "append"
    real = getattr(module, name)

    def killed(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_sdxl, tmp_path)
    if after:
        with (tmp_path / MANIFEST).open("a") as file:
            file.write('{"file": "cut sho')
        (tmp_path / ".half.png.7.tmp").write_bytes(b"half")
    assert run(tiny_sdxl, tmp_path) == 6 - after
    assert made(tmp_path) == made(whole)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in whole.iterdir()}
    assert run(tiny_sdxl, tmp_path) == 0


def test_a_file_stops_it_between_images(
    tiny_sdxl: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.append

    def append(folder: Path, one: Made) -> None:
        real(folder, one)
        if one.seed == 1:
            (folder / STOP_FILE).touch()

    monkeypatch.setattr(module, "append", append)
    with pytest.raises(Interrupted):
        run(tiny_sdxl, tmp_path)
    assert len(read(tmp_path)) == 2
    monkeypatch.undo()
    assert run(tiny_sdxl, tmp_path) == 4
    assert made(tmp_path) == made(whole)


def test_an_image_depends_on_its_prompt_and_seed_alone(tiny_sdxl: Path, whole: Path, tmp_path: Path) -> None:
    assert run(tiny_sdxl, tmp_path, PROMPTS[2:], seeds=1) == 1
    assert run(tiny_sdxl, tmp_path, PROMPTS[::-1]) == 5
    assert made(tmp_path) == made(whole)


def test_missing_and_changed_images_are_made_again(tiny_sdxl: Path, whole: Path, tmp_path: Path) -> None:
    run(tiny_sdxl, tmp_path, PROMPTS[:1], seeds=3)
    missing, changed, _ = read(tmp_path)
    missing.path.unlink()
    changed.path.write_bytes(changed.path.read_bytes()[:-20])
    assert run(tiny_sdxl, tmp_path, PROMPTS[:1], seeds=3) == 2
    assert {one.sha256 for one in read(tmp_path)} == {sha256_file(one.path) for one in read(tmp_path)}
    assert made(tmp_path).items() >= {(PROMPTS[0], 0): made(whole)[PROMPTS[0], 0]}.items()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 3}, "have steps = 2, now it is 3"),
        ({"negative": ""}, "have negative = 'blue', now it is ''"),
        ({"spacing": "linspace"}, "have spacing = None, now it is 'linspace'"),
    ],
)
def test_other_settings_are_refused(whole: Path, tiny_sdxl: Path, changes: dict[str, Any], said: str) -> None:
    before = (whole / MANIFEST).read_bytes()
    with pytest.raises(UserError, match=f"{said}: name another folder as --out"):
        run(tiny_sdxl, whole, how=Sampling(**{**vars(HOW), **changes}))
    assert (whole / MANIFEST).read_bytes() == before


def test_another_model_is_refused_and_has_the_same_noise(
    tiny_sdxl: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = open_sdxl(tiny_sdxl).load_unet()
    add_lora(unet, rank=4, alpha=4, targets=["to_q", "to_v"], seed=0)
    with torch.no_grad():
        for name, factor in unet.named_parameters():
            if "lora_" in name:
                factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(0)))
    save_lora(unet, tmp_path / "lora")
    other = open_for_sampling(tiny_sdxl, [Lora(tmp_path / "lora" / "lora_kohya.safetensors", 0.5)])
    with pytest.raises(UserError, match="have model = '"):
        sample(other, PROMPTS, range(2), HOW, whole)
    seeds: list[Sequence[int]] = []
    real = module.sample_latents

    def watched(*args: Any, **kwargs: Any) -> Any:
        seeds.append(kwargs["seeds"])
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "sample_latents", watched)
    sample(other, PROMPTS[:1], range(2), HOW, tmp_path / "other")
    run(tiny_sdxl, tmp_path / "same", PROMPTS[:1])
    assert seeds[:2] == seeds[2:]
    assert [len(images) for images in paired([tmp_path / "same", tmp_path / "other"])] == [2, 2]
    assert not {*made(tmp_path / "other").values()} & {*made(whole).values()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_is_its_result_over_its_start_model(tiny_sdxl: Path, tmp_path: Path, kind: str) -> None:
    cache = make_cache(tiny_sdxl, tmp_path)
    table = settings(tiny_sdxl, cache, tmp_path / "run", train={"steps": 2}, adapter={"kind": kind})
    assert fit(parse_config(table)).finished
    model = open_for_sampling(tmp_path / "run")
    start = open_sdxl(tiny_sdxl)
    if kind == "full":
        expected = open_sdxl(tiny_sdxl, unet=tmp_path / "run" / "unet")
    else:
        expected = open_for_sampling(
            tiny_sdxl, [Lora(tmp_path / "run" / "lora" / "lora_kohya.safetensors", 1.0)]
        )
    found, wanted = model.load_unet().state_dict(), expected.load_unet().state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not all(torch.equal(found[n], before) for n, before in start.load_unet().state_dict().items())
    how = Sampling(steps=2, width=32, height=32)
    sample(model, PROMPTS[:1], [0], how, tmp_path / "a")
    sample(expected, PROMPTS[:1], [0], how, tmp_path / "b")
    assert made(tmp_path / "a") == made(tmp_path / "b")


def test_a_model_without_a_part_says_how_to_get_it(tiny_sdxl: Path, tmp_path: Path) -> None:
    path = make_file(tiny_sdxl, tmp_path / "model.safetensors")

    def without_vae(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    edit_file(path, without_vae)
    with pytest.raises(
        UserError, match=r"has no VAE, which sampling needs: mapo-fast export .* --base MODEL"
    ):
        open_for_sampling(path)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"steps": 0}, "--steps 0: steps must be 1 to 1000"),
        ({"cfg": float("nan")}, "--cfg nan: cfg must be 0 to 100"),
        ({"rescale": 1.5}, "--rescale 1.5: rescale must be 0 to 1"),
        ({"width": 30}, "--size 30: width must be a multiple of 8"),
        ({"height": 10_000}, "--size 10000: height must be a multiple of 8, at most 4096"),
        ({"sampler": "heun"}, "--sampler 'heun': sampler must be one of euler, euler_ancestral, "),
        ({"schedule": "beta"}, "--schedule 'beta': schedule must be one of normal, karras"),
        ({"unconditional": "no"}, "--unconditional 'no': unconditional must be one of zeros, empty"),
        ({"negative": "x" * 10_001}, "negative must have at most 10,000 characters"),
    ],
)
def test_wrong_settings_are_named(stated: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        sampling(None, {}, stated)
    assert said in str(error.value)


def test_what_is_stated_wins_over_a_picture_and_that_over_a_preset() -> None:
    found = sampling("comfyui", {"steps": 30, "cfg": 6.0}, {"cfg": 4.0})
    assert found == Sampling(steps=30, cfg=4.0, unconditional="empty", spacing="linspace")
    assert all(wrong(name, value) is None for name, value in vars(found).items())
    with pytest.raises(UserError, match="--preset a1111: one of comfyui"):
        sampling("a1111", {}, {})


def test_manifest_lines_hold_everything(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / MANIFEST).read_text(encoding="utf-8").splitlines()]
    assert {frozenset(line) for line in lines} == {
        frozenset({"file", "prompt", "seed", "settings", "sha256"})
    }
    assert {*lines[0]["settings"]} == {*vars(HOW), "model", "dtype"}
    assert np.isfinite(lines[0]["settings"]["cfg"])


def test_only_what_a_card_cannot_decode_whole_is_decoded_in_tiles(tiny_sdxl: Path) -> None:
    class Full:
        """SDXL's own VAE, which needs 3 GiB for 1024 × 1024 pixels and 0.3 GiB for its weights."""

        def config(self, part: str) -> dict[str, Any]:
            return {
                "block_out_channels": [128, 256, 512, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
                "layers_per_block": 2,
            }

    model: Any = Full()
    assert not module.needs_tiles(model, Sampling(), 4 * 2**30)
    assert module.needs_tiles(model, Sampling(), 3 * 2**30)
    assert module.needs_tiles(model, Sampling(width=2048, height=2048), 12 * 2**30)
    assert not module.needs_tiles(open_sdxl(tiny_sdxl), HOW, 2**30)


def test_the_unet_waits_in_ram_where_the_vae_finds_no_room(
    tiny_sdxl: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every first attempt to decode runs out of memory; the images are the same."""
    real, attempts, moves = module.decode_latents, 0, []

    def first_fails(*args: Any) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts % 2:
            raise torch.OutOfMemoryError("no room")
        return real(*args)

    def to(unet: Any, where: Any) -> Any:
        moves.append(str(where))
        return unet

    monkeypatch.setattr(module, "decode_latents", first_fails)
    monkeypatch.setattr(UNet2DConditionModel, "to", to)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert run(tiny_sdxl, tmp_path / "out") == 6
    assert made(tmp_path / "out") == made(whole)
    assert moves[-2:] == ["cpu", "cpu"]


def test_running_out_of_memory_keeps_the_images_so_far(
    tiny_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = module.decode_latents, 0

    def third_fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= 3:
            raise torch.OutOfMemoryError("no room")
        return real(*args)

    monkeypatch.setattr(module, "decode_latents", third_fails)
    with pytest.raises(UserError, match=r"out of GPU memory: .* the images so far are kept"):
        run(tiny_sdxl, tmp_path / "out")
    assert len(read(tmp_path / "out")) == 2
