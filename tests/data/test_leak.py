import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mapo_fast.data.leak import Colour, Made, auc, colour_leaks, made_leaks, size_leaks


def test_auc_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 9, 300).astype(float), rng.integers(1, 10, 200).astype(float)
    expected = roc_auc_score([1] * 300 + [0] * 200, np.concatenate([first, second]))
    assert auc(first, second) == pytest.approx(expected, abs=1e-12)


def test_equal_sizes_do_not_warn() -> None:
    assert size_leaks([(32, 32)] * 10, [(32, 32)] * 10, "shared") == []


@pytest.mark.parametrize(
    ("chosen", "rejected", "feature"),
    [
        ((64, 64), (32, 32), "image size"),
        ((32, 32), (64, 64), "image size"),
        ((32, 64), (64, 32), "image aspect"),
        ((64, 32), (32, 64), "image aspect"),
    ],
)
def test_size_or_aspect_that_predicts_the_label(
    chosen: tuple[int, int], rejected: tuple[int, int], feature: str
) -> None:
    warnings = size_leaks([chosen] * 10, [rejected] * 10, "own")
    assert len(warnings) == 1
    assert warnings[0].startswith(feature)
    assert "AUC" in warnings[0]


def test_square_against_wide_and_tall() -> None:
    warnings = size_leaks([(32, 32)] * 10, [(16, 64), (64, 16)] * 5, "shared")
    assert [w.split(" alone")[0] for w in warnings] == ["image distance from the square"]


def test_limit() -> None:
    equal = [(32, 32)] * 80
    assert size_leaks([(64, 64)] * 20 + equal, [(32, 32)] * 100, "shared") == []  # AUC 0.60
    assert size_leaks([(64, 64)] * 22 + equal[2:], [(32, 32)] * 100, "shared")  # AUC 0.61


@pytest.mark.parametrize(
    ("name", "said"),
    [("model", "the model b"), ("sampler", "the sampler b"), ("lora", "the LoRA b")],
)
def test_what_made_an_image(name: str, said: str) -> None:
    def made(share: int) -> list[Made]:
        return [Made(**{name: "b"})] * share + [Made()] * (100 - share)

    assert made_leaks(made(60), made(40)) == []  # AUC 0.60
    (warning,) = made_leaks(made(62), made(40))  # AUC 0.61
    assert warning.startswith(f"62% of the chosen and 40% of the rejected images were made with {said}: ")
    assert made_leaks([Made()] * 10, [Made()] * 10) == []


def test_colour() -> None:
    grey, bright, vivid = Colour(0.5, 0.1), Colour(0.9, 0.1), Colour(0.5, 0.9)
    assert colour_leaks([grey, vivid], [vivid, grey]) == []
    (brightness,) = colour_leaks([bright] * 9, [grey] * 9)
    (saturation,) = colour_leaks([grey] * 9, [vivid] * 9)
    assert brightness.startswith("image brightness alone predicts the label (AUC 1.00 over 9 pairs): ")
    assert "the chosen ones have less" in saturation
