"""Small copies, and pictures that are nearly the same."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

from mapo_fast.studio import looks
from mapo_fast.studio.looks import NEAR, near, thumbnail_file
from mapo_fast.studio.project import Project


def test_no_near_pair_is_missed() -> None:
    rng = random.Random(0)
    found: dict[int, int] = {id: rng.getrandbits(64) for id in range(100)}
    for id in range(100, 150):
        changed = 0
        for bit in rng.sample(range(64), rng.randrange(8)):
            changed |= 1 << bit
        found[id] = found[id - 100] ^ changed
    all_pairs = {
        (a, b, distance)
        for a, b in combinations(found, 2)
        if (distance := (found[a] ^ found[b]).bit_count()) <= NEAR
    }
    assert {*near(found)} == all_pairs
    assert len(all_pairs) > 20


@pytest.mark.slow
def test_the_job_finds_near_ones_and_broken_ones(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    for name in "ab":
        Image.effect_noise((64, 64), 90).resize((300, 300), Image.Resampling.BICUBIC).save(
            folder / f"{name}.png"
        )
    with Image.open(folder / "a.png") as image:
        image.resize((280, 280)).save(folder / "c.jpg", quality=80)
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:3000])
    with Project.open(folder) as project:
        list(project.scan())
        looks.main([str(folder)])
        assert [picture.path for picture in project.broken()] == ["cut.png"]
        a, _, c = (picture.id for picture in project.pictures())
        assert [pair[:2] for pair in project.near()] == [(a, c)]
        ((changed,),) = project.index.rows("select changed from pictures where id = ?", [a])
        with Image.open(thumbnail_file(folder, a, changed)) as small:
            assert (small.format, small.size) == ("WEBP", (256, 256))
        assert project.thumbnail(a) == thumbnail_file(folder, a, changed)
        assert project.thumbnail(12345) is None
