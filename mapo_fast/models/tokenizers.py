"""SDXL's two tokenizers: of a pipeline folder, or CLIP's own, built from its published table of merges.

Both tokenizers are CLIP's and differ in the token that pads a prompt: the first repeats the end token, the
second has `!`. The table of merges is a file of this package, with its licence next to it; a test compares it
with the one in `open_clip_torch`.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from mapo_fast.models.configs import LEGACY_EOS, SPECIAL_TOKENS, TextConfig, check_tokens
from mapo_fast.models.parts import quiet, unloadable
from mapo_fast.models.sdxl import BOTH, CONFIGS, CONTEXT, Which, tokenizer
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import read_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
PADS = {1: EOS, 2: "!"}


@dataclass(frozen=True)
class Tokenizers:
    """Where the two tokenizers come from."""

    root: Path | None
    """The folder with `tokenizer/` and `tokenizer_2/`; None for CLIP's own."""

    def where(self, which: Which) -> str:
        """For messages."""
        return "CLIP's own tokenizer" if self.root is None else str(self.root / tokenizer(which))

    def check(self, *, files: bool) -> None:
        """Check the configs, and with `files` that vocabularies are there.

        Raises:
            UserError: a file is missing or wrong.
        """
        if self.root is None:
            return
        for which in BOTH:
            folder = self.root / tokenizer(which)
            config = folder / CONFIGS[tokenizer(which)]
            if not config.is_file():
                raise UserError(f"{self.root} is not an SDXL pipeline: {config} is missing")
            check_tokens(read_json(config), config)
            if files and not (folder / "tokenizer.json").is_file():
                for name in ("vocab.json", "merges.txt"):
                    if not (folder / name).is_file():
                        raise UserError(f"{folder} is not a complete tokenizer: {folder / name} is missing")

    def load(self, which: Which, text: TextConfig) -> Any:
        """A tokenizer, a `transformers.CLIPTokenizer`.

        Args:
            which: 1 or 2.
            text: the config of its text encoder.

        Raises:
            UserError: the tokenizer cannot be loaded, gives all prompts the same tokens, cannot pad, or does
                not fit the text encoder.
        """
        where = self.where(which)
        try:
            with quiet():
                found = clip_tokenizer(which) if self.root is None else _read(self.root / tokenizer(which))
                useless = found("a").input_ids == found("b").input_ids
        except Exception as error:  # the tokenizers library raises bare Exceptions for damaged files
            raise unloadable(where, error) from error
        if useless:
            raise UserError(
                f"{where} is not a usable tokenizer: it gives 'a' and 'b' the same tokens; copy its files "
                "from the model again"
            )
        self._check_tokens(which, found, text)
        return found

    def _check_tokens(self, which: Which, found: Any, text: TextConfig) -> None:
        """Check that every prompt can be padded, and that the text encoder knows the tokens."""
        where = self.where(which)
        for name in SPECIAL_TOKENS:
            if getattr(found, f"{name}_id") is None:
                raise UserError(
                    f"{Path(where) / CONFIGS[tokenizer(which)]} has no {name} that is in the "
                    "vocabulary: prompts cannot be encoded; copy the tokenizer's files from the model again"
                )
        tokens = 1 + max(found.get_vocab().values())
        if tokens > text.vocab_size:
            way_out = (
                "name the model's own tokenizers as model.tokenizers, to export as --tokenizers"
                if self.root is None
                else "the folder mixes parts of different models"
            )
            raise UserError(
                f"{self.root or where}: tokenizer {which} has {tokens} tokens, its text encoder only "
                f"{text.vocab_size}: {way_out}"
            )
        if which == 2 and text.eos_token_id not in (LEGACY_EOS, found.eos_token_id):
            raise UserError(
                f"{self.root or where}: text_encoder_2/config.json has eos_token_id = "
                f"{text.eos_token_id}, its tokenizer {found.eos_token_id}: the pooled embedding would be of "
                "another token"
            )


def _read(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def clip_tokenizer(which: Which) -> Any:
    """CLIP's tokenizer with the padding of SDXL's first or second text encoder."""
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder), which)
        return _read(Path(folder))


def write_clip_tokenizer(folder: Path, which: Which) -> None:
    """Write the files of CLIP's tokenizer as transformers reads them, into an existing folder."""
    vocabulary, merges = clip_vocabulary()
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": PADS[which],
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CONTEXT,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    text = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's 49,408 tokens with their ids, and its merges, one `first second` each.

    A token for every byte, one for every byte at the end of a word, one for every merge, start and end: the
    order of OpenAI's `simple_tokenizer.py`.
    """
    packed = resources.files("mapo_fast.models").joinpath("assets/clip_merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode("utf-8").splitlines()
    letters = list(_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m.split(" ")) for m in merges)]
    return {token: index for index, token in enumerate([*tokens, BOS, EOS])}, merges


def _letters() -> list[str]:
    """A printable character for every byte: Latin-1's printable ones, then characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
