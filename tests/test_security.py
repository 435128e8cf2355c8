"""Who may bring code: each row of `docs/security.md` does here what an attacker would.

A trap is a module, or a pickle, that leaves a mark when it runs. Every test first springs one by hand, so
that the absence of the mark means something.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from mapo_fast import cli
from mapo_fast.data.cache import PairCache
from mapo_fast.data.images.decode import decode
from mapo_fast.data.prepare import prepare
from mapo_fast.data.sources import open_source
from mapo_fast.models.identity import encoders_identity, files_fingerprint, unet_identity
from mapo_fast.models.open import open_sdxl
from mapo_fast.models.sdxl import ENCODERS
from mapo_fast.models.text import TextEncoder
from mapo_fast.planner import store
from mapo_fast.run.folder import read_run
from mapo_fast.run.log import read_log
from mapo_fast.run.starts import keep_settings
from mapo_fast.run.train import fit
from mapo_fast.settings.load import load_config
from mapo_fast.settings.table import TABLE
from mapo_fast.util import extensions
from mapo_fast.util.checkpoint import CheckpointStore
from mapo_fast.util.errors import UserError
from mapo_kernels.objectives import OBJECTIVES
from tests.data.pair_sources import config as pairs_config
from tests.data.pair_sources import pickapic_rows, png
from tests.training import make_cache, make_config, settings

ROOT = Path(__file__).parent.parent


class Trap:
    """Code that leaves a mark when it runs, as a module and as a pickle."""

    name = "harmful_code"

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    @property
    def source(self) -> str:
        """A module that leaves the mark when it is imported, and again when its function is called."""
        return (
            f"from pathlib import Path\nPath({str(self.mark)!r}).write_text('imported')\n"
            f"def register(*args, **kwargs):\n    Path({str(self.mark)!r}).write_text('called')\n"
            "class Harmful:\n    from_pretrained = __init__ = register\n"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """What unpickling calls."""
        return Path.write_text, (self.mark, "unpickled")

    @property
    def sprung(self) -> bool:
        """Whether it has run, or been imported."""
        return self.mark.exists() or self.name in sys.modules

    def lay(self, folder: Path, name: str = "") -> Path:
        """Write the module into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name or self.name}.py"
        file.write_text(self.source)
        return file

    def reset(self) -> None:
        """Take the mark away."""
        self.mark.unlink(missing_ok=True)
        sys.modules.pop(self.name, None)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    """A trap that was sprung once as a module and once as a pickle. The current folder has it too."""
    trap = Trap(tmp_path / "mark")
    trap.lay(tmp_path / "control")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "control")
        importlib.import_module(trap.name)
    assert trap.sprung
    trap.reset()
    pickle.loads(pickle.dumps(trap))
    assert trap.sprung
    trap.reset()
    monkeypatch.chdir(trap.lay(tmp_path / "here").parent)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield trap
    trap.reset()


@pytest.fixture
def model(tiny_sdxl: Path, tmp_path: Path) -> Path:
    """A pipeline folder of one's own, the big files of which are links."""
    for file in tiny_sdxl.rglob("*"):
        target = tmp_path / "model" / file.relative_to(tiny_sdxl)
        if file.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return tmp_path / "model"


