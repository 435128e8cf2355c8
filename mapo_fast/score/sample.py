"""`mapo-fast sample`: a folder of images of one model, which goes on wherever it was killed.

Images are made one at a time, so each depends on the model, its prompt, its seed and the settings, and on
nothing else. An image is written whole, then listed in the manifest; what is not listed is made again.

The text encoders run before the UNet is loaded. The VAE decodes whole images, as the programs that people
sample with do: where it finds no room next to the UNet, the UNet waits in system RAM meanwhile. Images that a
card is too small to decode whole are decoded in tiles, and the manifest says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mapo_fast.hardware.cards import CONTEXT_GIB
from mapo_fast.hardware.gpu import is_out_of_memory
from mapo_fast.models.conditioning import conditionings
from mapo_fast.models.identity import encoders_identity, unet_identity
from mapo_fast.models.merge import with_loras
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sample import decode_latents, noise_seed, sample_latents
from mapo_fast.models.sampling import Sampling
from mapo_fast.models.schedulers import Method, scheduler
from mapo_fast.models.vae import decode_bytes, use_tiles
from mapo_fast.planner.stages import FP32, vae_of
from mapo_fast.run.best import FOLDER as BEST
from mapo_fast.run.convert import open_result
from mapo_fast.run.folder import AVERAGE, RECORD, remove_leftovers
from mapo_fast.run.preview_files import words
from mapo_fast.score.manifest import Made, append, resume
from mapo_fast.settings.loras import Lora
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, disk_errors, exclusive, sha256_file
from mapo_fast.util.progress import Callbacks, stage
from mapo_fast.util.signals import Interrupted, stop_file
from mapo_fast.util.sizes import GIB

if TYPE_CHECKING:
    from PIL.Image import Image


def open_for_sampling(path: Path, loras: Sequence[Lora] = ()) -> Pipeline:
    """A model: a file, a pipeline folder, a run (its result in its start model), or its `best/` or `ema/`.

    Args:
        path: of the model.
        loras: added to it, in this order.

    Raises:
        UserError: it is none of these, or lacks parts that sampling needs; a LoRA that is not for it.
    """
    if (path / RECORD).is_file():
        return with_loras(open_result(path), loras)
    if path.name in (BEST, AVERAGE) and (path.parent / RECORD).is_file():
        return with_loras(open_result(path.parent, path.name), loras)
    try:
        model = open_sdxl(path)
    except UserError as error:
        lacking, found, _ = str(error).partition(": set model.base")
        if not found:
            raise
        way_out = f"mapo-fast export {path} --to single-file --base MODEL --out FILE writes a whole model"
        raise UserError(f"{lacking}, which sampling needs: {way_out}") from None
    return with_loras(model, loras)


def sample(
    model: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    how: Sampling,
    out: Path,
    callbacks: Callbacks | None = None,
) -> int:
    """Make an image of each prompt and seed that `out` does not have yet.

    Args:
        model: to sample from.
        prompts: texts, each once.
        seeds: of each prompt.
        how: settings.
        out: folder for the images and their manifest.
        callbacks: are told about progress.

    Returns:
        The number of images that were made.

    Raises:
        UserError: the folder has images with other settings, the model cannot be sampled from, the disk.
        Interrupted: a file `stop` in the folder; it is removed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    method = Method(how.sampler, how.schedule, how.spacing)
    scheduler(model, how.steps, method)
    settings = settings_of(model, how, dtype)
    callbacks = callbacks or Callbacks()
    tiles = device.type == "cuda" and needs_tiles(
        model, how, torch.cuda.get_device_properties(device).total_memory
    )
    if tiles:
        settings["tiles"] = True
        callbacks.warning(
            f"{how.width} × {how.height} is too large for this GPU to decode whole: it is decoded in tiles, "
            "which changes colours a little"
        )
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        remove_leftovers(out)
        there = {(made.prompt, made.seed) for made in resume(out, settings)}
        left = [(prompt, seed) for prompt in prompts for seed in seeds if (prompt, seed) not in there]
        if not left:
            return 0
        distinct = list(dict.fromkeys(prompt for prompt, _ in left))
        encoded = conditionings(
            model,
            distinct,
            negative=how.negative,
            unconditional=settings["unconditional"],
            device=device,
            dtype=dtype,
        )
        by_prompt = dict(zip(distinct, encoded, strict=True))
        unet, vae = model.load_unet(dtype).to(device), model.load_vae(torch.float32).to(device)
        if tiles:
            use_tiles(vae)
        with _explained(), stage(callbacks, "images", len(left)) as advance:
            for prompt, seed in left:
                if stop_file(out):
                    raise Interrupted(0)
                latents = sample_latents(
                    unet,
                    model,
                    *by_prompt[prompt],
                    seeds=[noise_seed(prompt, seed)],
                    height=how.height,
                    width=how.width,
                    steps=how.steps,
                    guidance=how.cfg,
                    rescale=how.rescale,
                    method=method,
                    batch_size=1,
                )
                made = Made(out / file_name(prompt, seed), prompt, seed, settings)
                _save(_decoded(unet, vae, latents), made)
                append(out, made._replace(sha256=sha256_file(made.path)))
                advance(1)
    return len(left)


def needs_tiles(model: Pipeline, how: Sampling, memory: int) -> bool:
    """Whether `memory` bytes of a card are too few for the VAE to decode an image whole, all else moved away.

    It is the card's memory and not what is free now, so that an interrupted call goes on in the same way.
    """
    vae = vae_of(model)
    need = vae.nbytes + decode_bytes(vae.config, how.width * how.height, FP32) + int(CONTEXT_GIB * GIB)
    return need > memory


@contextmanager
def _explained() -> Iterator[None]:
    """Turn running out of GPU memory into one line; the images that are made stay."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of GPU memory: other programs hold it (nvidia-smi lists them), or the images are too large; "
            "the images so far are kept, and the same command goes on"
        ) from error


def settings_of(model: Pipeline, how: Sampling, dtype: torch.dtype) -> dict[str, Any]:
    """A manifest's entries for an image besides prompt and seed: everything that it depends on."""
    parts = [unet_identity(model), encoders_identity(model), model.scheduler_config]
    own = "zeros" if model.zeros_for_empty_prompt else "empty"
    return {
        "model": hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest(),
        **asdict(how),
        "unconditional": how.unconditional or own,
        "dtype": str(dtype).removeprefix("torch."),
    }


def file_name(prompt: str, seed: int) -> str:
    """An image's name: words of its prompt, a digest of all of it, and the seed."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    return "-".join(filter(None, (words(prompt), digest, str(seed)))) + ".png"


def _decoded(unet: Any, vae: Any, latents: Tensor) -> Image:
    try:
        return decode_latents(vae, latents)[0]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    device = unet.device
    unet.to("cpu")
    torch.cuda.empty_cache()
    image = decode_latents(vae, latents)[0]
    torch.cuda.empty_cache()
    unet.to(device)
    return image


def _save(image: Image, made: Made) -> None:
    """Write a PNG with its settings, in the form that A1111 and ComfyUI's tools read (`parameters`)."""
    from PIL.PngImagePlugin import PngInfo

    how, text, (width, height) = made.settings, PngInfo(), image.size
    negative = f"Negative prompt: {how['negative']}\n" if how["negative"] else ""
    text.add_itxt(
        "parameters",
        f"{made.prompt}\n{negative}Steps: {how['steps']}, Sampler: {how['sampler']}, Schedule type: "
        f"{how['schedule']}, CFG scale: {how['cfg']:g}, Seed: {made.seed}, Size: {width}x{height}",
    )
    with atomic_path(made.path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
