"""Twin folders without equal names: by their order, which a person confirms, or by the prompts in them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from PIL import PngImagePlugin

from mapo_fast.data.prepare import prepare
from mapo_fast.data.sources.base import PairRecord, SkippedRow
from mapo_fast.data.sources.registry import open_source
from mapo_fast.run.ahead import check_prepare, check_train
from mapo_fast.util.errors import UserError
from tests.data.pair_sources import config, encoded, picture, png
from tests.data.preparing import said
from tests.data.sources.test_folders import files


def with_prompt(seed: int, prompt: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", f"{prompt}\nSteps: 20, Sampler: Euler")
    return encoded(picture(seed), pnginfo=info)


def with_graph(seed: int, prompt: str) -> bytes:
    nodes = {
        "3": {"class_type": "KSampler", "inputs": {"positive": ["6", 0], "latent_image": ["5", 0]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": prompt}},
    }
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps(nodes))
    return encoded(picture(seed), pnginfo=info)


def numbered(folder: Path, chosen: list[int], rejected: list[int]) -> Path:
    for side, numbers in (("chosen", chosen), ("rejected", rejected)):
        files(folder, {f"{side}/ComfyUI_{n}_.png": png(n + 100 * (side == "chosen")) for n in numbers})
    return folder


def rows(source: Path, **options: object) -> list[PairRecord | SkippedRow]:
    pairs = open_source(source, **options)  # type: ignore[arg-type]
    return list(pairs.read(range(len(pairs))))


def named(rows: list[PairRecord | SkippedRow]) -> list[tuple[str, str, str]]:
    """The prompt of each pair, and the names of its images."""
    pairs = (row for row in rows if isinstance(row, PairRecord))
    return [(row.prompt, row.chosen.name, row.rejected.name) for row in pairs]  # type: ignore[union-attr]


def test_numbered_files_are_paired_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    numbered(tmp_path, [9, 10, 11, 100], [2, 8, 12, 30])
    found = rows(tmp_path, pair_by="order", default_caption="a thing")
    assert [names[1:] for names in named(found)] == [
        (f"chosen/ComfyUI_{one}_.png", f"rejected/ComfyUI_{other}_.png")
        for one, other in zip([9, 10, 11, 100], [2, 8, 12, 30], strict=True)
    ]
    first = rows(tmp_path, pair_by="order")[0]
    assert isinstance(first, SkippedRow)
    assert first.detail == (
        "no ComfyUI_9_.txt or ComfyUI_9_.caption or ComfyUI_2_.txt or ComfyUI_2_.caption next to "
        "chosen/ComfyUI_9_.png or rejected/ComfyUI_2_.png"
    )
    (tmp_path / "rejected" / "ComfyUI_8_.txt").write_text("eight", encoding="utf-8")
    assert rows(tmp_path, pair_by="order")[1].prompt == "eight"  # type: ignore[union-attr]


def test_equal_counts_are_needed(tmp_path: Path) -> None:
    numbered(tmp_path, [1, 2, 3], [4, 5])
    with pytest.raises(UserError) as caught:
        open_source(tmp_path, pair_by="order")
    assert str(caught.value) == (
        f'data.source {tmp_path}: data.pair_by = "order" needs as many images in chosen/ as in rejected/, '
        "there are 3 and 2: remove those without a counterpart"
    )


def test_an_order_is_confirmed_before_anything_is_prepared(tiny_sdxl: Path, tmp_path: Path) -> None:
    source = numbered(tmp_path / "s", [1, 2, 3, 10], [21, 22, 23, 24])
    run = config(tiny_sdxl, source, tmp_path / "c", pair_by="order", default_caption="a thing", held_out=0.0)
    pairs = (
        "pairs by the order of their names: chosen/ComfyUI_1_.png + rejected/ComfyUI_21_.png; "
        "chosen/ComfyUI_2_.png + rejected/ComfyUI_22_.png; chosen/ComfyUI_3_.png + rejected/ComfyUI_23_.png "
        "and 1 more"
    )
    with pytest.raises(UserError) as caught:
        prepare(run)
    assert str(caught.value) == (
        f"data.source {source}: {pairs}. Look at them: if each two belong together, go on with --yes (in "
        "Python, prepare(config, yes=True)); nothing is prepared yet"
    )
    for check in (partial(check_train, resume=False), check_prepare):
        with pytest.raises(UserError, match="go on with --yes"):
            check(run)
        check(run, yes=True)
    assert not (tmp_path / "c").exists()
    result, told = said(run, yes=True)
    assert result.pairs == 4
    assert pairs in told.replace("\n", " ")
    assert prepare(run).pairs == 4, "what is prepared is confirmed"
    check_prepare(run)
    assert not check_train(run, resume=False)


def test_files_with_one_prompt_are_paired_and_have_it_as_caption(tmp_path: Path) -> None:
    files(
        tmp_path,
        {
            "w/00001.png": with_prompt(0, "a red cat"),
            "w/00002.png": with_graph(1, "a dog "),
            "w/00003.png": with_prompt(2, "a bird"),
            "w/00004.png": png(3),
            "l/x.png": with_graph(4, "a red cat"),
            "l/y.png": with_prompt(5, "a dog"),
            "l/z.png": with_prompt(6, "a horse"),
            "w/00002.txt": "a caption of its own",
        },
    )
    source = open_source(tmp_path, pair_by="prompt")
    found = list(source.read(range(len(source))))
    assert named(found) == [
        ("a red cat", "w/00001.png", "l/x.png"),
        ("a caption of its own", "w/00002.png", "l/y.png"),
    ]
    assert [(row.name, row.reason, row.detail) for row in found if isinstance(row, SkippedRow)] == [
        ("l/z", "missing counterpart", "no image in w/ has its prompt"),
        ("w/00003", "missing counterpart", "no image in l/ has its prompt"),
        ("w/00004", "no prompt in the file", "it holds no prompt of A1111 or ComfyUI"),
    ]
    assert {path.name for path in source.files()} == {
        *(f"0000{n}.png" for n in range(1, 5)),
        *("x.png", "y.png", "z.png", "00002.txt"),
    }
    assert [row.index for row in found] == list(range(5))


def test_several_images_of_a_prompt_are_listed_and_refused(tmp_path: Path) -> None:
    names = {f"chosen/{n}.png": with_prompt(n, "a cat") for n in range(2)}
    names |= {f"rejected/{n}.png": with_prompt(9 + n, ("a cat", "a dog", "a dog")[n]) for n in range(3)}
    with pytest.raises(UserError) as caught:
        open_source(files(tmp_path, names), pair_by="prompt")  # type: ignore[arg-type]
    assert str(caught.value) == (
        f'data.source {tmp_path}: data.pair_by = "prompt" needs one image of each side for a prompt, there '
        "are several for 'a cat' (chosen/0, chosen/1); 'a dog' (rejected/1, rejected/2): leave one of each, "
        "or give pairs equal names"
    )


def test_prompts_in_files_are_no_captions_of_equal_names(tmp_path: Path) -> None:
    files(tmp_path, {"w/a.png": with_prompt(0, "a cat"), "l/a.png": with_prompt(1, "a cat")})
    (row,) = rows(tmp_path)
    assert isinstance(row, SkippedRow)
    assert row.reason == "missing caption"


def test_other_layouts_are_not_paired(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        open_source(tmp_path, pair_by="order")
    assert str(caught.value) == (
        'data.pair_by = "order" is for two folders of images, chosen/ + rejected/ folders, w/ + l/ folders, '
        f"and data.source {tmp_path} is pairs.jsonl: leave it out"
    )


@pytest.mark.parametrize("pair_by", ["name", "order", "prompt"])
def test_each_way_of_pairing_is_another_source(tmp_path: Path, pair_by: str) -> None:
    files(tmp_path, {"w/a.png": with_prompt(0, "a cat"), "l/a.png": with_prompt(1, "a cat")})
    others = {"name", "order", "prompt"} - {pair_by}
    own = open_source(tmp_path, pair_by=pair_by).identity()  # type: ignore[arg-type]
    assert own == open_source(tmp_path, pair_by=pair_by).identity()  # type: ignore[arg-type]
    assert own not in {open_source(tmp_path, pair_by=other).identity() for other in others}  # type: ignore[arg-type]
