"""Images are decoded while others are encoded, in bounds and in order."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mapo_fast.data import latents
from mapo_fast.data.buckets import make_buckets
from mapo_fast.data.choose import ImageJob
from mapo_fast.data.images.decode import decode_image
from mapo_fast.data.latents import encode_shard, read_images
from mapo_fast.data.scan import content_hash
from mapo_fast.data.sources.base import PreferencePairs
from mapo_fast.data.sources.registry import open_source
from mapo_fast.data.vae_encoder import LatentEncoder
from mapo_fast.models.fp32 import exact_fp32
from mapo_fast.models.open import open_sdxl
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import jsonl_folder, png

COUNT = 20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PreferencePairs:
    return open_source(jsonl_folder(tmp_path_factory.mktemp("images") / "s", COUNT // 2))


@pytest.fixture
def jobs() -> list[ImageJob]:
    (bucket, *_) = [b for b in make_buckets(32, 8) if b == (32, 32)]
    keys = [content_hash(png(i)) for i in range(COUNT)]
    return [ImageJob(i // 2, i % 2 == 0, key, key, bucket) for i, key in enumerate(keys)]


class Recorder:
    """In place of an encoder: notes in which order batches are started and finished."""

    def __init__(self, wait: Any = None) -> None:
        self.order: list[str] = []
        self.pictures: list[bytes] = []
        self._wait, self._count = wait, 0

    def start(self, batch: list[Image.Image]) -> tuple[int, int]:
        if self._wait is not None:
            self._wait(len(self.pictures))
        self.order.append(f"start {self._count}")
        self.pictures += [image.tobytes() for image in batch]
        self._count += 1
        return self._count - 1, len(batch)

    def finish(self, started: tuple[int, int]) -> list[torch.Tensor]:
        number, size = started
        self.order.append(f"finish {number}")
        return [torch.full((4, 8, 8), float(number)) for _ in range(size)]


def shard(jobs: list[ImageJob], source: PreferencePairs, encoder: Any, **options: Any) -> dict[str, Any]:
    settings = {"batch_size": 2, "flip": False, "progress": lambda n: None, **options}
    return encode_shard(jobs, source, encoder, **settings)


def test_the_next_batch_is_started_before_the_last_one_is_waited_for(
    jobs: list[ImageJob], source: PreferencePairs
) -> None:
    encoder = Recorder()
    done: list[int] = []
    tensors = shard(jobs, source, encoder, progress=done.append)
    assert encoder.order[:5] == ["start 0", "start 1", "finish 0", "start 2", "finish 1"]
    assert encoder.order[-1] == "finish 9"
    assert sum(done) == COUNT
    assert encoder.pictures == [decode_image(png(i)).tobytes() for i in range(COUNT)]
    assert tensors["latents_32x32"][:, 0, 0, 0].tolist() == [float(i // 2) for i in range(COUNT)]
    assert tensors["keys_32x32"].numpy().tobytes() == b"".join(job.key for job in jobs)


def test_images_are_decoded_while_others_are_encoded_and_not_far_ahead(
    jobs: list[ImageJob], source: PreferencePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    changed = threading.Condition()

    def decode(data: bytes) -> Image.Image:
        nonlocal decoded
        with changed:
            decoded += 1
            changed.notify_all()
        return decode_image(data)

    def wait(encoded: int) -> None:
        """Wait like a busy GPU, until more is decoded than was asked for."""
        with changed:
            assert changed.wait_for(lambda: decoded >= min(COUNT, encoded + 4), timeout=60)
            assert decoded <= encoded + 2 + latents.AHEAD

    monkeypatch.setattr(latents, "decode_image", decode)
    shard(jobs, source, Recorder(wait))
    assert decoded == COUNT


def test_a_reader_that_is_no_longer_wanted_ends(jobs: list[ImageJob], source: PreferencePairs) -> None:
    before = threading.active_count()
    coming = read_images(jobs, source)
    next(coming)
    coming.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(("change", "good"), [("written", 5), ("removed", 4)])
def test_a_source_that_changed_since_the_scan_is_named_in_its_place(
    jobs: list[ImageJob], tmp_path: Path, change: str, good: int
) -> None:
    folder = jsonl_folder(tmp_path / "s", COUNT // 2)
    path = folder / "2l.png"
    source = open_source(folder)
    if change == "written":
        path.write_bytes(png(99))
    else:
        path.unlink()
    seen = []
    with pytest.raises(UserError, match=r"pairs\.jsonl:3 in data\.source changed during prepare: run"):
        seen.extend(job for job, _ in read_images(jobs, source))
    assert seen == jobs[:good]


def test_warning_filters_stay_as_they_were(jobs: list[ImageJob], source: PreferencePairs) -> None:
    before = list(warnings.filters)
    shard(jobs, source, Recorder())
    assert warnings.filters == before


def test_latents_of_a_shard_are_those_of_one_image_after_the_other(
    tiny_sdxl: Path, jobs: list[ImageJob], source: PreferencePairs
) -> None:
    encoder = LatentEncoder(open_sdxl(tiny_sdxl), "fp32", CPU)
    found = shard(jobs[:6], source, encoder, batch_size=1)["latents_32x32"]
    for i, latent in enumerate(found):
        pixels = torch.from_numpy(np.array(decode_image(png(i)))).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            want = encoder.vae.encode(pixels).latent_dist.mode()[0] * encoder.vae.config.scaling_factor
        assert torch.equal(latent, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_fp32_latents_on_a_gpu_are_fp32(
    jobs: list[ImageJob], source: PreferencePairs, tiny_sdxl: Path
) -> None:
    """TF32 has 10 bits of mantissa: its error is a thousand times that of fp32."""
    folder = open_sdxl(tiny_sdxl)
    with exact_fp32():
        gpu = LatentEncoder(folder, "fp32", torch.device("cuda"))
        found = shard(jobs, source, gpu)["latents_32x32"]
        assert torch.equal(found, shard(jobs, source, gpu)["latents_32x32"])
    exact = folder.load_vae(torch.float64)
    pixels = np.stack([np.array(decode_image(png(i))) for i in range(COUNT)])
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 127.5 - 1
        want = exact.encode(images).latent_dist.mode() * exact.config.scaling_factor
    error = (found.double() - want).norm() / want.norm()
    assert error < 100 * torch.finfo(torch.float32).eps
