"""Real photographs: `python -m mapo_fast.demo.photographs --out DIR`.

Writes a parquet file in the format of Pick-a-Pic v2 from the photographs that scikit-image and scikit-learn
ship in their wheels (`pip install 'mapo_fast[examples]'`; nothing is downloaded), and a config that trains on
it with the same two commands as any other data:

    mapo-fast prepare DIR/config.toml
    mapo-fast train DIR/config.toml
    python -m mapo_fast.demo.photographs --score DIR

Chosen is a crop of a photograph, rejected the same crop degraded in one of several ways; which of the two is
`jpg_0` is drawn per row. All crops of one photograph have one caption, so they form one connected component
of the split by prompt and image content: the held-out pairs are of photographs that were not trained on. The
two views of the motorcycle share a caption, because they show the same scene.

The tiny SDXL has never seen a photograph, so its predictions move far and the trainer warns of drift; that
is expected here.

The columns `kind` and `photograph` are not part of Pick-a-Pic; the last command uses them to say, for each
kind of degradation, how the preference accuracy on the held-out photographs changed from the untrained start:
the same pairs, timesteps and noise for both models.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter
from rich.console import Console
from rich.table import Table

from mapo_fast.settings.load import load_config
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, disk_errors, one_line

SIDE = 64
"""Side of a crop as it is written, pixels."""

PHOTOGRAPHS: dict[str, str] = {
    "skimage/data/astronaut.png": "a portrait of an astronaut",
    "skimage/data/brick.png": "a brick wall",
    "skimage/data/camera.png": "a man behind a camera",
    "skimage/data/cell.png": "a cell under a microscope",
    "skimage/data/chelsea.png": "the face of a cat",
    "skimage/data/clock_motion.png": "a clock in motion",
    "skimage/data/coffee.png": "a cup of coffee",
    "skimage/data/coins.png": "ancient coins",
    "skimage/data/grass.png": "grass from above",
    "skimage/data/gravel.png": "gravel from above",
    "skimage/data/hubble_deep_field.jpg": "distant galaxies",
    "skimage/data/ihc.png": "stained tissue",
    "skimage/data/moon.png": "the surface of the moon",
    "skimage/data/motorcycle_left.png": "a motorcycle in a workshop",
    "skimage/data/motorcycle_right.png": "a motorcycle in a workshop",
    "skimage/data/page.png": "a page of an old book",
    "skimage/data/retina.jpg": "the retina of an eye",
    "skimage/data/rocket.jpg": "a rocket at night",
    "sklearn/datasets/images/china.jpg": "a temple in China",
    "sklearn/datasets/images/flower.jpg": "a flower",
}
"""File inside the installed packages -> caption. Drawings, masks and logos they also ship are left out."""


def _pixelate(image: Image.Image, rng: random.Random) -> Image.Image:
    small = image.resize((SIDE // 4, SIDE // 4), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


DEGRADATIONS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "blur": lambda image, rng: image.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 2.5))),
    "pixelated": _pixelate,
    "smudged": lambda image, rng: image.filter(ImageFilter.MedianFilter(rng.choice((5, 7)))),
    "low_contrast": lambda image, rng: ImageEnhance.Contrast(image).enhance(rng.uniform(0.3, 0.5)),
    "dark": lambda image, rng: ImageEnhance.Brightness(image).enhance(rng.uniform(0.3, 0.5)),
}
"""Kind -> how it spoils a crop. Kinds that the untrained model prefers, so that there is something to learn.

Gaussian noise and JPEG blocks are left out: the untrained model already finds them harder than the original
in 99 % and 77 % of the draws, and training on all kinds together did not raise that (noise −0.07 ± 0.09, JPEG
−0.18 ± 0.21 after 400 steps)."""

_CONFIG = """\
# Written by `python -m mapo_fast.demo.photographs`; paths are relative to this file.
#   mapo-fast prepare config.toml
#   mapo-fast train config.toml

[model]
path = {model}

[data]
source = "photographs.parquet"
cache = "cache"
resolution = {side}
bucket_step = {side}
batch_size = 4         # images that go through the VAE together
held_out = 0.3         # by photograph: all crops of one share a caption