@pytest.fixture(scope="module")
def cache(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_sdxl, tmp_path_factory.mktemp("data"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def use(model: Path) -> None:
    """All that `prepare` and `train` do with a model folder."""
    folder = open_sdxl(model)
    folder.load_unet()
    folder.load_vae()
    for which in (1, 2):
        TextEncoder(folder, which, 1, torch.device("cpu"), torch.float32)(["a red thing"])
    _ = encoders_identity(folder), unet_identity(folder), files_fingerprint(folder, ENCODERS)


def used_or_refused(call: Callable[[], Any]) -> str:
    """The one line of a refusal; empty where there was none."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


# --- The page and its tests ---


@pytest.mark.slow
def test_each_row_of_the_page_has_its_tests() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`tests/" in line]
    tables = [line for line in page.splitlines() if line.startswith("| ")]
    headings = [line for line in tables if line.startswith("| what |")]
    assert len(rows) == len(tables) - len(headings) >= 12, "a row without a test"
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page)
    assert len(named) >= len(rows)
    for file, test in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test
    own = {node.name for node in ast.parse(Path(__file__).read_text("utf-8")).body
           if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}  # fmt: skip
    missing = own - {test for _, test in named} - {"test_each_row_of_the_page_has_its_tests"}
    assert not missing, f"docs/security.md does not name {missing}"


# --- Configs ---


NAMES = ("harmful_code", "harmful_code:register", "harmful_code.Harmful", "./harmful_code.py")


def _texts() -> list[tuple[str, str]]:
    """Section and key of every setting that may be text of some kind."""
    kinds = ("str", "Literal", "Path", "tuple")
    names = [row.name for row in TABLE if any(kind in str(row.type) for kind in kinds)]
    return [(section, key) for section, _, key in (name.partition(".") for name in names)]


@pytest.mark.slow
def test_no_setting_names_code(tmp_path: Path, trap: Trap, tiny_sdxl: Path, cache: Path) -> None:
    """Every text setting is given the name of a module in the config's folder and in the current one."""
    asked = _texts()
    assert {("objective", "name"), ("optim", "name"), ("data", "source"), ("train", "output")} <= {*asked}
    trap.lay(tmp_path / "project")
    path = tmp_path / "project" / "config.toml"
    for section, key in asked:
        for name in NAMES:
            table = settings(tiny_sdxl, cache, tmp_path / "run", train={"steps": 1})
            table.setdefault(section, {})[key] = name
            path.write_text(tomli_w.dumps(table))
            said = used_or_refused(lambda: load_config(path))
            assert not trap.sprung, (section, key, name)
            if key == "name":
                assert "name" in said
    for section in ("allow_code", "extensions", "plugins", "import"):
        path.write_text(tomli_w.dumps({**table, section: {"code": "harmful_code:register"}}))
        assert f"unknown key {section}" in used_or_refused(lambda: load_config(path))
    assert not trap.sprung


# --- Model folders ---


def _custom_component(model: Path, trap: Trap) -> None:
    trap.lay(model)
    index = json.loads((model / "model_index.json").read_text())
    index["unet"] = [trap.name, "Harmful"]
    index["_class_name"] = [trap.name, "Harmful"]
    (model / "model_index.json").write_text(json.dumps(index))
    trap.lay(model / "unet", "unet")


def _auto_map(model: Path, trap: Trap) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        trap.lay(model / part)
        kinds = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), f"{trap.name}.Harmful")
        edit(model / part / "config.json", auto_map=kinds, custom_pipelines={"x": {"impl": trap.name}},
             architectures=["Harmful"], trust_remote_code=True)  # fmt: skip
    for part in ("tokenizer", "tokenizer_2"):
        trap.lay(model / part)
        edit(model / part / "tokenizer_config.json", tokenizer_class="Harmful", trust_remote_code=True,
             auto_map={"AutoTokenizer": [f"{trap.name}.Harmful", f"{trap.name}.Harmful"]})  # fmt: skip
    trap.lay(model / "scheduler")
    edit(model / "scheduler" / "scheduler_config.json", auto_map={"Scheduler": f"{trap.name}.Harmful"})


def _class_of_vae(model: Path, trap: Trap) -> None:
    trap.lay(model / "vae")
    edit(model / "vae" / "config.json", _class_name=f"{trap.name}.Harmful")


def _class_of_scheduler(model: Path, trap: Trap) -> None:
    trap.lay(model / "scheduler")
    edit(model / "scheduler" / "scheduler_config.json", _class_name=f"{trap.name}.Harmful")


def _adapter(model: Path, trap: Trap) -> None:
    """Next to a text encoder, transformers would look for an adapter and load its pickle."""
    for part in ("text_encoder", "text_encoder_2"):
        adapter = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(model / part),
            "target_modules": ["q_proj"],
        }
        (model / part / "adapter_config.json").write_text(
            json.dumps(
                {**adapter, "auto_mapping": {"base_model_class": "Harmful", "parent_library": trap.name}}
            )
        )
        _pickle(model / part / "adapter_model.bin", trap)


