"""Config files, and what the command line takes as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import tomli_w

from mapo_fast.data.buckets import make_buckets
from mapo_fast.engine.objectives import build_loss
from mapo_fast.hardware.names import find_card
from mapo_fast.settings.load import apply_override, load_config
from mapo_fast.util.sizes import parse_size
from tests.fuzz import mutations
from tests.fuzz.judge import judge
from tests.fuzz.kind import Kind
from tests.training import make_config, settings


class Toml(Kind):
    """Config files and `--set`."""

    name, weight = "toml", 1500

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        table = settings(model, folder / "cache", folder / "run")
        full = make_config(model, folder / "cache", folder / "run").model_dump(mode="json", exclude_none=True)
        self.tables = [table, {**full, "train": {**full["train"], "vram": "24GiB"}}]
        self.keys = [f"{section}.{key}" for section, part in full.items() for key in part]
        self.path = folder / "config.toml"
        self.path.write_bytes(b"")

    def case(self, random: Random) -> str:
        """A damaged file, overrides, or both."""
        overrides = [self._override(random) for _ in range(random.choice((0, 0, 1, 2)))]

        def call() -> None:
            config = load_config(self.path, overrides)
            build_loss(config.objective, 1000)
            make_buckets(config.data.resolution, config.data.bucket_step)
            if config.train.vram is not None:
                parse_size(config.train.vram, "train.vram")
            config.model_dump_json()

        names = ("--set", "objective", "data.", "train.", "optim.", "adapter.", "offload.", "speed.")
        return self.on(random, self.path, self._damage, call, names=names, unchanged=self.folder, specials=40)

    def _damage(self, random: Random, _: bytes) -> bytes:
        table = random.choice(self.tables)
        how = random.randrange(6)
        if how == 0:
            return mutations.of_bytes(random, tomli_w.dumps(table).encode())
        if how == 1:
            text = tomli_w.dumps(table)
            places = [at for at, letter in enumerate(text) if letter == "="]
            at = random.choice(places) + 1
            return f"{text[:at]} {random.choice(SCRAPS)} #{text[at:]}".encode("utf-8", "surrogatepass")
        changed = mutations.of_value(random, table)
        try:
            return tomli_w.dumps(_without_none(changed)).encode("utf-8", "surrogatepass")
        except (TypeError, AttributeError, ValueError):
            return b""

    def _override(self, random: Random) -> str:
        key = random.choice(self.keys) if random.randrange(5) else random.choice(mutations.TEXTS)
        value = random.choice(
            (random.choice(SCRAPS), repr(random.choice(mutations.VALUES)), mutations.SURROGATE)
        )
        return f"{key}={value}" if random.randrange(9) else value


SCRAPS = (
    "9" * 5000, "9" * 4000, "1e999", "-1", "0x7fffffffffffffffff", "[" * 2000, "[" * 400 + "]" * 400,
    "{a=" * 500,
    "{a=1}", "1979-05-27", "07:32:00", "1979-05-27T00:32:00-07:00", "nan", "-inf", '"\\u0000"',
    '"~nobody-here/x"',
    '""', "''", '"""', "true", "tru", "[[1],[2]]", '["a", 1]', "[nan]", '"' + "x" * 10_000 + '"',
    '"\\u001b[2J"',
    "1_000", "+5", "0o17", "a.b", "a=1", '"24GiB"', '"1e9GiB"', '"' + "9" * 400 + 'GiB"', "\ud800", "\udcff",
    "\0",
)  # fmt: skip


def _without_none(value: Any) -> Any:
    """TOML has no null."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value if inner is not None]
    return value


class Words(Kind):
    """Sizes, cards, overrides: what the command line takes as text."""

    name, weight = "words", 600

    def case(self, random: Random) -> str:
        """One text to one parser."""
        seeds = ("24GiB", "11.5 GB", "RTX 4090", "RTX 3060 Laptop 6GB", "optim.lr=1e-5", "data.source=~/x")
        text = random.choice(seeds).encode()
        text = mutations.of_bytes(random, text) if random.randrange(3) else text * random.randrange(300)
        word = text.decode("utf-8", "surrogateescape")
        calls: tuple[Callable[[], Any], ...] = (
            lambda: parse_size(word, "--vram"),
            lambda: find_card(word),
            lambda: apply_override({}, word),
        )
        return judge(random.choice(calls), ("--vram", "--card", "--set"))
