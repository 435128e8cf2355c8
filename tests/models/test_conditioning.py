"""Long prompts in chunks, negative prompts, and both forms of no prompt."""

from pathlib import Path

import pytest
import torch

from mapo_fast.models.conditioning import Conditioning, conditionings
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.sdxl import BOTH, CONTEXT, encode_text
from mapo_fast.models.text import encode_prompts

LONG = "x" * 180  # a token for each letter: three chunks


@pytest.fixture(scope="module")
def model(tiny_sdxl: Path) -> Pipeline:
    return open_sdxl(tiny_sdxl)


def encoded(model: Pipeline, *prompts: str, **settings: str) -> list[Conditioning]:
    return conditionings(model, prompts, device="cpu", dtype=torch.float32, **settings)


def test_each_chunk_has_its_own_start_and_end(model: Pipeline) -> None:
    (found,) = encoded(model, LONG)
    expected = []
    for which in BOTH:
        tokenizer, encoder = model.load_tokenizer(which), model.load_text_encoder(which)
        ids = tokenizer(LONG, add_special_tokens=False, verbose=False).input_ids
        assert len(ids) == 180
        states = []
        for start in (0, 75, 150):
            row = [tokenizer.bos_token_id, *ids[start : start + 75], tokenizer.eos_token_id]
            row += [tokenizer.pad_token_id] * (CONTEXT - len(row))
            hidden, pooled = encode_text(encoder, torch.tensor([row]), which)
            states.append(hidden)
            if which == 2 and start == 0:
                assert torch.equal(found.prompt.pooled_embeds, pooled)
        expected.append(torch.cat(states, dim=1))
    assert torch.equal(found.prompt.prompt_embeds, torch.cat(expected, dim=-1))
    assert found.unconditional.prompt_embeds.shape == (1, 3 * CONTEXT, 40)
    assert not found.unconditional.prompt_embeds.any()
    assert not found.unconditional.pooled_embeds.any()


def test_the_empty_form_encodes_the_empty_string_in_every_chunk(model: Pipeline) -> None:
    (found,) = encoded(model, LONG, unconditional="empty")
    empty = encode_prompts(model, [""], max_tokens=77, device="cpu", dtype=torch.float32)
    assert torch.equal(found.unconditional.prompt_embeds, empty.prompt_embeds.repeat(1, 3, 1))
    assert torch.equal(found.unconditional.pooled_embeds, empty.pooled_embeds)
    assert empty.prompt_embeds.any()


def test_prompt_and_negative_prompt_are_equally_long(model: Pipeline) -> None:
    short, long = encoded(model, "red", LONG, negative="y" * 80)
    assert short.prompt.prompt_embeds.shape == short.unconditional.prompt_embeds.shape == (1, 154, 40)
    assert long.prompt.prompt_embeds.shape == long.unconditional.prompt_embeds.shape == (1, 231, 40)


def test_an_embedding_does_not_depend_on_other_prompts(model: Pipeline) -> None:
    together = encoded(model, "red", LONG, "blue", "red", negative="green")
    for prompt, found in zip(("red", LONG, "blue", "red"), together, strict=True):
        (alone,) = encoded(model, prompt, negative="green")
        for a, b in zip(found, alone, strict=True):
            assert torch.equal(a.prompt_embeds, b.prompt_embeds)
            assert torch.equal(a.pooled_embeds, b.pooled_embeds)