def _kernels(model: Path, trap: Trap) -> None:
    """What transformers would take from a hub or from other files."""
    for part in ("text_encoder", "text_encoder_2"):
        _pickle(model / part / "adapter_model.bin", trap)
        edit(model / part / "config.json", transformers_weights="adapter_model.bin",
             _attn_implementation=f"{trap.name}/attention", attn_implementation=f"{trap.name}/attention",
             fusion_config={"harmful": True})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "works"),
    [
        (_custom_component, True),
        (_auto_map, True),
        (_class_of_vae, False),
        (_class_of_scheduler, False),
        (_adapter, True),
        (_kernels, True),
    ],
)
def test_models_run_no_code_of_their_own(
    model: Path, trap: Trap, attack: Callable[[Path, Trap], None], works: bool
) -> None:
    """Custom components, `auto_map`, `trust_remote_code`, adapters and kernels: left alone, or refused."""
    attack(model, trap)
    said = used_or_refused(lambda: use(model))
    assert not trap.sprung
    assert (said == "") == works, said


def test_a_model_s_weights_are_those_that_were_checked(model: Path) -> None:
    """Configs and stray files next to the weights do not lead to other ones."""
    before = open_sdxl(model).load_text_encoder(1).state_dict()
    weights = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    for name in ("other.safetensors", "shard-00001-model-00001-of-00001.safetensors"):
        save_file(weights, model / "text_encoder" / name)
    edit(model / "text_encoder" / "config.json", transformers_weights="other.safetensors")
    after = open_sdxl(model).load_text_encoder(1).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    (path,) = (model / "unet").glob("*.safetensors")
    path.with_name(f"{path.name}.index.json").write_text(
        json.dumps({"weight_map": {"a": "other.safetensors"}})
    )
    assert "has both" in used_or_refused(lambda: open_sdxl(model))


