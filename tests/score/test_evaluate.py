"""Images of several models, compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mapo_fast.score import builtin  # noqa: F401  registers the scorers
from mapo_fast.score.evaluate import SCORES, evaluate
from mapo_fast.score.manifest import MANIFEST, Made, append, differences, paired, read
from mapo_fast.score.scorer import load_scorer
from mapo_fast.util.errors import UserError
from tests.score.clips import write_transformers

PROMPTS = [f"prompt {i} </script><script>" for i in range(12)]


class Redness:
    """Mean red of an image; counts its calls."""

    version, sha256 = "1", "x"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        self.seen += len(images)
        return np.asarray([np.asarray(image)[..., 0].mean() for image in images], dtype=np.float32)


def make(folder: Path, red: Sequence[int], seeds: int = 1) -> Path:
    folder.mkdir()
    for i, prompt in enumerate(PROMPTS):
        for seed in range(seeds):
            path = folder / f"{i}-{seed}.png"
            Image.new("RGB", (32, 32), (red[i] + seed, 0, i)).save(path)
            append(folder, Made(path, prompt, seed, {"steps": 2}))
    return folder


def test_means_and_wins_over_prompts(tmp_path: Path) -> None:
    before, after = make(tmp_path / "a", [10] * 12), make(tmp_path / "b", [20] * 8 + [10] * 2 + [0] * 2)
    found = evaluate({"before": before, "after": after}, {"red": Redness()}, tmp_path / "out")
    against = found["results"]["red"]["against_first"]["after"]
    assert (against["wins"], against["ties"], against["losses"], against["rate"]) == (8, 2, 2, 0.75)
    assert found["results"]["red"]["means"]["before"]["value"] == 10.0
    assert found["results"]["red"]["means"]["after"]["interval"] is None  # 12 prompts are too few
    assert found["prompts"][11]["scores"]["red"] == {"before": 10.0, "after": 0.0}
    assert found["prompts"][0]["prompt"] == PROMPTS[0]
    json.dumps(found, allow_nan=False)


def test_a_model_against_itself_is_exactly_one_half(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [*range(12)], seeds=2)
    found = evaluate({"a": folder, "again": folder}, {"red": Redness()}, tmp_path / "out")
    assert found["results"]["red"]["against_first"]["again"]["rate"] == 0.5


def test_nothing_is_scored_twice(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [*range(12)])
    scorer = Redness()
    first = evaluate({"a": folder}, {"red": scorer}, tmp_path / "out")
    kept = tmp_path / "out" / SCORES
    kept.write_text(kept.read_text()[:-20])  # a kill within the last line
    assert evaluate({"a": folder}, {"red": scorer}, tmp_path / "out") == first
    assert scorer.seen == 13
    scorer.version = "2"
    evaluate({"a": folder}, {"red": scorer}, tmp_path / "out")
    assert scorer.seen == 25


def test_a_score_that_is_no_number_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [*range(12)])

    class Broken(Redness):
        def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
            found = super().__call__(images, prompts)
            found[found == 9] = np.nan
            return found

    with pytest.raises(UserError, match=r"red gives .*9-0\.png nan"):
        evaluate({"a": folder}, {"red": Broken()}, tmp_path / "out")
    assert len((tmp_path / "out" / SCORES).read_text().splitlines()) == 9


def test_diversity_is_the_distance_between_the_seeds_of_a_prompt(tmp_path: Path) -> None:
    _, clip = load_scorer(f"clipscore={write_transformers(tmp_path / 'clip')}")
    same, other = make(tmp_path / "same", [50] * 12, seeds=1), make(tmp_path / "other", [50] * 12, seeds=1)
    for folder, red in ((same, 50), (other, 250)):
        for i, prompt in enumerate(PROMPTS):
            Image.new("RGB", (32, 32), (red, 0, i)).save(folder / f"{i}-x.png")
            append(folder, Made(folder / f"{i}-x.png", prompt, 7, {}))
    found = evaluate({"same": same, "other": other}, {"clip": clip}, tmp_path / "out")
    assert found["diversity"]["same"] == pytest.approx(0, abs=1e-6)
    assert found["diversity"]["other"] > 1e-4


def test_folders_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    a = make(tmp_path / "a", [1] * 12)
    with pytest.raises(UserError, match="make its images with mapo-fast sample"):
        read(tmp_path)
    b = make(tmp_path / "b", [1] * 12)
    lines = (b / MANIFEST).read_text().splitlines(keepends=True)
    for changed, message in {
        "".join(lines[:-1]): "different prompts or seeds, such as 'prompt 11",
        lines[0] + "".join(lines): "line 2: 0-0.png is listed twice",
        "".join([*lines, "{}\n"]): "line 13 is damaged",
        "".join(lines).replace("3-0.png", "../3-0.png"): "no name of a file in the folder",
        "".join(lines).replace("3-0.png", "no.png"): "no.png is missing",
        "".join(lines).replace("prompt 3", "prompt 4"): "a prompt twice with one seed",
        "x" * 20: "lists no image",
    }.items():
        (b / MANIFEST).write_text(changed)
        with pytest.raises(UserError, match=message) as raised:
            paired([a, b])
        assert "\n" not in str(raised.value)


def test_images_of_other_sizes_and_settings_are_named(tmp_path: Path) -> None:
    a, b = (make(tmp_path / name, [1] * 12) for name in "ab")
    text = (b / MANIFEST).read_text()
    (b / MANIFEST).write_text(text.replace('"steps": 2', '"steps": 3'))
    images = dict(zip("ab", paired([a, b]), strict=True))
    [remark] = differences(images)
    assert remark.startswith("b was sampled with steps = 3, a with 2")
    assert differences({"a": images["a"], "c": images["a"]}) == []
    Image.new("RGB", (32, 40)).save(b / "3-0.png")
    with pytest.raises(UserError, match=r"3-0\.png is 32 × 32 and .*3-0\.png is 32 × 40: sample both"):
        paired([a, b])


def test_an_svg_named_png_is_one_line(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", [1] * 12)
    (folder / "3-0.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(UserError, match=r"3-0\.png is no image that can be scored"):
        evaluate({"a": folder}, {"red": Redness()}, tmp_path / "out")
