import warnings
from pathlib import Path

import pytest
import torch

from mapo_fast.models.open import open_sdxl
from mapo_fast.models.pipeline import Pipeline
from mapo_fast.models.text import empty_prompt, encode_prompts, truncations
from mapo_fast.util.errors import UserError
from tests.tiny import make_tiny_sdxl

PROMPTS = ["a red cat", "Blue, 2 dogs!  <|endoftext|>", "x" * 75, "y " * 120]
FP32 = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tiny_sdxl: Path) -> Pipeline:
    return open_sdxl(tiny_sdxl)


def pipeline(path: Path):  # type: ignore[no-untyped-def]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline.from_pretrained(path, local_files_only=True)


@pytest.mark.slow
def test_equal_to_diffusers(folder: Pipeline) -> None:
    expected, _, pooled, _ = pipeline(folder.path).encode_prompt(PROMPTS, device="cpu")
    ours = encode_prompts(folder, PROMPTS, max_tokens=77, **FP32)
    assert ours.prompt_embeds.shape == (4, 77, 40)
    assert torch.equal(ours.prompt_embeds, expected)
    assert torch.equal(ours.pooled_embeds, pooled)


def test_many_prompts_are_batched(folder: Pipeline) -> None:
    prompts = [f"thing {i}" for i in range(37)]
    ours = encode_prompts(folder, prompts, max_tokens=77, **FP32)
    alone = encode_prompts(folder, prompts[36:], max_tokens=77, **FP32)
    assert len(ours.prompt_embeds) == len(ours.pooled_embeds) == 37
    torch.testing.assert_close(ours.prompt_embeds[36:], alone.prompt_embeds, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("max_tokens", "chunks"), [(150, 2), (225, 3)])
def test_long_prompts_are_encoded_in_chunks(folder: Pipeline, max_tokens: int, chunks: int) -> None:
    pieces = [letter * 75 for letter in "pqr"[:chunks]]  # 75 tokens each, one per letter
    long = encode_prompts(folder, ["".join(pieces), "short"], max_tokens=max_tokens, **FP32)
    parts = encode_prompts(folder, [*pieces, "short", ""], max_tokens=77, **FP32)
    assert long.prompt_embeds.shape == (2, 77 * chunks, 40)
    # The last letter of a word is its own token, so only whole chunks before the last one are comparable.
    inner = encode_prompts(folder, [pieces[0] + "z"], max_tokens=77, **FP32)
    torch.testing.assert_close(long.prompt_embeds[0, :77], inner.prompt_embeds[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(long.pooled_embeds[0], inner.pooled_embeds[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        long.prompt_embeds[0, -77:], parts.prompt_embeds[chunks - 1], rtol=1e-5, atol=1e-5
    )
    for chunk in range(1, chunks):
        got = long.prompt_embeds[1, 77 * chunk : 77 * (chunk + 1)]
        torch.testing.assert_close(got, parts.prompt_embeds[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(long.pooled_embeds[1], parts.pooled_embeds[-2], rtol=1e-5, atol=1e-5)


def test_truncations_are_listed(folder: Pipeline) -> None:
    found = list(truncations(folder, ["x" * 75, "x" * 76 + " red", "fine"], 77))
    assert [(t.prompt, t.tokens, t.kept) for t in found] == [("x" * 76 + " red", 77, 75)]
    assert found[0].cut.replace(" ", "") == "xred"
    assert list(truncations(folder, ["x" * 150], 150)) == []
    assert [t.tokens for t in truncations(folder, ["x" * 226], 225)] == [226]


@pytest.mark.parametrize("max_tokens", [77, 225])
def test_empty_prompt_is_zeros_as_in_sdxl(folder: Pipeline, max_tokens: int) -> None:
    empty = empty_prompt(folder, max_tokens=max_tokens, **FP32)
    assert not empty.prompt_embeds.any()
    assert not empty.pooled_embeds.any()
    encoded = encode_prompts(folder, ["a"], max_tokens=max_tokens, **FP32)
    assert empty.prompt_embeds.shape == encoded.prompt_embeds.shape
    assert empty.pooled_embeds.shape == encoded.pooled_embeds.shape


@pytest.mark.slow
def test_empty_prompt_is_encoded_where_the_pipeline_says_so(tmp_path: Path) -> None:
    path = make_tiny_sdxl(tmp_path / "m", force_zeros=False)
    _, expected, _, pooled = pipeline(path).encode_prompt(
        ["a"], device="cpu", do_classifier_free_guidance=True
    )
    empty = empty_prompt(open_sdxl(path), max_tokens=77, **FP32)
    assert torch.equal(empty.prompt_embeds, expected)
    assert torch.equal(empty.pooled_embeds, pooled)
    assert empty.prompt_embeds.any()


@pytest.mark.slow
def test_only_one_encoder_is_in_memory(folder: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[object]] = []
    load = Pipeline.load_text_encoder

    def watched(self: Pipeline, which, dtype=torch.float32):  # type: ignore[no-untyped-def]
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], "the first encoder is still there"
        model = load(self, which, dtype)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Pipeline, "load_text_encoder", watched)
    encode_prompts(folder, ["a"], max_tokens=77, **FP32)
    assert len(alive) == 2


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path = make_tiny_sdxl(tmp_path / "m")
    import json

    vocabulary = json.loads((path / "tokenizer" / "vocab.json").read_text())
    vocabulary |= {f"extra{i}": len(vocabulary) + i for i in range(5)}
    (path / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="mixes parts of different models"):
        encode_prompts(open_sdxl(path), ["a"], max_tokens=77, **FP32)