def test_quantised_weights_choose_no_loader(model: Path) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        path = model / part / "config.json"
        before = path.read_text()
        edit(path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
        assert f"{path} has a quantization_config" in used_or_refused(lambda: open_sdxl(model))
        path.write_text(before)


def _pickle(path: Path, trap: Trap) -> None:
    """Weights as torch saves them: a pickle in an archive."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(trap))
        archive.writestr("archive/version", "3\n")


def _bin_only(model: Path, trap: Trap) -> None:
    (path,) = (model / "unet").glob("*.safetensors")
    _pickle(path.with_suffix(".bin"), trap)
    path.unlink()


def _bin_in_index(model: Path, trap: Trap) -> None:
    (path,) = (model / "unet").glob("*.safetensors")
    _pickle(model / "unet" / "part.bin", trap)
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": {"a": "part.bin"}}))
    path.unlink()


def _under_another_name(model: Path, trap: Trap) -> None:
    (path,) = (model / "unet").glob("*.safetensors")
    _pickle(path, trap)


def _beside(model: Path, trap: Trap) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for name in (
            "pytorch_model.bin",
            "diffusion_pytorch_model.bin",
            "model.ckpt",
            "weights.pt",
            ".metadata",
        ):
            _pickle(model / part / name, trap)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "says"),
    [
        (_bin_only, "only pickled .bin weights"),
        (_bin_in_index, "names of .safetensors files"),
        (_under_another_name, "cannot be read as safetensors"),
        (_beside, ""),
    ],
)
def test_pickled_weights_are_refused(
    model: Path, trap: Trap, attack: Callable[[Path, Trap], None], says: str
) -> None:
    attack(model, trap)
    said = used_or_refused(lambda: use(model))
    assert not trap.sprung
    assert says in said
    assert bool(says) == bool(said)


def test_a_pickled_checkpoint_is_no_model(tmp_path: Path, trap: Trap) -> None:
    for name in ("model.ckpt", "model.pt", "model.bin"):
        _pickle(tmp_path / name, trap)
        assert str(tmp_path / name) in used_or_refused(lambda name=name: use(tmp_path / name))  # type: ignore[misc]
    assert not trap.sprung


def _header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(64)


HEADERS = {
    "longer than the file": _header(b"{}", 2**62),
    "nested": _header(b"[" * 100_000),
    "outside the file": _header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1099511627776]}}'),
    "backwards": _header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}'),
    "negative": _header(b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[-16,0]}}'),
    "huge shape": _header(
        b'{"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,16]}}'
    ),
    "another type": _header(b'{"a":{"dtype":"harmful_code.Harmful","shape":[4],"data_offsets":[0,16]}}'),
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_of_safetensors_are_checked(model: Path, kind: str) -> None:
    (path,) = (model / "unet").glob("*.safetensors")
    path.write_bytes(HEADERS[kind])
    said = used_or_refused(lambda: use(model))
    assert str(path) in said
    assert said.isprintable()


def test_metadata_of_weights_are_text(model: Path, trap: Trap) -> None:
    """What trainers and ComfyUI write into `__metadata__`."""
    from safetensors.torch import load_file

    (path,) = (model / "unet").glob("*.safetensors")
    workflow = json.dumps({"1": {"class_type": "Exec", "inputs": {"code": f"import {trap.name}"}}})
    save_file(
        load_file(path), path, {"prompt": workflow, "modelspec.architecture": trap.name, "format": "pt"}
    )
    use(model)
    assert not trap.sprung


# --- Pictures ---


def test_metadata_of_pictures_are_not_read(trap: Trap, tmp_path: Path) -> None:
    """What A1111 (`parameters`) and ComfyUI (`prompt`, `workflow`) write into PNG files changes nothing."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    info = PngImagePlugin.PngInfo()
    workflow = json.dumps({"nodes": [{"type": trap.name, "code": f"__import__('{trap.name}').register()"}]})
    info.add_text("parameters", f"a prompt\nSteps: 20, Script: {trap.name}.py, <lora:{trap.name}:1>")
    info.add_text("prompt", workflow, zip=True)
    info.add_itxt("workflow", workflow)
    plain, written = io.BytesIO(), io.BytesIO()
    picture.save(plain, "PNG")
    exif = Image.Exif()
    exif[0x010E] = f"import {trap.name}"
    picture.save(written, "PNG", pnginfo=info, exif=exif)
    assert trap.name.encode() in written.getvalue()
    found, other = decode(written.getvalue()), decode(plain.getvalue())
    assert np.array_equal(np.asarray(found.image), np.asarray(other.image))
    assert not trap.sprung


def test_prompts_in_pictures_are_text(trap: Trap, tmp_path: Path) -> None:
    """`data.pair_by = "prompt"` reads what A1111 and ComfyUI write into files; nodes' names call nothing."""
    code = f"__import__('{trap.name}').register()"
    nodes = {
        "1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0], "latent_image": ["3", 0]}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": code}},
        "3": {"class_type": trap.name, "inputs": {"code": code}},
    }
    deep = "[" * 200_000
    for side in ("chosen", "rejected"):
        (tmp_path / side).mkdir()
        for name, text in {"good": json.dumps(nodes), "deep": deep, "long": "x" * 2**23}.items():
            info = PngImagePlugin.PngInfo()
            info.add_text("prompt", text, zip=True)
            Image.new("RGB", (8, 8)).save(tmp_path / side / f"{name}.png", pnginfo=info)
    pairs = open_source(tmp_path, pair_by="prompt")
    found = [getattr(row, "prompt", "") or row.detail for row in pairs.read(range(len(pairs)))]
    said = [
        "its text «prompt» is not ComfyUI's: it is nested too deeply",
        "it holds no prompt of A1111 or ComfyUI",
    ]
    assert found == [code, *said, *said]
    assert not trap.sprung


# --- Data sets ---


