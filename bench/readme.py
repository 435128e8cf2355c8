"""Tables of the README and the docs, from results files and registry: `python -m bench.readme` writes them.

Between `<!-- results: NAME -->` and `<!-- end -->` nothing is typed by hand; a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import objective_tables, op_tables, step_tables
from mapo_fast.hardware.cards import vram_for
from mapo_fast.hardware.host import host
from mapo_fast.planner import shipped
from mapo_fast.planner.answer import RAM, card_and_memory
from mapo_fast.planner.plan import seconds_text
from mapo_fast.planner.question import question
from mapo_fast.util.sizes import GIB, parse_size

RESULTS = Path(__file__).parent / "results"


def _rows(name: str, *, may_miss: bool = False) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    if may_miss and not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def demo() -> str:
    """The newest row of each seed."""
    newest = {row["seed"]: row for row in _rows("demo")}
    lines = [
        "| seed | preferred share: before | SFT | **MaPO** "
        "| must not change: before | SFT | **MaPO** | chosen error, held out: change | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seed, row in sorted(newest.items()):
        share, same = row["preferred_share"], row["unchanged_score"]
        lines.append(
            f"| {seed} | {share['before']:.2f} | {share['sft']:.2f} | **{share['mapo']:.2f}** "
            f"| {same['before']:.2f} | {same['sft']:.2f} | **{same['mapo']:.2f}** "
            f"| {_interval(row['held_out']['mapo']['chosen_error_change'])} | {row['seconds']:.0f} |"
        )
    machine = next(iter(newest.values()))["environment"]
    lines += ["", f"(CPU: {machine['cpu']}, torch threads: {machine['threads']}.)"]
    return "\n".join(lines)


def _interval(change: dict[str, float]) -> str:
    return f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]"


def best() -> str:
    """What `train.best` keeps of runs that train too far, beside the last step: the newest row of each."""
    newest = {(row["pairs"], row["seed"]): row for row in _rows("best")}
    lines = [
        "| pairs | seed | preferred share: start | best step | last step "
        "| must not change: start | best step | last step | best step is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (pairs, seed), row in sorted(newest.items(), key=str):
        models = row["models"]
        cells = [
            f"{models[name][figure]['value']:.2f}" if name in models else "–"
            for figure in ("preferred_share", "unchanged_score")
            for name in ("start", "best", "last")
        ]
        step = models["best"]["step"] if "best" in models else "none: too few prompts"
        lines.append(f"| {pairs} | {seed} | {' | '.join(cells)} | {step} |")
    return "\n".join(lines)


def safeguard() -> str:
    """SDPO's scaled rejected gradient, with and without: the newest row of each."""
    newest = {(row["objective"], row["seed"], row["scaled"]): row for row in _rows("sdpo")}
    lines = [
        "| objective | seed | scaled | pairs with a scale below 1 | preferred share | must not change "
        "| chosen error, held out: change |",
        "|---|---|---|---|---|---|---|",
    ]
    for (objective, seed, scaled), row in newest.items():
        ends = [f"{row['end'][name]['value']:.2f}" for name in ("preferred_share", "unchanged_score")]
        lines.append(
            f"| `{objective}` | {seed} | {'yes' if scaled else 'no'} | {row['below_1']:.1%} "
            f"| {' | '.join(ends)} | {_interval(row['chosen_error_change'])} |"
        )
    return "\n".join(lines)


