"""The layout keeps its promises: light import, `kernels/` shadows nothing, dependencies point one way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from mapo_fast.planner import store
from mapo_fast.settings.optimizers import OPTIMIZERS
from mapo_kernels.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent


def _python(code: str, *, path: str = "") -> str:
    """Run code from the repository root with the root first on the path, as `python -m …` has it."""
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; sys.path += {path.split() if path else []!r}\n{code}"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "triton", "diffusers", "transformers", "pydantic", "typer", "mapo_kernels")
    loaded = _python(f"import mapo_fast\nprint([m for m in {heavy!r} if m in sys.modules])")
    assert loaded == "[]"


@pytest.mark.slow
def test_importing_the_kernels_is_light() -> None:
    heavy = ("torch", "numpy", "triton")
    code = "import mapo_kernels\nfrom mapo_kernels import ops\n"
    assert _python(f"{code}print([m for m in {heavy!r} if m in sys.modules])") == "[]"


@pytest.mark.slow
def test_a_public_name_of_the_kernels_is_never_a_module() -> None:
    """Whatever has been imported before."""
    code = (
        "import mapo_kernels, pkgutil, types\n"
        "names = {module.name for module in pkgutil.walk_packages(mapo_kernels.__path__, 'mapo_kernels.')}\n"
        "[__import__(name) for name in sorted(names)]\n"
        "public = {name: getattr(mapo_kernels, name) for name in mapo_kernels.__all__}\n"
        "assert len(public) > 10 and {*public} <= {*dir(mapo_kernels)}\n"
        "print([name for name, value in public.items() if isinstance(value, types.ModuleType)])"
    )
    assert _python(code) == "[]"


PLAIN = (
    "mapo_fast.hardware.cards",
    "mapo_fast.settings.optimizers",
    "mapo_kernels.objectives",
    "mapo_kernels.capability",
)
"""Cards, optimizers and objectives: names, settings and needs."""


@pytest.mark.slow
@pytest.mark.parametrize("module", PLAIN)
def test_names_and_needs_are_of_the_standard_library_alone(module: str) -> None:
    code = f"before = {{*sys.modules}}\nimport {module}\n"
    code += "new = {name.partition('.')[0] for name in {*sys.modules} - before}\n"
    code += "print(sorted(new - {*sys.stdlib_module_names, 'mapo_fast', 'mapo_kernels'}))"
    assert _python(code) == "[]"


@pytest.mark.slow
def test_the_loss_needs_torch_only() -> None:
    heavy = ("diffusers", "transformers", "pydantic", "typer", "peft", "PIL")
    found = _python(
        f"from mapo_fast import MaPOLoss\nMaPOLoss()\nprint([m for m in {heavy!r} if m in sys.modules])"
    )
    assert found == "[]"


@pytest.mark.slow
def test_public_names_are_listed() -> None:
    listed = _python("import mapo_fast\nprint({*mapo_fast.__all__} <= {*dir(mapo_fast)})")
    assert listed == "True"


@pytest.mark.slow
def test_the_module_run_from_a_folder_imports_nothing_from_it(tmp_path: Path) -> None:
    for name in ("torch", "pydantic", "typer", "rich", "json", "pathlib"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "mapo_fast", "prepare", "nothing.toml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "mapo-fast: config file not found: nothing.toml\n")


@pytest.mark.slow
def test_the_planner_s_process_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("multiprocessing", "pickle", "struct", "selectors", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with store._safe_path():
        child = subprocess.run([sys.executable, "-c", "import multiprocessing.spawn"], capture_output=True)
    assert child.returncode == 0
    assert (Path.cwd(), "PYTHONSAFEPATH" in os.environ) == (tmp_path, False)


@pytest.mark.slow
def test_kernels_is_only_a_namespace_from_the_root() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = "import importlib.util\nprint(importlib.util.find_spec('kernels').loader is None or 'installed')"
    assert _python(spec) in ("True", "installed")


def test_libraries_import_from_the_root() -> None:
    """Some of them look for an installed package named `kernels`; these tests have the root first."""
    import bitsandbytes
    import transformers.modeling_utils
    from diffusers.models import modeling_utils

    for library in (bitsandbytes, transformers.modeling_utils, modeling_utils):
        around = [entry for entry in sys.path if entry and Path(str(library.__file__)).is_relative_to(entry)]
        assert sys.path.index(str(ROOT)) < sys.path.index(max(around, key=len))


@pytest.mark.slow
def test_an_installed_kernels_package_wins_over_our_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the installed one'\n")
    assert _python("import kernels\nprint(kernels.name)", path=str(tmp_path)) == "the installed one"


def _imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.slow
def test_dependencies_point_one_way() -> None:
    for file in (ROOT / "kernels").rglob("*.py"):
        outside = _imports(file) - set(sys.stdlib_module_names) - {"mapo_kernels", "torch", "triton"}
        assert not outside, f"{file} imports {outside}"
    for file in (ROOT / "mapo_fast").rglob("*.py"):
        assert not _imports(file) & {"bench", "tests"}, file
    for file in (ROOT / "bench").rglob("*.py"):
        assert "tests" not in _imports(file), file


def test_kernels_take_nothing_private_from_each_other() -> None:
    """Modules with an underscore are theirs; names with one are a module's own."""
    package = ROOT / "kernels" / "mapo_kernels"
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mapo_kernels"):
                where = (ROOT / "kernels").joinpath(*str(node.module).split("."))
                taken = [alias.name for alias in node.names if alias.name.startswith("_")]
                private = [name for name in taken if not (where / f"{name}.py").is_file()]
                assert not private, f"{file.relative_to(ROOT)} imports {private} from {node.module}"


