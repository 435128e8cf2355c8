"""Headers that do not describe their file are refused in one line, before a tensor is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mapo_fast.util.errors import UserError
from mapo_fast.util.tensorheader import SAMPLE, read_header, samples, weights_digest


def written(path: Path, header: Any, data: int = 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def tensor(begin: int, end: int, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_says_where_each_tensor_is(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(5000, dtype=torch.int16),
        "c": torch.empty(0),
    }
    save_file(tensors, path, metadata={"who": "me"})
    header = read_header(path)
    content = path.read_bytes()
    assert header.metadata == {"who": "me"}
    for name, value in tensors.items():
        entry = header.tensors[name]
        assert entry.shape == tuple(value.shape)
        assert content[entry.begin : entry.end] == value.numpy().tobytes()
    sampled = dict(samples(header))
    whole = tensors["b"].numpy().tobytes()
    assert sampled["b"] == whole[:SAMPLE] + whole[-SAMPLE:]


def test_the_digest_sees_values_metadata_and_size(tmp_path: Path) -> None:
    path, digests = tmp_path / "m.safetensors", set()
    for value, metadata in ((0.0, {}), (1.0, {}), (1.0, {"a": "b"})):
        save_file({"a": torch.full((4,), value)}, path, metadata=metadata)
        digests.add(weights_digest(path))
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": tensor(0, 4), "b": tensor(2, 8, dtype="I16", shape=(3,))}, "'b' overlaps another"),
        ({"a": tensor(0, 4)}, "last 4 bytes belong to no tensor"),
        ({"a": tensor(4, 8)}, "'a' has bytes before it"),
        ({"a": tensor(0, 4), "b": tensor(4, 12, (2,))}, "4 bytes too short: it was cut off"),
        ({"a": tensor(0, 8)}, "'a' has 8 bytes, its type and shape 4"),
        ({"a": tensor(0, 8, dtype="Q4")}, "unknown type 'Q4'"),
        ({"a": tensor(0, 8, (2**61, 2))}, "does not say where"),
        ({"a": tensor(4, 0)}, "'a' has -4 bytes"),
        ({"a": {**tensor(0, 8, (2,)), "shape": [2.0]}}, "does not say where"),
        ({"a": {**tensor(0, 8, (2,)), "data_offsets": [0, True]}}, "does not say where"),
        ({"a": 1}, "does not describe the tensor 'a'"),
        ({"__metadata__": {"a": 1}, "a": tensor(0, 8, (2,))}, "__metadata__ is not a table of texts"),
        (b'{"a": 1, "a": 2}', "has 'a' twice"),
        (b"[]", "not a JSON object"),
        (b"{", "cannot be read as safetensors"),
        (b"\xff", "cannot be read as safetensors"),
        (b"[" * 10**5, "cannot be read as safetensors"),
    ],
)
def test_a_header_that_does_not_describe_its_file(tmp_path: Path, header: Any, says: str) -> None:
    path = written(tmp_path / "m.safetensors", header)
    with pytest.raises(UserError) as caught:
        read_header(path)
    text = str(caught.value)
    assert str(path) in text
    assert says in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04" + bytes(100), "it is a pickle"),
        (b"\x80\x02" + bytes(100), "it is a pickle"),
        (b"GGUF" + bytes(100), "it is a GGUF file"),
        (b"", "cut off or damaged"),
        ((2**62).to_bytes(8, "little") + bytes(100), "cut off or damaged"),
        ((200_000_000).to_bytes(8, "little") + bytes(100), "cut off or damaged"),
    ],
)
def test_files_of_other_formats(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "m.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_header(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=str(tmp_path)):
        read_header(tmp_path)