[objective]
name = "mapo"
form = "code"

[adapter]
kind = "full"

[optim]
lr = 1e-4
warmup_steps = 20
max_grad_norm = 1.0

[train]
output = "run"
steps = 100
pairs_per_batch = 4
precision = "fp32"
layout = "joint"
gradient_checkpointing = false
threads = 1            # more gain little on a model this small, and lose much where the cores are busy
seed = {seed}
log_every = 10
checkpoint_every = 0   # only at the end
evaluate_every = 50
evaluate_pairs = 24
"""


def write_photographs(out: Path, seed: int = 0, crops: int = 6) -> Path:
    """Write `photographs.parquet` and `config.toml` into the new folder `out`; returns the config's path.

    Args:
        out: a folder that does not exist or is empty.
        seed: of crops, degradations and order; also the training's seed.
        crops: crops per photograph; each gives one pair per kind of degradation.

    Raises:
        UserError: `out` is not empty, or scikit-image and scikit-learn are not installed.
    """
    from mapo_fast.demo.run import TINY_SDXL

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not an empty folder: choose another (nothing was changed)")
    photographs = {name: _load(name) for name in PHOTOGRAPHS}
    rng = random.Random(f"photographs {seed}")
    rows = [
        _row(name, kind, crop, rng)
        for name, photograph in photographs.items()
        for crop in (_crop(photograph, rng) for _ in range(crops))
        for kind in DEGRADATIONS
    ]
    rng.shuffle(rows)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with atomic_path(out / "photographs.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary)
        text = _CONFIG.format(model=json.dumps(TINY_SDXL.resolve().as_posix()), side=SIDE, seed=seed)
        (out / "config.toml").write_text(text, encoding="utf-8")
    return out / "config.toml"


def _load(name: str) -> Image.Image:
    package = name.split("/")[0]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package} is not installed: pip install 'mapo_fast[examples]'")
    path = Path(spec.origin).parent.parent / name
    if not path.is_file():
        raise UserError(f"{path} is missing: this version of {package} does not ship it")
    with Image.open(path) as image:
        return image.convert("RGB")


def _crop(photograph: Image.Image, rng: random.Random) -> Image.Image:
    """A random square of a quarter to a half of the shorter side that shows something, SIDE pixels wide."""
    short = min(photograph.size)
    crops = []
    for _ in range(8):
        side = max(SIDE, int(short * rng.uniform(0.25, 0.5)))
        left = rng.randint(0, photograph.width - side)
        top = rng.randint(0, photograph.height - side)
        square = photograph.crop((left, top, left + side, top + side))
        crops.append(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
        if np.asarray(crops[-1]).std() > 20:  # of 255: more than an even surface
            return crops[-1]
    return max(crops, key=lambda crop: float(np.asarray(crop).std()))


def _row(name: str, kind: str, crop: Image.Image, rng: random.Random) -> dict[str, Any]:
    chosen, rejected = _encode(crop), _encode(DEGRADATIONS[kind](crop, rng))
    first = rng.random() < 0.5
    return {
        "jpg_0": chosen if first else rejected,
        "jpg_1": rejected if first else chosen,
        "label_0": 1.0 if first else 0.0,
        "label_1": 0.0 if first else 1.0,
        "has_label": True,
        "caption": PHOTOGRAPHS[name],
        "kind": kind,
        "photograph": name,
    }


def _encode(image: Image.Image, quality: int = 95) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0 if quality > 90 else 2)
    return buffer.getvalue()


@dataclass(frozen=True)
class KindScore:
    """Held-out preference accuracy for one kind of degradation, and its change from the untrained start."""

    kind: str
    pairs: int
    photographs: int
    start: float
    trained: float
    change: float
    pairs_low: float
    """Lower end of the 95 % interval of the change, resampled by pairs."""
    pairs_high: float
    photographs_low: float
    """Lower end with photographs as the unit (Student's t): crops of one photograph are not independent."""
    photographs_high: float


def score_photographs(out: Path, draws: int = 8) -> list[KindScore]:
    """Evaluate the run that `out/config.toml` describes on all held-out pairs, kind by kind.

    Args:
        out: folder of `write_photographs`, after `prepare` and `train`.
        draws: stratified timesteps per pair, each with its own fixed noise.

    Raises:
        UserError: not prepared or not trained yet.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from mapo_fast.data.cache import PairCache
    from mapo_fast.models.diffusion import Diffusion
    from mapo_fast.models.open import open_model
    from mapo_fast.run.evaluate import HeldOut

    config = load_config(out / "config.toml")
    trained = config.train.output / "unet"
    if not trained.is_dir():
        raise UserError(f"{trained} is missing: run `mapo-fast train {out / 'config.toml'}` first")
    torch.set_num_threads(config.train.threads)
    folder = open_model(config)
    cache = PairCache.open(config.data.cache)
    pairs = list(cache.held_out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held_out = HeldOut(
        cache,
        pairs,
        Diffusion(folder.scheduler_config),
        draws=draws,
        draws_per_batch=config.train.pairs_per_batch,
        seed=config.train.seed,
        device=device,
    )
    accuracy = []
    for unet in (folder.load_unet(), UNet2DConditionModel.from_pretrained(trained, local_files_only=True)):
        errors = held_out.errors(unet.to(device), contextlib.nullcontext())
        accuracy.append((errors.chosen < errors.rejected).double().mean(dim=1).numpy())
    table = pq.read_table(out / "photographs.parquet", columns=["kind", "caption"]).to_pylist()
    # The cache names a pair by its row in the source: `photographs.parquet:17`.
    rows = [table[int(row.name.rpartition(":")[2])] for row in cache.rows(pairs)]
    return [_kind_score(kind, rows, *accuracy) for kind in DEGRADATIONS]


def _number(bound: float | None) -> float:
    """A bound of an interval; a single observation has none."""
    return float("nan") if bound is None else bound


def _kind_score(
    kind: str, rows: list[dict[str, str]], start: NDArray[np.float64], trained: NDArray[np.float64]
) -> KindScore:
    import torch

    from mapo_fast.run.evaluate import paired_change

    of_kind = np.array([row["kind"] == kind for row in rows])
    captions = np.array([row["caption"] for row in rows])[of_kind]
    before, after = start[of_kind], trained[of_kind]
    change = torch.from_numpy(after - before)
    by_photograph = torch.stack([change[captions == caption].mean() for caption in sorted(set(captions))])
    pairs = paired_change(change, torch.zeros_like(change))
    photographs = paired_change(by_photograph, torch.zeros_like(by_photograph))
    return KindScore(
        kind=kind,
        pairs=len(change),
        photographs=len(by_photograph),
        start=float(before.mean()),
        trained=float(after.mean()),
        change=float(change.mean()),
        pairs_low=_number(pairs.low),
        pairs_high=_number(pairs.high),
        photographs_low=_number(photographs.low),
        photographs_high=_number(photographs.high),
    )


def main() -> None:
    """Parse the command line, write or score, say what to do next."""
    parser = argparse.ArgumentParser(description="Preference pairs from photographs that pip installs.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="new folder for the parquet file and the config")
    action.add_argument("--score", type=Path, metavar="DIR", help="score the trained run in DIR by kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        if args.score:
            print_scores(score_photographs(args.score), Console())
            return
        config = write_photographs(args.out, args.seed)
    except (UserError, OSError, MemoryError) as caught:
        error = one_line(caught)
        assert error is not None
        print(f"photographs: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(
        f"Next:\n  mapo-fast prepare {config}\n  mapo-fast train {config}\n"
        f"  python -m mapo_fast.demo.photographs --score {args.out}"
    )


def print_scores(scores: list[KindScore], console: Console) -> None:
    """Show one line per kind."""
    table = Table(
        title=f"preference accuracy on {scores[0].photographs} held-out photographs", title_justify="left"
    )
    for column in ("kind", "pairs", "start", "trained", "change", "95 % by pairs", "by photographs"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in scores:
        table.add_row(
            row.kind,
            f"{row.pairs}",
            f"{row.start:.2f}",
            f"{row.trained:.2f}",
            f"{row.change:+.2f}",
            f"{row.pairs_low:+.2f}…{row.pairs_high:+.2f}",
            f"{row.photographs_low:+.2f}…{row.photographs_high:+.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
