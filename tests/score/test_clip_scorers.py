"""PickScore, HPS, CLIPScore and the aesthetic score against implementations of their formulas."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPModel

from mapo_fast.models.tokenizers import clip_tokenizer
from mapo_fast.score import aesthetic, clip_scorers  # noqa: F401  they register themselves
from mapo_fast.score.clip import preprocess, read_clip
from mapo_fast.score.scorer import load_scorer
from mapo_fast.util.errors import UserError
from tests.score.clips import (
    LENGTH,
    PROJECTION,
    SIDE,
    open_clip_image,
    open_clip_state,
    open_clip_text,
    write_transformers,
)

PROMPTS = ["a red ball", "two dogs, oil painting " * 30, ""]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    shapes = ((40, 40, 3), (50, 33, 3), (33, 61, 3))
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformers(tmp_path_factory.mktemp("clip"))


def cosines(folder: Path, images: list[Image.Image]) -> torch.Tensor:
    """By transformers' own CLIPModel, loaded by itself."""
    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = clip_tokenizer(1)(
        PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(
            input_ids=tokens.input_ids, pixel_values=torch.stack([preprocess(i, SIDE) for i in images])
        )
    return (out.image_embeds * out.text_embeds).sum(dim=1)


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("pickscore", lambda cos: np.exp(2.6592) * cos),
        ("hps21", lambda cos: 100 * cos),
        ("hps20", lambda cos: 100 * cos),
        ("clipscore", lambda cos: 100 * cos.clip(min=0)),
    ],
)
def test_scores_are_the_published_formulas(
    name: str, score: object, folder: Path, images: list[Image.Image]
) -> None:
    found, scorer = load_scorer(f"{name}={folder}")
    assert found == name
    expected = score(cosines(folder, images))  # type: ignore[operator]
    np.testing.assert_allclose(scorer(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    assert scorer(images, PROMPTS).dtype == np.float32


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_open_clips_weights_become_the_same_model(
    tmp_path: Path, suffix: str, images: list[Image.Image]
) -> None:
    state = open_clip_state()
    path = tmp_path / f"HPS{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 1, "state_dict": state}, path)
    else:
        save_file(state, path)
    clip, _ = read_clip(path)
    pixels = torch.stack([preprocess(image, SIDE) for image in images])
    torch.testing.assert_close(clip.images(images), open_clip_image(state, pixels), rtol=1e-4, atol=1e-5)
    ids = torch.zeros(len(PROMPTS), LENGTH, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):  # OpenCLIP pads by zeros and keeps the end token
        tokens = clip_tokenizer(1)(prompt, truncation=True, max_length=LENGTH).input_ids
        ids[row, : len(tokens)] = torch.tensor(tokens)
    torch.testing.assert_close(clip.texts(PROMPTS), open_clip_text(state, ids), rtol=1e-4, atol=1e-5)


def test_an_object_instead_of_a_tensor_is_read(
    folder: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`get_image_features` gives a tensor before transformers 5, and an object since."""
    clip, _ = read_clip(folder)
    found = clip.images(images)
    real = type(clip.model).get_image_features

    def other_form(self: CLIPModel, **given: object) -> object:
        out = real(self, **given)
        if isinstance(out, torch.Tensor):
            return type("Output", (), {"pooler_output": out})()
        return out.pooler_output

    monkeypatch.setattr(type(clip.model), "get_image_features", other_form)
    torch.testing.assert_close(clip.images(images), found)


def head(path: Path, width: int = PROJECTION) -> nn.Sequential:
    """The published head's shape, on a narrow CLIP."""
    sizes = (width, 1024, 128, 64, 16, 1)
    layers: list[nn.Module] = []
    for i in range(5):
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        if i < 3:
            layers.append(nn.Dropout(0.2))
    model = nn.Sequential(*layers)
    torch.save({f"layers.{name}": tensor for name, tensor in model.state_dict().items()}, path)
    return model.eval()


def test_the_aesthetic_score_is_the_head_of_the_embedding(
    tmp_path: Path, folder: Path, images: list[Image.Image]
) -> None:
    published = head(tmp_path / "head.pth")
    _, scorer = load_scorer(f"aesthetic={tmp_path / 'head.pth'},{folder}")
    with torch.no_grad():
        expected = published(read_clip(folder)[0].images(images))[:, 0]
    np.testing.assert_allclose(scorer(images, PROMPTS), expected, rtol=1e-5, atol=1e-6)


def test_preprocessing_is_clips() -> None:
    """Shorter side to 32, centre crop, mean and deviation: the crop of a wide image is its middle."""
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    pixels = preprocess(image, 32)
    assert pixels.shape == (3, 32, 32)
    torch.testing.assert_close(
        pixels[2].mean(), torch.tensor((1 - 0.40821073) / 0.27577711), rtol=1e-3, atol=1e-3
    )


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path("/tmp/never").touch, ())


def test_wrong_files_are_one_line_each(tmp_path: Path, folder: Path) -> None:
    head(tmp_path / "wide.pth", width=64)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    torch.save([1, 2], tmp_path / "list.pt")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:20])
    for text, message in {
        "beauty=x": "there is no such scorer; there are",
        "pickscore": "write --score pickscore=FOLDER",
        "aesthetic=x": "write --score aesthetic=HEAD,CLIP",
        f"hps21={tmp_path / 'no.pt'}": "does not exist",
        f"hps21={tmp_path}": "name the scorer's weights",
        f"hps21={tmp_path / 'evil.pt'}": "holds no plain tensors",
        f"hps21={tmp_path / 'list.pt'}": "no table of tensors",
        f"hps21={tmp_path / 'x.safetensors'}": "is no CLIP model",
        f"hps21={tmp_path / 'cut.safetensors'}": "cut.safetensors",
        f"aesthetic={tmp_path / 'wide.pth'},{folder}": "needs CLIP ViT-L/14",
        f"aesthetic={tmp_path / 'list.pt'},{folder}": "no table of tensors",
    }.items():
        with pytest.raises(UserError, match=message) as raised:
            load_scorer(text)
        assert "\n" not in str(raised.value)
