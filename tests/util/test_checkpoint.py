"""Checkpoints: whole or absent, verified, pruned; the final UNet folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mapo_fast.util import folders, tensorfile
from mapo_fast.util.checkpoint import CheckpointStore, save_unet
from mapo_fast.util.errors import UserError
from mapo_fast.util.tensorfile import write_tensors


def tensors(scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = scale * torch.randn(6, 4, generator=generator)
    image = torch.randn(2, 3, 4, 5, generator=generator)
    return {
        "plain": base,
        "transposed": base.t(),  # shares storage, not contiguous
        "channels_last": image.to(memory_format=torch.channels_last),
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "half": torch.randn(3, generator=generator).half(),
        "double": torch.randn(3, generator=generator).double(),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "long": torch.tensor([1, -(2**40)]),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_tensors_is_a_plain_safetensors_file_with_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    digest = write_tensors(path, tensors(), {"format": "pt"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_same(load_file(path), tensors())


def test_write_tensors_refuses_a_dtype_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="spectrum"):
        write_tensors(tmp_path / "x", {"spectrum": torch.zeros(2, dtype=torch.complex64)})


def test_writing_goes_on_after_a_partial_write() -> None:
    class Dripping:
        def __init__(self) -> None:
            self.data = b""

        def write(self, piece: memoryview) -> int:
            self.data += bytes(piece[:3])
            return min(3, len(piece))

    file = Dripping()
    tensorfile._write(file, memoryview(b"0123456789"))
    assert file.data == b"0123456789"


class NewMemory(TorchDispatchMode):
    """Bytes of tensor storages made inside, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            size = out.untyped_storage().nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(out.untyped_storage(), self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize(("transposed", "copies"), [(False, 0), (True, 1)])
def test_saving_copies_at_most_one_tensor_at_a_time(tmp_path: Path, transposed: bool, copies: int) -> None:
    """Contiguous CPU tensors are written from where they are; others are gathered one by one."""
    weights = {f"w{i}": torch.full((512, 512), float(i)) for i in range(8)}
    if transposed:
        weights = {name: weight.t() for name, weight in weights.items()}
    with NewMemory():  # imports what torch imports on first use, so that it is not counted
        CheckpointStore(tmp_path, keep=1).save(0, {"model": {"w": torch.ones(2, 3).t()}}, {})
    tracemalloc.start()
    with NewMemory() as memory:
        CheckpointStore(tmp_path, keep=1).save(1, {"model": weights}, {})
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one = 512 * 512 * 4
    assert memory.peak == copies * one
    assert memory.live == 0
    assert python_peak < one  # no bytes objects of whole tensors either


def test_save_and_read_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new" / "checkpoints", keep=2)
    state = {"seed": 2**40, "lr": 0.1 + 0.2, "scaler": None, "nested": {"list": [1, 2]}}
    path = store.save(100, {"model": tensors(), "optimizer": {"0.m": torch.ones(3)}}, state, "What it is.")
    assert path.name == "step-00000100"
    assert steps_in(path) == ["README.txt", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert (path / "README.txt").read_text() == "What it is."
    (path / "README.txt").unlink()  # it is for people: nothing depends on it
    found = store.newest()
    assert found is not None
    assert (found.step, found.state, found.passed_over) == (100, state, ())
    assert_same(dict(found.views("model")), tensors())
    assert_same(dict(found.views("optimizer")), {"0.m": torch.ones(3)})


def test_copy_into_existing_tensors(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"model": tensors()}, {})
    found = store.newest()
    assert found is not None
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    kept = targets["channels_last"]
    found.copy_into("model", targets)
    assert_same(targets, tensors())
    assert kept is targets["channels_last"]
    assert kept.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_copy_into_another_model_is_refused_and_copies_nothing(tmp_path: Path, change: str) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"model": {"a": torch.ones(2), "b": torch.ones(3)}}, {})
    targets = {"a": torch.zeros(2), "b": torch.zeros(3)}
    if change == "shape":
        targets["b"] = torch.zeros(4)
    elif change == "missing":
        del targets["b"]
    else:
        targets["c"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"does not fit the model being trained: [bc] is"):
        store.newest().copy_into("model", targets)  # type: ignore[union-attr]
    assert not any(tensor.any() for tensor in targets.values())


