"""The data that a config names, before anything is prepared; torch is not imported."""

from __future__ import annotations

from mapo_fast.data.sources.base import PreferencePairs
from mapo_fast.data.sources.registry import open_source
from mapo_fast.settings.schema import DataConfig
from mapo_fast.util.errors import UserError


def given_data(data: DataConfig) -> PreferencePairs:
    """The source that `data.source` names, opened; no image is decoded.

    Raises:
        UserError: `data.source` is unset, its layout is unknown or unreadable, or the cache lies in it.
    """
    if data.source is None:
        raise UserError(
            "data.source is missing: name the folder of the preference pairs, with --data FOLDER or in the "
            "config"
        )
    source = open_source(data.source, default_caption=data.default_caption, pair_by=data.pair_by)
    if data.cache.resolve().is_relative_to(data.source.resolve()):
        raise UserError(
            f"data.cache {data.cache} lies inside data.source {data.source}, where its own files would be "
            "taken for data: choose a data.cache elsewhere"
        )
    return source


def check_confirmed(source: PreferencePairs, *, yes: bool) -> None:
    """Check that a person has confirmed the pairs of a source that asks for it.

    Raises:
        UserError: the pairs are not confirmed; the message shows the first pairs.
    """
    if source.to_confirm and not yes:
        raise UserError(
            f"data.source {source.where}: {source.to_confirm}. Look at them: if each two belong together, "
            "go on with --yes (in Python, prepare(config, yes=True)); nothing is prepared yet"
        )
