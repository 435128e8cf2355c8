"""Find a card by its name, as people, shops and drivers write it."""

from __future__ import annotations

import difflib
import re

from mapo_fast.hardware.cards import CARDS, LAPTOP, Card
from mapo_fast.util.errors import UserError

_SIZE = r"(\d+(?:\.\d+)?)\s*gi?b"
_LAPTOP = r"laptop|notebook|mobile|max-?q"
_DULL = (
    rf"nvidia|geforce|quadro|tesla|{_LAPTOP}|max|q|gpu|generation|workstation|edition|blackwell|pcie|nvl|"
    r"sxm\d*|hbm\d*e?"
)
_MAKERS = (
    ("AMD", r"amd|radeon|instinct|rx\s*\d{3,4}|mi\d{2,3}x?|vega"),
    ("Intel", r"intel|arc|iris|gaudi"),
    ("Apple", r"apple|macbook|m[1-9]|metal|mps"),
)


def find_card(name: str) -> Card:
    """The card of this name: upper or lower case, with or without maker and, where there is one, memory size.

    Raises:
        UserError: another maker's card; an unknown name (the message has the nearest ones); a card with
            several memory sizes, of which none or an unknown one is named.
    """
    _refuse_other_makers(name)
    size = re.search(_SIZE, name.lower())
    in_laptop = re.search(_LAPTOP, name.lower()) is not None
    alike = [c for c in CARDS if _plain(c.name) == _plain(name) and (c.kind == LAPTOP) == in_laptop]
    fitting = [card for card in alike if size is not None and card.gib == float(size[1])]
    if len(alike) > 1 and not fitting:
        *sizes, last = (f"{card.gib:g}" for card in alike)
        raise UserError(
            f'--card {name!r}: {", ".join(sizes)} or {last} GB? Say which, as in --card "{alike[-1].name}"'
        )
    if not alike:
        raise _unknown(name)
    (card,) = fitting or alike
    return card if size is None else card._replace(gib=float(size[1]))


def _refuse_other_makers(name: str) -> None:
    """Raise for cards of AMD, Intel and Apple: without an NVIDIA GPU training runs on the CPU, for trials."""
    for maker, words in _MAKERS:
        if re.search(rf"\b({words})\b", name.lower()):
            raise UserError(
                f"--card {name!r} is made by {maker}: the kernels need an NVIDIA GPU. Without one, demo, "
                "prepare and train run on the CPU, which is too slow for SDXL; plan for a card that you "
                'could rent, such as --card "RTX 4090"'
            )


def _unknown(name: str) -> UserError:
    plain: dict[str, str] = {}
    for card in CARDS:
        plain.setdefault(_plain(card.name), card.name)
    asked = _plain(name)
    if re.search(r"\b(gtx|titan|quadro [kmp])", name.lower()):
        return UserError(f"--card {name!r} is older than RTX 20: the kernels need compute capability 7.5")
    containing = [n for n in plain if asked and asked in n]
    near = [
        plain[n] for n in dict.fromkeys([*containing, *difflib.get_close_matches(asked, plain, cutoff=0.5)])
    ]
    known = "known are GeForce RTX 20 to 50 and NVIDIA's professional and data-centre cards."
    hint = f"did you mean {' or '.join(near[:3])}?" if near else known
    return UserError(f"--card {name!r} is not known; {hint} Any other NVIDIA card: --vram with its memory")


def _plain(name: str) -> str:
    """The distinguishing words of a name, without the memory size."""
    words = re.findall(r"[a-z0-9]+", re.sub(_SIZE, " ", name.lower()).replace("rtx", " "))
    return "".join(word for word in words if not re.fullmatch(_DULL, word))