class _Parametrised(pa.ExtensionType):
    """What older versions of pyarrow unpickled from a file's schema."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        super().__init__(pa.binary(), "arrow.py_extension_type")

    def __arrow_ext_serialize__(self) -> bytes:
        return self.payload

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> _Parametrised:
        return cls(serialized)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_unpickle_nothing(tmp_path: Path, trap: Trap, tiny_sdxl: Path, kind: str) -> None:
    source = tmp_path / "data"
    source.mkdir()
    rows = pickapic_rows(4)
    table = pa.Table.from_pylist(rows)
    payload = pickle.dumps(trap)
    column = pa.ExtensionArray.from_storage(_Parametrised(payload), pa.array([payload] * 4))
    table = table.append_column("harmful", column)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"builder_name": trap.name}})})
    file = source / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert payload in file.read_bytes() or kind == "parquet"
    pairs = open_source(source)
    assert len(list(pairs.rows(range(4)))) == 4
    assert not trap.sprung


def test_scripts_beside_data_are_not_run(tmp_path: Path, trap: Trap) -> None:
    """A data set's loading script, and builders and features that its state names."""
    from datasets import Dataset

    source = tmp_path / "data"
    Dataset.from_list(pickapic_rows(4)).save_to_disk(source)
    for name in ("data", "dataset", "__init__", "setup", "conftest", "sitecustomize", trap.name):
        trap.lay(source, name)
    info = source / "dataset_info.json"
    edit(info, builder_name=trap.name, dataset_name=trap.name, config_name=f"{trap.name}:register")
    assert len(list(open_source(source).rows(range(4)))) == 4
    edit(info, features={"jpg_0": {"_type": f"{trap.name}.Harmful"}})
    assert str(source) in used_or_refused(lambda: open_source(source))
    assert not trap.sprung