def objectives() -> str:
    """The demo's figures with every objective, from the newest row of each."""
    newest = {row["objective"]: row for row in _rows("demo_objectives", may_miss=True)}
    lines = [
        "| objective | preferred share: before | after | must not change: before | after |",
        "|---|---|---|---|---|",
    ]
    if newest:
        newest = {"sft": next(iter(newest.values()))} | newest
    for name, row in newest.items():
        cells = [
            f"{row[figure][model]:.2f}"
            for figure in ("preferred_share", "unchanged_score")
            for model in ("before", name)
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory() -> str:
    """The memory table: predictions, and measurements of each GPU with rows, newest first."""
    measured = _rows("gpu_memory", may_miss=True)[::-1]
    gpus = list(dict.fromkeys(row["environment"]["gpu"] for row in measured))
    titles = [f"{what} measured on {gpu}" for gpu in gpus for what in ("peak, GiB,", "step")]
    titles = titles or ["measured on a GPU"]
    lines = [
        "| one pair at 1024², bf16 weights, AdamW8bit | peak, GiB, predicted | target | reserved by torch "
        "(by default) | step, predicted | " + " | ".join(titles) + " |",
        "|---" * (5 + len(titles)) + "|",
    ]
    for row in _rows("memory_table"):
        cells = []
        for gpu in gpus:
            found = [r for r in measured if r["environment"]["gpu"] == gpu and r["name"] == row["name"]]
            cells += _measured_cells(found[0]) if found else ["not measured yet"] * 2
        lines.append(
            f"| {row['name']} | {row['peak_gib']:.2f} | {row['target_gib']:.1f} "
            f"| {row['reserved_gib']:.2f} ({row['reserved_by_default_gib']:.2f}) "
            f"| {row['ms_estimate'] / 1000:.1f} s for {row['card']} | "
            + " | ".join(cells or ["not measured yet"])
            + " |"
        )
    for gpu in gpus:
        mine = [r for r in measured if r["environment"]["gpu"] == gpu and r["kind"] == "ranking"]
        newest = {r["name"]: r.get("ranked", "not measured") for r in mine[::-1]}
        if newest:
            words = "; ".join(f"{name}: {found}" for name, found in sorted(newest.items()))
            lines += ["", f"(The three fastest plans on {gpu} rank in time — {words}.)"]
    return "\n".join(lines)


def _measured_cells(row: dict[str, Any]) -> list[str]:
    """Peak and time of one plan on one GPU, with the time predicted from that GPU's measured rates."""
    if "error" in row:
        return ["failed"] * 2
    return [
        f"{row['allocated_gib']:.2f}, {row['workspaces_gib']:.2f} of it workspaces; "
        f"{row['reserved_gib']:.2f} reserved",
        f"{row['ms'] / 1000:.2f} s (predicted {row['predicted_ms'] / 1000:.2f} s)",
    ]


def photographs() -> str:
    """The photographs' table: per kind of degradation, the newest row of each seed."""
    newest = {row["seed"]: row for row in _rows("photographs")}
    seeds = sorted(newest)
    lines = [
        "| degraded by | accuracy at the start | "
        + " | ".join(f"change, seed {seed}" for seed in seeds)
        + " |",
        "|---" * (2 + len(seeds)) + "|",
    ]
    for kinds in zip(*(newest[seed]["kinds"] for seed in seeds), strict=True):
        starts = " / ".join(f"{kind['start']:.2f}" for kind in kinds)
        changes = [f"{k['change']:+.2f} [{k['pairs_low']:+.2f}, {k['pairs_high']:+.2f}]" for k in kinds]
        lines.append(f"| {kinds[0]['kind'].replace('_', ' ')} | {starts} | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def saved_memory() -> str:
    """Memory that forward keeps for backward: the whole UNet, then blocks."""
    rows = _rows("saved_memory")
    lines = ["| | plain | patched | saved less |", "|---|---|---|---|"]
    unets = [row for row in rows if row["what"] == "unet"]
    for plain, patched in zip(unets[::2], unets[1::2], strict=True):
        before, after = plain["saved_gib"], patched["saved_gib"]
        lines.append(f"| {plain['name']} | {before:.2f} GiB | {after:.2f} GiB | {before - after:.2f} GiB |")
    lines += ["", "| one pair, one block | plain | plain, compiled | patched |", "|---|---|---|---|"]
    for row in rows:
        if row["what"] == "block":
            lines.append(
                f"| {row['name']}, {row['shape']} | {row['plain_mib']:.1f} MiB "
                f"| {row['plain_compiled_mib']:.1f} MiB | {row['patched_mib']:.1f} MiB |"
            )
    return "\n".join(lines)


def traffic() -> str:
    """Bytes that loads and stores move, in multiples of the least possible: ours and PyTorch eager's.

    An optimizer's step is in the column of forward.
    """
    by_case: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in _rows("traffic"):
        by_case.setdefault((row["op"], row["shape"], row["dtype"]), {})[row["pass"]] = row
    lines = [
        "| operator | shape | forward: ours | eager | backward: ours | eager |",
        "|---|---|---|---|---|---|",
    ]
    for (op, shape, dtype), passes in by_case.items():
        cells = []
        for name in ("forward", "backward"):
            one = passes.get(name) or (passes.get("step") if name == "forward" else None)
            for moved in ("bytes", "eager_bytes"):
                cells.append("" if one is None else f"{one[moved] / one['floor_bytes']:.2f} ×")
        lines.append(f"| `{op}` | {shape} {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def resources() -> str:
    """Resources of the kernels of each file, over all cards and configurations."""
    by_file: dict[str, list[dict[str, Any]]] = {}
    for row in _rows("resources"):
        by_file.setdefault(row["kernel"].partition(".")[0], []).append(row)
    lines = [
        "| kernels of | compiled | most registers | spills, sm_80 and newer | largest shared memory |",
        "|---|---|---|---|---|",
    ]
    for name, rows in by_file.items():
        spills = sum(row["spill_bytes"] > 0 for row in rows if row["cc"] >= 80)
        lines.append(
            f"| `{name}` | {len(rows)} | {max(row['registers'] for row in rows)} | {spills or 'none'} "
            f"| {max(row['shared_bytes'] for row in rows)} B |"
        )
    return "\n".join(lines)


def cards() -> str:
    """What the presets need by size of memory, and the whole run's time on a card with as much: predicted."""
    table, limits = shipped.read(), host(parse_size(RAM, "ram"))
    presets = ("lora", "full")
    lines = ["| GPU memory | " + " | ".join(f"`--preset {name}`" for name in presets) + " |"]
    lines.append("|---" * (1 + len(presets)) + "|")
    for gib in (8, 12, 16, 24):
        cells = []
        for preset in presets:
            config, run = question(None, preset, [], None)
            card, vram = card_and_memory(config, None, f"{gib}GiB")
            answer = table["answers"].get(shipped.key(config, card, vram, limits))
            cells.append("not planned" if answer is None else _fits(answer, table, run.steps, card.name))
        lines.append(f"| {gib} GiB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _fits(answer: dict[str, Any], table: dict[str, Any], steps: int, card: str) -> str:
    if answer["chosen"] is None:
        return "does not fit"
    number, ms = answer["chosen"]
    needed = vram_for(table["plans"][number]["reserved"]) / GIB
    return f"{needed:.1f} GiB, {steps:,} steps in {seconds_text(ms * steps / 1e3)} ({card})"


def ops() -> str:
    """The microbenchmarks on a GPU, or a line that there are none yet."""
    return op_tables.table(op_tables.rows())


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"demo": demo, "cards": cards},
    DOCS / "objectives.md": {"objective_settings": objective_tables.named},
    DOCS / "kernels" / "paired_loss.md": {"formulas": objective_tables.formulas},
    DOCS / "results" / "demo.md": {"demo": demo},
    DOCS / "results" / "photographs.md": {"photographs": photographs},
    DOCS / "results" / "objectives.md": {"objectives": objectives},
    DOCS / "results" / "best_step.md": {"best": best, "sdpo": safeguard},
    DOCS / "results" / "memory.md": {"memory": memory},
    DOCS / "results" / "scaling.md": {"dataset": step_tables.dataset},
    DOCS / "results" / "speed.md": {
        "providers": step_tables.providers,
        "switches": step_tables.switches,
        "targets": step_tables.targets,
    },
    DOCS / "results" / "kernels.md": {
        "ops": ops,
        "traffic": traffic,
        "resources": resources,
        "saved_memory": saved_memory,
    },
}
"""Page → sections on it."""


def render(page: Path) -> str:
    """A page's text with all its results sections regenerated."""
    text = page.read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        begin = f"<!-- results: {name} -->\n"
        if text.count(begin) != 1:
            raise ValueError(f"{page} has {text.count(begin)} sections {begin.strip()}, expected 1")
        before, rest = text.split(begin)
        text = before + begin + make() + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def update() -> None:
    """Rewrite the tables of every page."""
    for page in PAGES:
        page.write_text(render(page), encoding="utf-8")


if __name__ == "__main__":
    update()
