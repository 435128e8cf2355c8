"""The blind page: votes by keys in a real browser, and how often it is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mapo_fast.score.blind import write_blind
from mapo_fast.score.manifest import Made
from mapo_fast.score.statistics import sign_test, wilson
from mapo_fast.util.errors import UserError
from tests.browser import opened

PROMPTS = [f"p{i} </script><script>alert({i})</script>" for i in range(12)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Made]]:
    folder, found = tmp_path_factory.mktemp("images"), {}
    for model, red in (("base", 0), ("tuned", 255)):
        found[model] = []
        for i, prompt in enumerate(PROMPTS):
            path = folder / f"{model}-{i}.png"
            Image.new("RGB", (64, 64), (red, 128, 0)).save(path)
            found[model].append(Made(path, prompt, 0, {}))
    return found


@pytest.mark.parametrize("count", [10, 20, 30, 60])
def test_of_equal_models_one_is_called_better_in_at_most_5_percent(count: int) -> None:
    drawn = np.random.default_rng(count).multinomial(count, [0.45, 0.1, 0.45], size=4000)
    wrong = sum(sign_test(int(wins), int(losses)) <= 0.05 for wins, _, losses in drawn)
    assert wrong / len(drawn) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_votes_by_keys_and_the_answer(images: dict[str, list[Made]], tmp_path: Path, width: int) -> None:
    page_file = tmp_path / "blind.html"
    strip = {"0.4": images["base"][0], "1.2": images["tuned"][0]}
    assert write_blind(page_file, images, 10, frozenset(PROMPTS[:6]), strip) == 10
    with opened(page_file, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert "tuned" not in page.inner_text("main")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Backspace")
        assert page.inner_text("#count") == "0 of 10 votes"
        for number in range(10):  # the red one, and a tie at last
            red = page.evaluate(
                "async () => { const i = document.querySelector('#left img'); await i.decode();"
                "const c = document.createElement('canvas').getContext('2d'); c.drawImage(i, 0, 0);"
                "return c.getImageData(5, 5, 1, 1).data[0]; }"
            )
            page.keyboard.press("ArrowDown" if number == 9 else "ArrowLeft" if red > 128 else "ArrowRight")
        text = page.inner_text("#result")
        low, high = wilson(0.95, 10, 0.1)
        assert (
            f"tuned wins 95 % of 10 votes, 95 % interval {round(100 * low)} % to {round(100 * high)} %"
            in text
        )
        assert f"sign test p = {sign_test(9, 0):.3f}. tuned is better." in text
        assert "trained on" in text
        assert page.locator("#strip img").count() == 2
        assert f"strength 1.2: {PROMPTS[0]}" in page.inner_text("#strip")


def test_the_page_holds_no_script_of_a_prompt(images: dict[str, list[Made]], tmp_path: Path) -> None:
    write_blind(tmp_path / "blind.html", images)
    page = (tmp_path / "blind.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2
    assert "alert(" in page
    assert "default-src &#x27;none&#x27;" in page
    assert str(tmp_path) not in page


def test_a_comparison_that_cannot_be_is_one_line(images: dict[str, list[Made]], tmp_path: Path) -> None:
    for given, votes, message in (
        ({"base": images["base"]}, None, "is of two models"),
        (images, 9, "take 10 votes or more"),
        (images, 13, "at most one for each image"),
    ):
        with pytest.raises(UserError, match=message):
            write_blind(tmp_path / "x.html", given, votes)
    assert not (tmp_path / "x.html").exists()
