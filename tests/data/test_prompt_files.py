"""Files of prompts: each kind, their mistakes in one line, and other programs' notations."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mapo_fast.data.prompt_files import read_prompts
from mapo_fast.data.prompt_text import plain, remarks
from mapo_fast.models.sampling import LONGEST_TEXT
from mapo_fast.util.errors import UserError

RED, BLUE = "a red cat, sitting", 'a "blue" dog'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", f"{RED}\n\n  {BLUE}  \r\n"),
        ("a.txt", f"\ufeff{RED}\n{BLUE}"),
        ("a.jsonl", f"{json.dumps({'prompt': RED})}\n\n{json.dumps({'prompt': BLUE, 'seed': 1})}\n"),
        ("a.csv", f'id,prompt\n1,"{RED}"\n2,"a ""blue"" dog"\n\n'),
        ("a.csv", f'caption,n\r\n"{RED}",1\r\n"a ""blue"" dog",2\r\n'),
        ("a.tsv", f"Prompt\tCategory\n{RED}\tAnimals\n{BLUE}\tAnimals\n"),
        ("a.json", json.dumps([RED, BLUE])),
        ("A.JSON", json.dumps([RED, "", BLUE])),
    ],
)
def test_kinds(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ([RED, BLUE], [])


@pytest.mark.parametrize("column", ["caption", "Prompt", "prompt"])
def test_parquet(tmp_path: Path, column: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"jpg_0": [b"x", b"y", b"z"], column: [RED, None, BLUE]}), path)
    assert read_prompts(path) == ([RED, BLUE], [])


def test_a_prompt_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"{RED}\n{BLUE}\n{RED} <lora:x:1>\n")
    found = read_prompts(path)
    assert found.texts == [RED, BLUE]
    assert found.remarks == [
        "<lora:…> in 1 prompt is left out: name LoRAs with --lora FILE=WEIGHT, for all prompts",
        f"{path} has 2 different prompts; 1 repeat one of them",
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "has no prompts"),
        ("a.txt", b" \n\t\n<lora:a:1>\n", "has no prompts"),
        ("a.txt", b"\xff\xfea\x00", "not UTF-8 text: save it as UTF-8"),
        ("a.txt", b"ok\n" + b"x" * (LONGEST_TEXT + 1), "line 2: the prompt has 10,001 characters"),
        ("a.jsonl", b'{"prompt": "a"}\nred\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n', 'line 1 is no object with a "prompt"'),
        ("a.jsonl", b'["a"]\n', 'line 1 is no object with a "prompt"'),
        ("a.jsonl", b'{"prompt": 7}\n', "line 1: 7 is not text"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "line 1: the prompt is not valid Unicode"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON: it is nested too deeply"),
        (
            "a.csv",
            b"id,text\n1,a\n",
            r"has no column prompt, Prompt, caption: its columns are \['id', 'text'\]",
        ),
        ("a.csv", b"", "has no column prompt"),
        ("a.csv", b"id,prompt\n1\n", "line 2 has 1 columns, fewer than its head"),
        ("a.csv", b'prompt\n"a', "line 2 cannot be read"),
        ("a.csv", b"prompt\n" + b"x" * 200_000, "line 2 cannot be read: field larger than field limit"),
        ("a.json", b'{"a": "b"}', "is not a list of texts"),
        ("a.json", b"[1]", "entry 1: 1 is not text"),
        ("a.json", b"[", "is not JSON"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.md", b"a", r"prompts are read from \.txt, \.jsonl, "),
        ("a", b"a", r"prompts are read from \.txt, \.jsonl, "),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "folder.txt").mkdir()
    for name in ("none.txt", "none.parquet", "folder.txt", "folder.parquet"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            read_prompts(tmp_path / name)


def test_numbers_in_a_parquet_column_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 1: 1 is not text"):
        read_prompts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("written", "read", "kinds"),
    [
        ("a cat", "a cat", ""),
        ("<lora:my style:0.8> a <LORA:b:1:2>cat<lyco:c>", "a cat", "lora"),
        ("a (red:1.2) cat, (dog: .5 )", "a red cat, dog", "weight"),
        ("((a red:1.1) cat:-1)", "a red cat", "weight"),
        ("red BREAK blue\nBREAK", "red blue", "break"),
        ("daybreak, BREAKFAST, a break", "daybreak, BREAKFAST, a break", ""),
        ("(solo), ((smile)), [bad], (at 10:30 pm)", "(solo), ((smile)), [bad], (at 10:30 pm)", ""),
        (r"miku \(vocaloid\)", "miku (vocaloid)", ""),
        (r"(miku \(vocaloid\):1.3)", "miku (vocaloid)", "weight"),
        (r"\(a:1.2\)", "(a:1.2)", ""),
        ("</script><script>alert(1)</script>", "</script><script>alert(1)</script>", ""),
        (" a \t b\n", "a b", ""),
    ],
)
def test_notations(written: str, read: str, kinds: str) -> None:
    assert plain(written) == (read, frozenset(kinds.split()))


def test_one_warning_for_each_kind() -> None:
    found = list(remarks([frozenset({"lora", "break"}), frozenset({"lora"}), frozenset()]))
    assert [line.split(" is ")[0] for line in found] == ["<lora:…> in 2 prompts", "BREAK in 1 prompt"]


@pytest.mark.parametrize("piece", ["(", "(a:1", "<lora:", "((a:1.1)", "\\(", ":1)", "(:1)"])
def test_hostile_notations_take_no_time(piece: str) -> None:
    start = time.perf_counter()
    plain(piece * (LONGEST_TEXT // len(piece)))
    assert time.perf_counter() - start < 2