def test_keeps_the_last_k(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 30, 123456789):
        store.save(step, {"model": {"a": torch.ones(1)}}, {})
    assert steps_in(tmp_path) == ["step-00000030", "step-123456789"]
    assert store.newest().step == 123456789  # type: ignore[union-attr]


def test_an_empty_store_has_no_newest(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "absent", keep=1).newest() is None
    (tmp_path / "notes").mkdir()
    assert CheckpointStore(tmp_path, keep=1).newest() is None


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """Damage that puts something else into `state.json`."""

    def damage(path: Path) -> None:
        changed = change(json.loads((path / "state.json").read_text()))
        (path / "state.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))

    return damage


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip": (
        lambda p: _flip_a_byte(p / "model.safetensors"),
        r"model\.safetensors does not match its checksum",
    ),
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 20), r"does not match its checksum"),
    "file missing": (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "file is a FIFO": (
        lambda p: _fifo(p / "model.safetensors"),
        r"model\.safetensors cannot be read \(it is a FIFO",
    ),
    "state missing": (lambda p: (p / "state.json").unlink(), r"state\.json is missing"),
    "state is a FIFO": (lambda p: _fifo(p / "state.json"), r"state\.json is not readable"),
    "state empty": (_state(lambda s: ""), r"state\.json is not readable"),
    "state not an object": (_state(lambda s: [1]), r"state\.json is not readable"),
    "state not text": (lambda p: (p / "state.json").write_bytes(b"\xff\xfe"), r"state\.json is not readable"),
    "state nested": (_state(lambda s: "[" * 200_000 + "]" * 200_000), r"state\.json is not readable"),
    "state nested in an object": (
        _state(lambda s: json.dumps(s).replace('{"at": 200}', '{"a":' * 900 + "1" + "}" * 900)),
        r"state\.json (is not readable|does not match its checksum)",
    ),
    "a number of 5,000 digits": (
        _state(lambda s: json.dumps(s).replace("200", "2" * 5000, 1)),
        r"state\.json is not readable",
    ),
    "state changed": (
        _state(lambda s: s | {"state": {"at": 201}}),
        r"state\.json does not match its checksum",
    ),
    "step changed": (_state(lambda s: s | {"step": 201}), r"state\.json does not match its checksum"),
    "step is text": (_state(lambda s: s | {"step": "200"}), r"state\.json does not match its checksum"),
    "no files": (_state(lambda s: s | {"files": None}), r"state\.json does not match its checksum"),
    "no checksum": (
        _state(lambda s: {name: s[name] for name in s if name != "sha256"}),
        r"state\.json does not match its checksum",
    ),
    "another format": (_state(lambda s: s | {"format": 99}), r"format 99"),
    "format is text": (_state(lambda s: s | {"format": "2"}), r"state\.json does not match its checksum"),
    "renamed": (
        lambda p: shutil.copytree(p.with_name("step-00000100"), p, dirs_exist_ok=True),
        r"it is that of step 100: name it step-00000100 again",
    ),
    "of another run": (
        lambda p: shutil.copytree(p.parents[1] / "other" / p.name, p, dirs_exist_ok=True),
        r"it belongs to another run",
    ),
    "a link to nothing": (
        lambda p: (shutil.rmtree(p), p.symlink_to(p.with_name("nothing"))),
        r"it is a link to nothing",
    ),
    "a file": (lambda p: (shutil.rmtree(p), p.touch()), r"it is not a folder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_falls_back_past_a_damaged_checkpoint_and_says_so(tmp_path: Path, kind: str) -> None:
    if "FIFO" in kind and not hasattr(os, "mkfifo"):
        pytest.skip("needs FIFOs")
    damage, message = DAMAGE[kind]
    store = CheckpointStore(tmp_path / "own", keep=3, run="own")
    for step in (100, 200):
        for one in (store, CheckpointStore(tmp_path / "other", keep=3, run="other")):
            one.save(step, {"model": {"a": torch.full((4,), float(step))}}, {"at": step})
    damage(tmp_path / "own" / "step-00000200")
    found = store.newest()
    assert found is not None
    assert found.step == 100
    assert found.state == {"at": 100}
    [(path, reason)] = found.passed_over
    assert path == tmp_path / "own" / "step-00000200"
    assert re.search(message, reason), reason


def test_only_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2):
        store.save(step, {"model": {"a": torch.ones(2)}}, {})
        _flip_a_byte(tmp_path / f"step-0000000{step}" / "model.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint .* can be used \(step-00000002: .*step-00000001: "):
        store.newest()


def test_a_whole_checkpoint_of_the_step_stays_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(5, {"model": {"a": torch.ones(2)}}, {})
    store.save(5, {"model": {"a": torch.zeros(2)}}, {})
    assert dict(store.newest().views("model"))["a"].tolist() == [1, 1]  # type: ignore[union-attr]
    _flip_a_byte(tmp_path / "step-00000005" / "model.safetensors")
    store.save(5, {"model": {"a": torch.zeros(2)}}, {})
    assert dict(store.newest().views("model"))["a"].tolist() == [0, 0]  # type: ignore[union-attr]


def test_pruning_after_a_fallback_keeps_what_was_just_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(200, {"model": {"a": torch.ones(2)}}, {})
    _flip_a_byte(tmp_path / "step-00000200" / "model.safetensors")
    store.save(150, {"model": {"a": torch.ones(2)}}, {})
    assert steps_in(tmp_path) == ["step-00000150", "step-00000200"]
    assert store.newest().step == 150  # type: ignore[union-attr]


def test_pruning_counts_what_can_be_used_and_leaves_another_runs(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, run="own")
    other = CheckpointStore(tmp_path, keep=9, run="other")
    one: dict[str, dict[str, Tensor]] = {"model": {"a": torch.ones(2)}}
    store.save(1, one, {})
    other.save(2, one, {})
    store.save(3, one, {})
    (tmp_path / "step-00000003" / "state.json").write_text("")
    store.save(4, one, {})
    names = [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert steps_in(tmp_path) == names
    store.save(5, one, {})
    assert steps_in(tmp_path) == [names[1], names[3], "step-00000005"]


def test_a_linked_checkpoint_is_used_and_pruned_without_its_folder(tmp_path: Path) -> None:
    """Moved to a bigger disk and linked back."""
    store = CheckpointStore(tmp_path / "own", keep=1)
    store.save(1, {"model": {"a": torch.ones(2)}}, {})
    (tmp_path / "own" / "step-00000001").rename(tmp_path / "moved")
    (tmp_path / "own" / "step-00000001").symlink_to(tmp_path / "moved")
    assert store.newest().step == 1  # type: ignore[union-attr]
    for step in (2, 3):
        store.save(step, {"model": {"a": torch.ones(2)}}, {})
    assert steps_in(tmp_path / "own") == ["step-00000003"]
    assert (tmp_path / "moved" / "state.json").is_file()


def test_what_a_kill_in_the_last_save_left_is_tidied(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for step in (1, 2):
        CheckpointStore(tmp_path, keep=2).save(step, {"model": {"a": torch.ones(2)}}, {})
    (tmp_path / "moved").mkdir()
    (tmp_path / ".step-00000003.tmp").mkdir()
    (tmp_path / ".step-00000000.tmp").symlink_to(tmp_path / "moved")
    store.tidy(2)
    assert steps_in(tmp_path) == ["moved", "step-00000002"]


def test_leftover_temporary_folders_are_removed_and_nothing_else(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for name in (".step-00000007.tmp", "previews", ".step-notes.tmp"):
        (tmp_path / name).mkdir()
    store.save(8, {"model": {"a": torch.ones(2)}}, {})
    assert steps_in(tmp_path) == [".step-notes.tmp", "previews", "step-00000008"]


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_full_disk_is_one_line_and_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"model": {"a": torch.ones(2)}}, {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "write":
        monkeypatch.setattr(tensorfile, "_write", full)
    elif failing == "fsync":
        monkeypatch.setattr(folders, "fsync", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError, match=r"cannot write .*step-00000002"):
        store.save(2, {"model": {"a": torch.ones(2)}}, {})
    monkeypatch.undo()
    assert steps_in(tmp_path) == ["step-00000001"]
    assert store.newest().step == 1  # type: ignore[union-attr]


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep = 0"):
        CheckpointStore(tmp_path, keep=0)


SAVER = """
import sys, torch
from pathlib import Path
from mapo_fast.util.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), keep=2)
start = store.newest()
step = start.step if start else 0
print("ready", flush=True)
while True:
    step += 1
    weights = {f"w{i}": torch.full((50_000,), float(step)) for i in range(20)}
    store.save(step, {"model": weights}, {"at": step})
    print("saved", flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_stays_loadable(tmp_path: Path) -> None:
    """At random moments, twice: the newest checkpoint is whole and none is damaged."""
    store = CheckpointStore(tmp_path, keep=2)
    moments = random.Random(0)
    last = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"ready\n", b"saved\n"]
        time.sleep(moments.uniform(0.05, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        if sys.platform != "win32":
            assert process.returncode == -signal.SIGKILL
        found = store.newest()
        assert found is not None
        assert found.passed_over == ()
        assert found.step > last
        assert found.state == {"at": found.step}
        assert all(bool((t == found.step).all()) for t in dict(found.views("model")).values())
        last = found.step


@pytest.fixture(scope="module")
def unet(tiny_sdxl: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")


def test_a_saved_unet_loads_with_plain_diffusers(tmp_path: Path, unet: Any) -> None:
    from diffusers import UNet2DConditionModel

    save_unet(unet, tmp_path / "out" / "unet")
    assert steps_in(tmp_path / "out") == ["unet"]
    assert steps_in(tmp_path / "out" / "unet") == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded, info = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(loaded.state_dict(), unet.state_dict())


def test_a_saved_unet_may_come_from_other_tensors_and_replaces_the_folder(tmp_path: Path, unet: Any) -> None:
    save_unet(unet, tmp_path / "unet")
    other = {name: tensor.bfloat16() for name, tensor in unet.state_dict().items()}
    save_unet(unet, tmp_path / "unet", other)
    assert steps_in(tmp_path) == ["unet"]
    assert_same(load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"), other)


def test_a_failed_save_keeps_the_unet_that_stands_there(
    tmp_path: Path, unet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_unet(unet, tmp_path / "unet")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="the disk is full"):
        save_unet(unet, tmp_path / "unet")
    monkeypatch.undo()
    assert steps_in(tmp_path) == ["unet"]
    assert_same(load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"), unet.state_dict())


def test_discarding_keeps_at_least_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    assert store.discard_from(0) is None
    for step in (2, 4, 6):
        store.save(step, {"model": {"a": torch.zeros(1)}}, {})
    assert store.discard_from(7) == 6
    assert store.discard_from(4) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002"]
    assert store.discard_from(1) == 2, "the only one that is left"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002"]


def test_discarding_counts_only_what_can_be_used(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (2, 4):
        store.save(step, {"model": {"a": torch.zeros(1)}}, {})
    _flip_a_byte(tmp_path / "step-00000002" / "model.safetensors")
    assert store.discard_from(4) == 4
    assert (tmp_path / "step-00000004").is_dir()


def test_a_checkpoints_folder_on_a_disk_that_is_not_there_is_no_new_beginning(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match=r"cannot read .*checkpoints: No such file"):
        CheckpointStore(tmp_path / "checkpoints", keep=1).newest()


def test_any_flipped_bit_of_a_checkpoint_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """Damage to the record, the weights or the file's header is noticed; white space in JSON may change."""
    store = CheckpointStore(tmp_path, keep=1, run="own")
    saved = store.save(7, {"model": {"a": torch.ones(40)}}, {"lr": 0.1, "names": ["x", "y"]})
    chance = random.Random(0)
    found = 0
    for name in ("state.json", "model.safetensors"):
        whole = (saved / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            (saved / name).write_bytes(damaged)
            try:
                newest = store.newest()
            except UserError:
                found += 1
            else:
                assert newest is not None
                assert newest.state == {"lr": 0.1, "names": ["x", "y"]}
                assert json.loads(damaged) == json.loads(whole)
        (saved / name).write_bytes(whole)
    assert found > 250
