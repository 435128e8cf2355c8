"""A kind of input: it makes valid ones once, and damages one of them a case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from tests.fuzz import mutations
from tests.fuzz.judge import judge


class Kind:
    """One kind of input.

    Args:
        folder: an empty one to work in.
        model: the tiny pipeline, not to be written to.
    """

    name: ClassVar[str]
    weight: ClassVar[int]
    """Cases for each unit of a campaign's budget."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def case(self, random: Random) -> str:
        """Damage, call, judge, undo; returns how it ended. Raises `FoundError`."""
        raise NotImplementedError

    def on(
        self,
        random: Random,
        path: Path,
        damage: Callable[[Random, bytes], bytes],
        call: Callable[[], Any],
        *,
        names: tuple[str, ...] = (),
        unchanged: Path | None = None,
        specials: int = 12,
    ) -> str:
        """Judge the call with one file damaged; one case in `specials` has no regular file there."""
        names = (path.name, *names)
        if random.randrange(specials) == 0:
            with mutations.damaged(path, lambda where: mutations.special(random, where)):
                return judge(call, names, unchanged)
        data = damage(random, path.read_bytes())
        with mutations.damaged(path, lambda where: where.write_bytes(data) and None):
            return judge(call, names, unchanged)
