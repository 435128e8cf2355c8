"""A blind comparison of two models: one page, offline, votes by keys, and the answer at the end.

The number of votes is fixed before the first one, so that nobody stops where it looks good. The page calls a
model better where the exact sign test has p ≤ 0.05; of equal models it does so in at most 5 % of comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mapo_fast.score.manifest import Made
from mapo_fast.score.scores import open_image
from mapo_fast.score.statistics import FEWEST_FOR_WIN_RATE
from mapo_fast.util.errors import UserError
from mapo_fast.util.page import image_url, write_page

_SIDE = 768


def write_blind(
    path: Path,
    images: Mapping[str, Sequence[Made]],
    votes: int | None = None,
    seen: frozenset[str] = frozenset(),
    strip: Mapping[str, Made] | None = None,
) -> int:
    """Write the page.

    Args:
        path: the HTML file.
        images: of two models, in the same order.
        votes: how many; as many as there are images by default.
        seen: prompts that were trained on, which are reported apart.
        strip: images of one prompt by strength of a LoRA, shown after the last vote.

    Returns:
        The number of votes.

    Raises:
        UserError: not two models, too few images, or more votes than images.
        OSError: the disk.
    """
    if len(images) != 2:
        raise UserError(f"a blind comparison is of two models, not of {len(images)}: name two")
    (first, ours), (second, theirs) = images.items()
    count = len(ours) if votes is None else votes
    if not FEWEST_FOR_WIN_RATE <= count <= len(ours):
        raise UserError(
            f"{count} votes of {len(ours)} image(s) a model: take {FEWEST_FOR_WIN_RATE} votes or more, and "
            "at most one for each image (mapo-fast sample with more prompts or --seeds)"
        )
    data: dict[str, Any] = {
        "models": [first, second],
        "votes": count,
        "pairs": [
            {
                "prompt": a.prompt,
                "seen": a.prompt in seen,
                "images": [image_url(open_image(one.path), _SIDE) for one in (a, b)],
            }
            for a, b in zip(ours, theirs, strict=True)
        ],
        "strip": [
            {
                "strength": strength,
                "prompt": made.prompt,
                "image": image_url(open_image(made.path), _SIDE // 2),
            }
            for strength, made in (strip or {}).items()
        ],
    }
    write_page(path, "Which is better?", _BODY.format(votes=count), script=_SCRIPT, data=data, style=_STYLE)
    return count


_BODY = """
<h1>Which is better?</h1>
<p id="how">{votes} pairs. <kbd>&larr;</kbd> left, <kbd>&rarr;</kbd> right, <kbd>&darr;</kbd> no difference,
<kbd>Backspace</kbd> undo. Which model is which is shown after the last vote.</p>
<p id="prompt"></p>
<div id="pair"><button id="left" aria-label="left is better"><img alt="left image"></button>
<button id="right" aria-label="right is better"><img alt="right image"></button></div>
<p><button id="tie">no difference</button> <button id="undo">undo</button>
<span id="count" role="status"></span></p>
<div id="result" role="status" hidden></div>
<div id="strip" class="grid" hidden></div>
"""

_STYLE = """
#pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
#pair button { padding: 0; border: 2px solid transparent; background: none; cursor: pointer; }
#pair img { width: 100%; display: block; } body { max-width: 100rem; } [hidden] { display: none; }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
function shuffled(list) {
  const found = [...list];
  for (let i = found.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [found[i], found[j]] = [found[j], found[i]];
  }
  return found;
}
const order = shuffled(data.pairs.keys()).slice(0, data.votes)
  .map(pair => ({pair: data.pairs[pair], swapped: Math.random() < 0.5}));
const votes = [];
function show() {
  at("count").textContent = `${votes.length} of ${data.votes} votes`;
  if (votes.length === data.votes) return reveal();
  const {pair, swapped} = order[votes.length];
  at("prompt").textContent = pair.prompt;
  at("left").firstChild.src = pair.images[swapped ? 1 : 0];
  at("right").firstChild.src = pair.images[swapped ? 0 : 1];
}
function vote(side) {
  if (votes.length >= data.votes) return;
  const {pair, swapped} = order[votes.length];
  votes.push({seen: pair.seen, score: side === 0.5 ? 0.5 : (side === 1) !== swapped ? 1 : 0});
  show();
}
function undo() { if (votes.length && votes.length < data.votes) { votes.pop(); show(); } }
function interval(scores) {
  const n = scores.length, z = 1.959963984540054, s = z * z / n;
  const rate = scores.reduce((a, b) => a + b, 0) / n, ties = scores.filter(x => x === 0.5).length / n;
  const a = 1 + s, b = 2 * rate + s, c = rate * rate + s * ties / 4;
  const root = Math.sqrt(Math.max(0, b * b - 4 * a * c));
  return [rate, Math.max(0, (b - root) / (2 * a)), Math.min(1, (b + root) / (2 * a))];
}
function pValue(scores) {  // exact sign test
  const wins = scores.filter(x => x === 1).length, losses = scores.filter(x => x === 0).length;
  let term = 2 ** -(wins + losses), tail = 0;
  for (let k = 0; k <= Math.min(wins, losses); k++) {
    tail += term;
    term *= (wins + losses - k) / (k + 1);
  }
  return Math.min(1, 2 * tail);
}
function line(name, scores) {
  const text = document.createElement("p");
  if (!scores.length) return text;
  const [rate, low, high] = interval(scores), percent = x => `${Math.round(100 * x)} %`;
  const p = pValue(scores), better = data.models[rate > 0.5 ? 1 : 0];
  const verdict = p <= 0.05 ? `${better} is better.` : "No difference is shown.";
  text.textContent = `${name}: ${data.models[1]} wins ${percent(rate)} of ${scores.length} votes, `
    + `95 % interval ${percent(low)} to ${percent(high)}, sign test p = ${p.toFixed(3)}. `
    + (scores.length < 10 ? "Too few votes to tell." : verdict);
  return text;
}
function reveal() {
  for (const id of ["pair", "prompt", "tie", "undo", "how"]) at(id).hidden = true;
  const all = votes.map(v => v.score), apart = votes.some(v => v.seen) && votes.some(v => !v.seen);
  at("result").append(line("All prompts", all));
  if (apart) {
    const of = seen => votes.filter(v => v.seen === seen).map(v => v.score);
    at("result").append(line("Prompts that were not trained on", of(false)));
    at("result").append(line("Prompts that were trained on", of(true)));
  }
  at("result").hidden = false;
  for (const one of data.strip) {
    const figure = document.createElement("figure"), image = document.createElement("img");
    image.src = one.image;
    image.alt = `${one.prompt}, strength ${one.strength}`;
    const caption = document.createElement("figcaption");
    caption.textContent = `strength ${one.strength}: ${one.prompt}`;
    figure.append(image, caption);
    at("strip").append(figure);
  }
  at("strip").hidden = !data.strip.length;
}
at("left").addEventListener("click", () => vote(0));
at("right").addEventListener("click", () => vote(1));
at("tie").addEventListener("click", () => vote(0.5));
at("undo").addEventListener("click", undo);
document.addEventListener("keydown", event => {
  const act = {ArrowLeft: () => vote(0), ArrowRight: () => vote(1), ArrowDown: () => vote(0.5)};
  act.Backspace = undo;
  if (act[event.key]) { event.preventDefault(); act[event.key](); }
});
show();
"""