def test_lines_of_a_data_set_are_prompts_and_paths(tmp_path: Path, trap: Trap, tiny_sdxl: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    trap.lay(source)
    for name in "wl":
        (source / f"{name}.png").write_bytes(png(ord(name)))
    (tmp_path / "outside.png").write_bytes(png(3))
    rows = [
        {"prompt": f"{{{{__import__('{trap.name}')}}}}", "chosen": "w.png", "rejected": "l.png"},
        {"prompt": "!!python/object/apply:os.system", "chosen": f"{trap.name}.py", "rejected": "l.png"},
        {"prompt": "outside", "chosen": "../outside.png", "rejected": str(tmp_path / "outside.png")},
        {"prompt": "x", "chosen": "w.png", "rejected": "l.png", "py/object": f"{trap.name}.Harmful"},
    ]
    (source / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = pairs_config(tiny_sdxl, source, tmp_path / "cache", max_skipped=0.9, held_out=0.0)
    assert prepare(run).pairs == 2
    assert not trap.sprung
    assert "outside the folder" in (tmp_path / "cache" / "skipped.jsonl").read_text()


# --- Caches and run folders ---


def test_a_cache_unpickles_nothing(tmp_path: Path, trap: Trap, cache: Path) -> None:
    copy = tmp_path / "cache"
    for file in cache.rglob("*"):
        if file.is_file():
            (copy / file.relative_to(cache)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(cache)).write_bytes(file.read_bytes())
    with (copy / "pairs.npy").open("wb") as file:
        np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    edit(copy / "index.json", reader=f"{trap.name}:register")
    said = used_or_refused(lambda: PairCache.open(copy))
    assert not trap.sprung
    assert str(copy) in said


@pytest.mark.slow
def test_a_run_folder_names_no_code(tmp_path: Path, trap: Trap, tiny_sdxl: Path, cache: Path) -> None:
    """Records, logs and checkpoints of a run that someone else has made."""
    from mapo_fast.util.records import write_record

    run = tmp_path / "run"
    assert fit(make_config(tiny_sdxl, cache, run, train={"steps": 2})).finished
    trap.lay(run)
    record = json.loads((run / "run.json").read_text())
    record.pop("sha256")
    record["config"]["objective"]["name"] = f"{trap.name}:register"
    record["allow_code"] = [f"{trap.name}:register"]
    write_record(run / "run.json", record)
    read_run(run)
    edit(run / "settings.json", allow_code=[f"{trap.name}:register"])
    assert keep_settings(make_config(tiny_sdxl, cache, run), record["run"], step=2, processes=1)
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": f"{trap.name}.register", "step": 2, "py/object": trap.name}) + "\n")
    assert read_log(run / "log.jsonl")
    more = make_config(tiny_sdxl, cache, run, train={"steps": 4})
    assert f"objective.name was '{trap.name}:register'" in used_or_refused(lambda: fit(more, resume=True))
    (newest,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    for name in ("model.safetensors", "optimizer.safetensors", "optimizer.bin", "state.pkl"):
        _pickle(newest / name, trap)
    checkpoints = CheckpointStore(run / "checkpoints", 2, record["run"])
    assert f"{newest.name}: model.safetensors does not match its checksum" in used_or_refused(
        checkpoints.newest
    )
    assert not trap.sprung


def test_traces_unpickle_nothing(tmp_path: Path, trap: Trap) -> None:
    path = tmp_path / "trace.npz"
    np.savez(path, rest=np.array([trap], dtype=object), kinds=np.array([trap], dtype=object))
    assert store._read(path) is None
    assert not trap.sprung


# --- The current folder, and what is trusted ---


@pytest.mark.slow
def test_the_current_folder_is_not_imported_from(tmp_path: Path, trap: Trap) -> None:
    """Modules and packages that lie there, and metadata that make it look like an installed package."""
    here = Path.cwd()
    for name in ("torch", "pydantic", "sitecustomize", "usercustomize", "mapo_fast_extension", "rich"):
        trap.lay(here, name)
    meta = here / "harmful-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: harmful\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(f"[{extensions.GROUP}]\nx = {trap.name}:register\n")
    (here / "config.toml").write_text('[objective]\nname = "harmful"\n')
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    program = "from mapo_fast.util import extensions; assert not extensions.load_installed()"
    for command in (["-m", "mapo_fast", "train", "config.toml"], ["-c", program]):
        done = subprocess.run(
            [sys.executable, *command], cwd=here, env=environment, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr
        assert not trap.sprung, command
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has loaded no extensions."""
    monkeypatch.setattr(extensions, "_problems", None)
    monkeypatch.setattr(extensions, "_allowed", set())


@pytest.mark.usefixtures("fresh")
def test_allowed_code_is_not_looked_for_in_the_current_folder(
    tmp_path: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither there nor in the config's folder, whatever the path says; links and subfolders included."""
    project = tmp_path / "project"
    config = project / "config.toml"
    (trap.lay(project / "inside").parent / "__init__.py").write_text("")
    trap.lay(project)
    config.write_text("[optim]\nname = 'x'\n")
    code = ["--allow-code", f"{trap.name}:register"]

    def run(*code: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mapo-fast", "train", str(config), *code])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert f"no module {trap.name} is installed" in run(*code)
    for path in (Path.cwd(), project):
        monkeypatch.syspath_prepend(str(path))
    assert f"no module {trap.name} is installed" in run(*code)
    monkeypatch.syspath_prepend(str(project / "inside"))
    assert f"{project / 'inside' / trap.name}.py lies in {project}" in run(*code)
    (tmp_path / "link").symlink_to(project / "inside")
    monkeypatch.syspath_prepend(str(tmp_path / "link"))
    assert f"lies in {project}" in run(*code)
    trap.lay(tmp_path / "links")
    monkeypatch.syspath_prepend(str(tmp_path / "links"))
    (tmp_path / "links" / "config.toml").symlink_to(config)
    config = tmp_path / "links" / "config.toml"
    assert f"lies in {project}" in run(*code)  # and a module next to the link is not found
    for wrong in ("harmful_code", "harmful_code.py", "../x:y", ":register", "a:b.c", "x: register"):
        assert "write it as module:function" in run("--allow-code", wrong)
    assert not trap.sprung


def install(folder: Path, name: str, source: str, entry_point: str = "") -> Path:
    """What pip would have put into `site-packages`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(source)
    meta = folder / f"{name}-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if entry_point:
        (meta / "entry_points.txt").write_text(f"[{extensions.GROUP}]\n{name} = {entry_point}\n")
    return folder / f"{name}.py"


@pytest.mark.usefixtures("fresh")
def test_allowed_code_is_named_and_called_once(
    tmp_path: Path, trap: Trap, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trap.lay(tmp_path / "installed")
    monkeypatch.syspath_prepend(str(file.parent))
    order: list[str] = []
    extensions.allow(f"{trap.name}:register", lambda line: order.append(f"{line} {trap.sprung}"))
    assert order == [f"--allow-code {trap.name}:register: importing {file} False"], "named before it runs"
    assert trap.mark.read_text() == "called"
    trap.mark.unlink()
    extensions.allow(f"{trap.name}:register", order.append)
    assert (len(order), trap.mark.exists()) == (1, False)
    for name, said in (("absent", "has no attribute"), ("__name__", "not callable")):
        with pytest.raises(UserError, match=f"--allow-code .*:{name} failed: .*{said}"):
            extensions.allow(f"{trap.name}:{name}", order.append)
    file.write_text("import nothing_that_is_there\n")
    trap.reset()
    importlib.invalidate_caches()
    with pytest.raises(
        UserError, match="failed: ModuleNotFoundError: No module named 'nothing_that_is_there'"
    ):
        extensions.allow(f"{trap.name}:other", order.append)


@pytest.mark.usefixtures("fresh")
def test_installed_packages_are_called_on_demand_and_may_be_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    mark = tmp_path / "called"
    good = f"def register():\n    with open({str(mark)!r}, 'a') as f: f.write('x')\n"
    install(site, "good_extension", good, "good_extension:register")
    install(
        site, "broken_extension", "raise RuntimeError('broken\\nin two lines')\n", "broken_extension:register"
    )
    install(site, "leaving_extension", "raise SystemExit(3)\n", "leaving_extension:register")
    install(site, "no_extension", "raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(site))
    problems = extensions.load_installed()
    assert sorted(problems) == [
        "broken_extension of broken_extension (broken_extension:register) failed: RuntimeError: broken",
        "leaving_extension of leaving_extension (leaving_extension:register) failed: SystemExit: 3",
    ]
    assert extensions.load_installed() == problems
    assert mark.read_text() == "x", "called once"
    assert "no_extension" not in sys.modules


@pytest.mark.usefixtures("fresh")
def test_a_layout_of_an_installed_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no built-in one recognises a path; what is broken stands in the message."""
    source = (
        "from mapo_fast.data.sources import PreferencePairs, register_source\n"
        "class Notes(PreferencePairs):\n"
        "    looked_for = 'notes.txt'\n"
        "    recognises = classmethod(lambda cls, path: (path / 'notes.txt').exists())\n"
        "    open = classmethod(lambda cls, path: cls())\n"
        "    __len__ = lambda self: 0\n"
        "    read = lambda self, rows: iter(())\n"
        "    files = lambda self: ()\n"
        "def register():\n    register_source(Notes)\n"
    )
    monkeypatch.setattr("mapo_fast.data.sources.registry._registered", [])
    install(tmp_path / "site", "notes_extension", source, "notes_extension:register")
    install(
        tmp_path / "site", "broken_extension", "raise RuntimeError('broken')\n", "broken_extension:register"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stray.bin").touch()
    with pytest.raises(UserError, match=r"looked for notes\.txt, .*; broken_extension of .*: broken$"):
        open_source(tmp_path / "data")
    (tmp_path / "data" / "notes.txt").touch()
    assert type(open_source(tmp_path / "data")).__name__ == "Notes"


@pytest.mark.usefixtures("fresh")
def test_an_objective_of_an_installed_package_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a config names one that is not built in, with its settings; its terms are not imported yet."""
    source = (
        "from mapo_kernels.objectives import Objective, Setting, register_objective\n"
        "def register():\n"
        "    settings = {'slope': Setting(1.0)}\n"
        "    register_objective('sloped', Objective(terms='absent_terms:TERMS', settings=settings))\n"
    )
    install(tmp_path / "site", "sloped_extension", source, "sloped_extension:register")
    install(
        tmp_path / "site", "broken_extension", "raise RuntimeError('broken')\n", "broken_extension:register"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with patch.dict(OBJECTIVES):
        with pytest.raises(UserError, match=r"objective\.name.* or 'sloped', .*broken_extension .*: broken"):
            make_config(tmp_path, tmp_path, tmp_path, objective={"name": "sloping"})
        config = make_config(tmp_path, tmp_path, tmp_path, objective={"name": "sloped", "slope": 0.5})
        assert config.objective.settings == {"slope": 0.5}
