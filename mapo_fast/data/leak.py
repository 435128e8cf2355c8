"""Does the size, the shape or the colour profile of an image give away which one is chosen?

If it does, a model can lower its loss by learning "large is good" instead of the preference. The measure is
the area under the ROC curve of a feature as a predictor of "chosen": the chance that a random chosen image
has a larger value than a random rejected one, ties half; 0.5 is no information.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mapo_fast.data.buckets import Size
from mapo_fast.data.images.colour import Profile

LIMIT = 0.6


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """P(positive > negative) + ½ P(equal) over all combinations (Mann–Whitney), in O(n log n)."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    upto = np.searchsorted(ordered, positive, side="right")
    return float((below + upto).mean() / (2 * len(negative)))


def size_leaks(chosen: Sequence[Size], rejected: Sequence[Size], conditioning: str) -> list[str]:
    """One warning for each feature that predicts the label (AUC above 0.6 in either direction)."""
    warnings = []
    remedy = (
        'data.size_conditioning = "shared" keeps sizes out of the time ids'
        if conditioning == "own"
        else "time ids are shared, but blur from upscaling and the crop can still tell them apart"
    )
    first, second = (np.array(sizes, dtype=np.float64).reshape(-1, 2) for sizes in (chosen, rejected))
    for name, values in (
        ("size", [s.prod(1) for s in (first, second)]),
        ("aspect", [s[:, 1] / s[:, 0] for s in (first, second)]),
        ("distance from the square", [np.abs(np.log(s[:, 1] / s[:, 0])) for s in (first, second)]),
    ):
        value = auc(*values)
        if max(value, 1 - value) > LIMIT:
            warnings.append(
                f"image {name} alone predicts the label (AUC {value:.2f} over {len(first)} pairs): {remedy}"
            )
    return warnings


def profile_leaks(chosen: Sequence[Profile], rejected: Sequence[Profile]) -> list[str]:
    """One warning for each outcome of a colour profile that predicts the label (AUC above `LIMIT`)."""
    warnings = []
    for outcome, text in (
        ("converted", "a colour profile other than sRGB, which was converted"),
        ("ignored", "a colour profile that is unusable, so their colours may be shifted"),
    ):
        first, second = (np.array([p == outcome for p in half], float) for half in (chosen, rejected))
        value = auc(first, second)
        if max(value, 1 - value) > LIMIT:
            shares = f"{first.mean():.0%} of the chosen and {second.mean():.0%} of the rejected images"
            warnings.append(
                f"{shares} have {text}: what is left of the difference predicts the label; "
                "save both halves in one colour space"
            )
    return warnings
