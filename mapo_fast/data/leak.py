"""Does something about an image other than its quality give away which one is chosen?

If it does, a model can lower its loss by learning "large is good" instead of the preference. The measure is
the area under the ROC curve of a feature as a predictor of "chosen": the chance that a random chosen image
has a larger value than a random rejected one, ties half; 0.5 is no information. Features are size and shape,
the colour profile, how bright and how coloured an image is, and the model, sampler or LoRA that made it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mapo_fast.data.buckets import Size
    from mapo_fast.data.images.colour import Profile

LIMIT = 0.6


class Made(NamedTuple):
    """What made an image, as its file says; empty where it does not."""

    model: str = ""
    sampler: str = ""
    lora: str = ""


class Colour(NamedTuple):
    """Means over an image's pixels, 0 to 1."""

    brightness: float = 0.0
    saturation: float = 0.0


UNKNOWN, BLACK = Made(), Colour()
"""What stands for an image that is not there."""
MADE, COLOUR = Made._fields, Colour._fields


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """P(positive > negative) + ½ P(equal) over all combinations (Mann–Whitney), in O(n log n)."""
    ordered = sorted(negative)
    ranks = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in positive)
    return ranks / (2 * len(positive) * len(ordered))


def _tells(value: float) -> bool:
    return max(value, 1 - value) > LIMIT


def size_leaks(chosen: Sequence[Size], rejected: Sequence[Size], conditioning: str) -> list[str]:
    """One warning for each feature that predicts the label (AUC above 0.6 in either direction)."""
    warnings = []
    remedy = (
        'data.size_conditioning = "shared" keeps sizes out of the time ids'
        if conditioning == "own"
        else "time ids are shared, but blur from upscaling and the crop can still tell them apart"
    )
    for name, of in (
        ("size", lambda size: float(size[0] * size[1])),
        ("aspect", lambda size: size[1] / size[0]),
        ("distance from the square", lambda size: abs(math.log(size[1] / size[0]))),
    ):
        value = auc(list(map(of, chosen)), list(map(of, rejected)))
        if _tells(value):
            warnings.append(
                f"image {name} alone predicts the label (AUC {value:.2f} over {len(chosen)} pairs): {remedy}"
            )
    return warnings


def profile_leaks(chosen: Sequence[Profile], rejected: Sequence[Profile]) -> list[str]:
    """One warning for each outcome of a colour profile that predicts the label (AUC above `LIMIT`)."""
    warnings = []
    for outcome, text in (
        ("converted", "a colour profile other than sRGB, which was converted"),
        ("ignored", "a colour profile that is unusable, so their colours may be shifted"),
    ):
        if _tells(_share_auc(first := _share(chosen, outcome), second := _share(rejected, outcome))):
            shares = f"{first:.0%} of the chosen and {second:.0%} of the rejected images"
            warnings.append(
                f"{shares} have {text}: what is left of the difference predicts the label; "
                "save both halves in one colour space"
            )
    return warnings


def colour_leaks(chosen: Sequence[Colour], rejected: Sequence[Colour]) -> list[str]:
    """One warning for each mean of the pixels that predicts the label (AUC above `LIMIT`)."""
    warnings = []
    for name in COLOUR:
        value = auc([getattr(c, name) for c in chosen], [getattr(c, name) for c in rejected])
        if _tells(value):
            more = "more" if value > 0.5 else "less"
            warnings.append(
                f"image {name} alone predicts the label (AUC {value:.2f} over {len(chosen)} pairs): the "
                f"chosen ones have {more}; unless that is what you want, add pairs in which they do not"
            )
    return warnings


def made_leaks(chosen: Sequence[Made], rejected: Sequence[Made]) -> list[str]:
    """One warning for each of model, sampler and LoRA whose most telling value predicts the label."""
    warnings = []
    for name in MADE:
        found = list(_shares([getattr(m, name) for m in chosen], [getattr(m, name) for m in rejected]))
        first, second, value = max(
            found, key=lambda one: (abs(one[0] - one[1]), one[0]), default=(0.0, 0.0, "")
        )
        if _tells(_share_auc(first, second)):
            warnings.append(
                f"{first:.0%} of the chosen and {second:.0%} of the rejected images were made with the "
                f"{'LoRA' if name == 'lora' else name} {value}: it predicts the label, and a model can learn "
                "its look instead of the preference; compare pictures that were made in one way"
            )
    return warnings


def _shares(chosen: Sequence[str], rejected: Sequence[str]) -> Iterator[tuple[float, float, str]]:
    """Share of each value; an image that does not say counts as one without it."""
    halves = Counter(chosen), Counter(rejected)
    for value in sorted({*halves[0], *halves[1]} - {""}):
        yield halves[0][value] / len(chosen), halves[1][value] / len(rejected), value


def _share(values: Sequence[str], wanted: str) -> float:
    return sum(value == wanted for value in values) / len(values)


def _share_auc(first: float, second: float) -> float:
    """The AUC of something that a share `first` of the chosen and `second` of the rejected images has."""
    return 0.5 + (first - second) / 2
