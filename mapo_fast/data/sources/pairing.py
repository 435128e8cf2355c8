"""Twin folders whose files do not have equal names: paired by their order, or by the prompts in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mapo_fast.data.picture_prompts import picture_prompt
from mapo_fast.data.picture_texts import NoPromptError
from mapo_fast.data.sources.base import PairRecord, SkippedRow
from mapo_fast.data.sources.folders import TwinFolderPairs
from mapo_fast.util.errors import UserError, shown

_SHOWN = 3


class OrderedPairs(TwinFolderPairs):
    """The first image of one folder with the first of the other, by the numbers in their names."""

    def _matched(self) -> list[tuple[str, str]]:
        first, second = (sorted(side.images, key=_natural) for side in self._sides)
        if len(first) != len(second):
            raise UserError(
                f'data.source {self.folder}: data.pair_by = "order" needs as many images in '
                f"{self.names[0]}/ as in {self.names[1]}/, there are {len(first)} and {len(second)}: remove "
                "those without a counterpart"
            )
        pairs = list(zip(first, second, strict=True))
        named = [" + ".join(self._names(pair)) for pair in pairs[:_SHOWN]]
        more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        self.to_confirm = f"pairs by the order of their names: {'; '.join(named)}{more}"
        return pairs

    def _names(self, pair: tuple[str, str]) -> Iterable[str]:
        for name, side, stem in zip(self.names, self._sides, pair, strict=True):
            yield f"{name}/{side.images[stem][0].name}"


class PromptPairs(TwinFolderPairs):
    """The image of one folder and the image of the other that were made with one prompt.

    The prompt is the one that A1111 or ComfyUI wrote into the file (`picture_prompts`). It is the pair's
    caption, too, where there is no caption file.
    """

    def _matched(self) -> list[tuple[str, str]]:
        self._skipped: list[tuple[str, str, str]] = []
        first, second = (
            self._by_prompt(name, {stem: entries[0].path for stem, entries in side.images.items()})
            for name, side in zip(self.names, self._sides, strict=True)
        )
        several = [
            f"{shown(prompt)} ({', '.join(f'{name}/{stem}' for stem in stems)})"
            for name, prompts in zip(self.names, (first, second), strict=True)
            for prompt, stems in prompts.items()
            if len(stems) > 1
        ]
        if several:
            more = f" and {len(several) - _SHOWN} more prompts" if len(several) > _SHOWN else ""
            raise UserError(
                f'data.source {self.folder}: data.pair_by = "prompt" needs one image of each side for a '
                f"prompt, there are several for {'; '.join(several[:_SHOWN])}{more}: leave one of each, or "
                "give pairs equal names"
            )
        for name, other, prompts, counterparts in (
            (self.names[0], self.names[1], first, second),
            (self.names[1], self.names[0], second, first),
        ):
            for prompt in prompts.keys() - counterparts.keys():
                detail = f"no image in {other}/ has its prompt"
                self._skipped.append((f"{name}/{prompts[prompt][0]}", "missing counterpart", detail))
        self._skipped.sort()
        matched = [(first[prompt][0], second[prompt][0], prompt) for prompt in first.keys() & second.keys()]
        self._prompts = [prompt for *_, prompt in sorted(matched)]
        return [(one, other) for one, other, _ in sorted(matched)]

    def _by_prompt(self, name: str, images: Mapping[str, Path]) -> dict[str, list[str]]:
        """The images of a folder by their prompts; those without one are put among the skipped."""
        found: dict[str, list[str]] = {}
        for stem, path in sorted(images.items()):
            try:
                found.setdefault(picture_prompt(path), []).append(stem)
            except NoPromptError as error:
                self._skipped.append((f"{name}/{stem}", "no prompt in the file", str(error)))
        return found

    def __len__(self) -> int:
        """Pairs, and images without a counterpart."""
        return len(self._pairs) + len(self._skipped)

    def files(self) -> Iterable[Path]:
        """See `PreferencePairs.files`."""
        yield from super().files()
        for side in self._sides:
            for stem in sorted(side.images):
                yield from (entry.path for entry in side.images[stem])

    def _row(self, index: int) -> PairRecord | SkippedRow:
        if index < len(self._pairs):
            return self._made(index, self._pairs[index], self._prompts[index])
        return SkippedRow(index, *self._skipped[index - len(self._pairs)])


def _natural(name: str) -> list[str | int]:
    """The key by which `a2` comes before `a10`: texts and numbers take turns."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