def _ours(name: str) -> bool:
    return name.partition(".")[0] in ("mapo_fast", "mapo_kernels")


def _taken(tree: ast.AST) -> set[str]:
    """Dotted names of what a file takes from our packages: imported, read from a module, or patched in it."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        modules |= {name: full for name, full in named.items() if _ours(full)}
    found = {*modules.values()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            module, name = ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            module, name = ast.unparse(node.args[0]), str(node.args[1].value)
        else:
            continue
        if module in modules:
            found.add(f"{modules[module]}.{name}")
    return found


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


@pytest.mark.slow
def test_nothing_private_is_taken_from_another_file() -> None:
    """From the kernels by nothing but their own tests; and `mapo_fast` and bench keep to public names."""
    for folder in ("mapo_fast", "bench", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            if file.is_relative_to(ROOT / "tests" / "kernels"):
                continue
            for name in _taken(ast.parse(file.read_text(encoding="utf-8"))):
                theirs = folder == "tests" and not name.startswith("mapo_kernels.")
                assert theirs or not _is_private(name), f"{file.relative_to(ROOT)} takes {name}"


@pytest.mark.parametrize(
    "code",
    [
        "from mapo_kernels._launch import block_size",
        "from mapo_kernels.ops import _linear",
        "import mapo_kernels._launch as launch",
        "from mapo_kernels.ops import adamw8bit\nadamw8bit._plans",
        "import mapo_kernels.ops.geglu\nmapo_kernels.ops.geglu._rows",
        "from mapo_fast.planner import store\nmock.patch.object(store, '_read', None)",
    ],
)
def test_what_is_private_is_noticed(code: str) -> None:
    assert [name for name in _taken(ast.parse(code)) if _is_private(name)]


def _compared(tree: ast.AST) -> set[object]:
    """The constants that a file compares something with."""
    compared = [side for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in node.comparators]
    return {part.value for side in compared for part in ast.walk(side) if isinstance(part, ast.Constant)}


def test_nothing_asks_for_the_name_of_an_objective_or_an_optimizer() -> None:
    """Their entries say what they need and can; the demo alone knows that `sft` is its control."""
    names = {*OBJECTIVES, *OPTIMIZERS}
    for folder in (ROOT / "mapo_fast", ROOT / "kernels"):
        for file in folder.rglob("*.py"):
            if file.parent.name != "demo":
                found = _compared(ast.parse(file.read_text(encoding="utf-8"))) & names
                assert not found, f"{file.relative_to(ROOT)} compares with {found}"
    assert _compared(ast.parse("config.objective.name in ('kto', 'npo')")) & names == {"kto", "npo"}


ROOMS = (
    "util",
    "hardware",
    "settings",
    "models",
    "data",
    "engine",
    "planner",
    "run",
    "score",
    "demo",
    "studio",
    "cli",
)
"""Rooms of `mapo_fast`; each imports only from itself and from those before it."""


@pytest.mark.slow
def test_no_room_imports_from_one_above_it() -> None:
    package = ROOT / "mapo_fast"
    assert {p.parent.name for p in package.glob("*/__init__.py")} == {*ROOMS}
    for room in ROOMS:
        allowed = {*ROOMS[: ROOMS.index(room) + 1], "loss", "__version__"} | (
            {"doctor"} if room == "cli" else set()
        )
        for file in (package / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert not node.level, f"{file.relative_to(ROOT)} imports relative to itself"
                    found = [f"{node.module}.{alias.name}" for alias in node.names]
                else:
                    continue
                names = {name.split(".")[1] for name in found if name.startswith("mapo_fast.")}
                assert names <= allowed, f"{file.relative_to(ROOT)} imports from {sorted(names)}"


@pytest.mark.slow
def test_no_two_files_import_each_other() -> None:
    """At the top or in a function; a package's own file, which shows names of its parts, is left out."""
    graph: dict[str, set[str]] = {}
    for file in (ROOT / "mapo_fast").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if file.name == "__init__.py":
            continue
        found = graph.setdefault(name, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mapo_fast"):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    is_file = (ROOT / (inner.replace(".", "/") + ".py")).is_file()
                    found.add(inner if is_file else str(node.module))
    assert list(TopologicalSorter(graph).static_order())  # CycleError names them


@pytest.mark.slow
def test_the_checks_of_data_need_no_numbers(tmp_path: Path) -> None:
    """Layouts are recognised and opened, a cache is claimed and checked, and nothing slow is imported."""
    for file in ("parquet/a.parquet", "arrow/state.json", "twins/chosen/a.png", "twins/rejected/a.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"not read")
    (tmp_path / "twins" / "chosen" / "a.txt").write_text("p")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    loaded = _python(
        "from pathlib import Path\n"
        "from mapo_fast.data.sources import find_source, open_source\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "assert find_source(folder / 'parquet').looked_for == '*.parquet'\n"
        "assert 'Hugging Face' in find_source(folder / 'arrow').looked_for\n"
        "for path, kind in ((folder, 'SkippedRow'), (folder / 'twins', 'PairRecord')):\n"
        "    source = open_source(path)\n"
        "    assert len(source.identity()) == 64\n"
        "    assert [type(row).__name__ for row in source.rows([0])] == [kind]\n"
        "from mapo_fast.data.index import FORMAT, CacheIndex, claim, difference, is_whole, write_index\n"
        "settings = {'format': FORMAT, 'flip': True}\n"
        "assert claim(folder / 'cache', settings, None).settings == settings\n"
        "from mapo_fast.util.files import sha256_file\n"
        "table = folder / 'pairs.jsonl'\n"
        "files = {table.name: {'bytes': table.stat().st_size, 'sha256': sha256_file(table)}}\n"
        "counts = {'pairs': 3, 'train': 2, 'held_out': 0.1, 'paired': False}\n"
        "known = {'settings': settings, 'files': files, **counts}\n"
        "write_index(folder, known)\n"
        "index = CacheIndex.open(folder)\n"
        "index.verify_all()\n"
        "assert is_whole(folder, index.content)\n"
        "assert (index.flips, index.paired, index.train) == (True, False, 2)\n"
        "assert len(index.fingerprint) == 64\n"
        "assert 'data.resolution' in difference(settings, settings | {'resolution': 64})\n"
        f"print([m for m in {NUMBERS!r} if m in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.slow
def test_settings_and_a_runs_folder_need_no_numbers(tmp_path: Path) -> None:
    """Settings are read and checked, an output folder is claimed, and nothing slow is imported."""
    (tmp_path / "config.toml").write_text(
        "model.path = 'sdxl'\ndata.cache = 'cache'\ntrain.output = 'run'\noptim.name = 'adamw8bit'\n"
    )
    loaded = _python(
        "import importlib, pkgutil\n"
        "from pathlib import Path\n"
        "import mapo_fast.settings\n"
        "for module in pkgutil.iter_modules(mapo_fast.settings.__path__, 'mapo_fast.settings.'):\n"
        "    importlib.import_module(module.name)\n"
        "from mapo_fast.run import folder\n"
        "from mapo_fast.run.starts import keep_settings\n"
        "from mapo_fast.settings.load import load_config\n"
        "from mapo_fast.settings.view import as_text, known\n"
        f"config = load_config(Path({str(tmp_path / 'config.toml')!r}), ['objective.name=npo'])\n"
        "assert mapo_fast.settings.page.help_text() and list(as_text(known(config)))\n"
        "made_from = {'cache': 'a', 'start model': 'b', 'noise schedule': 'c'}\n"
        "folder.check_output(config, made_from, resume=False)\n"
        "config.train.output.mkdir()\n"
        "run = folder.claim_output(config, made_from)\n"
        "assert keep_settings(config, run, step=0, processes=1) == []\n"
        "folder.remove_leftovers(config.train.output)\n"
        "folder.check_results(config.train.output)\n"
        "folder.check_output(config, made_from, resume=True)\n"
        "assert folder.recorded_settings(config.train.output)\n"
        f"print([m for m in {NUMBERS!r} if m in sys.modules])"
    )
    assert loaded == "[]"


NUMBERS = ("torch", "numpy", "triton", "pyarrow", "datasets", "diffusers", "transformers", "PIL")


def test_the_training_script_stays_readable() -> None:
    for name in ("train.py", "trainer.py"):
        assert (ROOT / "mapo_fast" / "run" / name).read_text(encoding="utf-8").count("\n") <= 300


def test_nothing_is_unpickled() -> None:
    for folder in ("mapo_fast", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert text.count("torch.load(") == text.count("weights_only=True"), file
            assert "import pickle" not in text, file
