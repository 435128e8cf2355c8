"""Pipeline folders, single files and LoRA files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from random import Random

import diffusers.utils.logging
import torch
from safetensors.torch import save_file

from mapo_fast.models import single_file
from mapo_fast.models.diffusion import Diffusion
from mapo_fast.models.identity import encoders_identity, files_fingerprint, unet_identity
from mapo_fast.models.lora_file import is_lora, read_lora
from mapo_fast.models.lora_save import save_kohya
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.sdxl import ENCODERS
from mapo_fast.planner.stages import vae_of
from tests.files_of_models import make_file
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


class SingleFile(Kind):
    """A whole model in one file, whose header is damaged."""

    name, weight = "single file", 160

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.file = make_file(model, folder / "model.safetensors", dtype=torch.float16)

    def case(self, random: Random) -> str:
        """Everything that is read before weights are loaded."""

        def call() -> None:
            opened = open_sdxl(self.file, tokenizers=self.model)
            unet_identity(opened)
            single_file.metadata(opened)

        return self.on(random, self.file, of_names, call)


class Lora(Kind):
    """A LoRA's file, header and factors."""

    name, weight = "lora", 400

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.parts = open_sdxl(model).parts
        self.file = folder / "lora.safetensors"
        shapes = [
            (name, s) for name, s in self.parts["unet"].shapes.items() if "attn1.to" in name and len(s) == 2
        ]
        tensors = {}
        for name, (out, into) in shapes[:4]:
            layer = f"unet.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = torch.zeros(2, into)
            tensors[f"{layer}.lora_B.weight"] = torch.zeros(out, 2)
            tensors[f"{layer}.alpha"] = torch.tensor(1.0)
        said = {
            "lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1, "unet.alpha_pattern": {}})
        }
        save_file(tensors, self.file, metadata=said | {"ss_base_model_version": "sdxl_base_v1-0"})

    def case(self, random: Random) -> str:
        """Read it, and write it for other programs."""

        def call() -> None:
            is_lora(self.file)
            save_kohya(read_lora(self.file, self.parts), self.parts, self.folder / "out.safetensors")

        return self.on(random, self.file, of_names, call)


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


def of_names(random: Random, data: bytes) -> bytes:
    """A header that still describes its file: other names, types, shapes, metadata; or `of_safetensors`."""
    if random.randrange(3) == 0:
        return of_safetensors(random, data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.setdefault("__metadata__", {})
    for _ in range(random.choice((1, 1, 2, 4))):
        key = random.choice([name for name in header if name != "__metadata__"])
        entry = header[key]
        how = random.randrange(5)
        if how == 0:
            header[random.choice((key + "x", f"x{key}", random.choice(mutations.TEXTS), *_renamed(key)))] = (
                header.pop(key)
            )
        elif how == 1:
            entry["shape"] = random.choice(
                (
                    [*entry["shape"], 1],
                    [1, *entry["shape"]],
                    entry["shape"][::-1],
                    [math.prod(entry["shape"])],
                )
            )
        elif how == 2:
            alike = next((group for group in _TYPES if entry["dtype"] in group), _TYPES[0])
            entry["dtype"] = random.choice(alike)
        elif how == 3:
            metadata[random.choice((*metadata, *_METADATA))] = str(random.choice(mutations.VALUES))
        else:
            metadata[random.choice(_METADATA)] = mutations.of_json(random, b'{"unet": {"r": 2}}').decode(
                "utf-8", "replace"
            )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


_TYPES = (("F16", "BF16", "I16", "U16"), ("F32", "I32", "U32"), ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"))
_METADATA = (
    "modelspec.prediction_type", "modelspec.title", "modelspec.thumbnail", "ss_base_model_version", "ss_v2",
    "lora_adapter_metadata", "mapo_fast.configs", "format", "", "\0",
)  # fmt: skip


def _renamed(key: str) -> list[str]:
    """Names of other kinds of models and adapters for a tensor."""
    layer = key.rpartition(".lora_")[0] or key.rpartition(".")[0]
    ends = (
        ".alpha",
        ".dora_scale",
        ".lora_mid.weight",
        ".lora_down.weight",
        ".hada_w1_a",
        ".diff",
        ".scale_weight",
    )
    return [layer + end for end in ends] + ["v_pred", "ztsnr", "edm_vpred.sigma_max", "scaled_fp8"]
