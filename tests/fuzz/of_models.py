"""Pipeline folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import diffusers.utils.logging

from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.identity import encoders_identity, files_fingerprint, unet_identity
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.sdxl import ENCODERS
from mapo_fast.planner.stages import vae_of
from tests.fuzz import mutations
from tests.fuzz.kind import Kind


class Model(Kind):
    """Configs of a pipeline folder."""

    name, weight = "model", 500

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        diffusers.utils.logging.set_verbosity_error()  # as the command does
        self.pipeline = shutil.copytree(model, folder / "sdxl")
        self.configs = sorted(
            path
            for path in self.pipeline.rglob("*.json")
            if path.name not in ("vocab.json", "tokenizer.json")
        )

    def case(self, random: Random) -> str:
        """Everything that is read before weights are loaded."""

        def call() -> None:
            opened = open_sdxl(self.pipeline, weights=random.randrange(4) > 0)
            Diffusion(opened.scheduler_config)
            files_fingerprint(opened, ENCODERS)
            vae_of(opened)

        path = random.choice(self.configs)
        return self.on(
            random,
            path,
            mutations.of_json,
            call,
            names=("sdxl", path.parent.name),
            unchanged=self.pipeline / path.parent.name,
        )


class Load(Kind):
    """Configs, vocabularies and weights that are loaded."""

    name, weight = "load", 300

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.pipeline = shutil.copytree(model, folder / "sdxl")
        self.parts = [path for path in self.pipeline.rglob("*") if path.is_file()]

    def case(self, random: Random) -> str:
        """One part of the pipeline, its config, vocabulary or weights damaged."""
        path = random.choice(self.parts)
        part = path.parent.name

        def call() -> None:
            opened = open_sdxl(self.pipeline)
            unet_identity(opened), encoders_identity(opened)
            if part == "unet":
                opened.load_unet()
            elif part == "vae":
                opened.load_vae()
            elif part.startswith("text_encoder"):
                opened.load_text_encoder(2 if part.endswith("2") else 1)
            elif part.startswith("tokenizer"):
                opened.load_tokenizer(2 if part.endswith("2") else 1)(["a red thing"])

        damage = of_safetensors if path.suffix == ".safetensors" else mutations.of_json
        if path.suffix == ".txt":
            damage = mutations.of_bytes
        return self.on(random, path, damage, call, names=("sdxl", part), unchanged=path.parent)


def of_safetensors(random: Random, data: bytes) -> bytes:
    """Damage to the header: as JSON, or its length."""
    length = int.from_bytes(data[:8], "little")
    how = random.randrange(6)
    if how == 0:
        claimed = random.choice((0, 1, length - 1, length + 1, len(data), 2**32, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + data[8:]
    if how == 1:
        return data[: random.randrange(len(data))]
    header = mutations.of_json(random, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
