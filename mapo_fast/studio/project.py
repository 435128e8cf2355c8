"""A project: a folder that its user names, with pictures, votes and runs as plain files.

| name            | what it is                                                          |
|-----------------|---------------------------------------------------------------------|
| `studio.toml`   | `folders`: other folders with pictures                              |
| `votes.jsonl`   | votes (`votes`)                                                     |
| `prompts.jsonl` | prompts that were typed                                             |
| `kept.json`     | prompts that are not voted on (`kept`)                              |
| `candidates/`   | pictures made here                                                  |
| `configs/`      | what a run is trained with                                          |
| `data/`, `runs/`, `jobs/`, `comparisons/` | what the studio made and started           |

All pictures in the folder belong to it, but for those in the folders of the last two rows.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from mapo_fast.settings.toml import parse_toml
from mapo_fast.studio.answers import Answer
from mapo_fast.studio.dataset import decided, leaks, singles, write_pairs, write_singles
from mapo_fast.studio.holder import held, network_drive
from mapo_fast.studio.index import Index, index_folder
from mapo_fast.studio.kept import kept_prompts
from mapo_fast.studio.looks import thumbnail_file
from mapo_fast.studio.pairs import REPEATS, Pair, agreement, draw, pair_id, repeat
from mapo_fast.studio.pictures import PROMPT_BYTES, Group, Picture, Pictures, Progress
from mapo_fast.studio.records import Records
from mapo_fast.studio.votes import Vote, Votes
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path, disk_errors, read_bytes

SETTINGS, PROMPTS = "studio.toml", "prompts.jsonl"
DATA = "data"
NOT_PICTURES = ("runs", "comparisons", "jobs", "configs", DATA)
_SESSIONS = 32
"""Tabs whose open pairs are remembered."""
_TRIES = 100


class Status(NamedTuple):
    """Figures of a project."""

    pictures: int
    broken: int
    unknown: int
    prompts: int
    kept: int
    single: int
    """Prompts with one picture."""
    votes: int
    decided: int
    """Votes for one of the sides."""
    same: int
    """Repeated pairs with the same answer, of `repeated`."""
    repeated: int
    missing: str
    """One sentence about what is missing before a vote; empty where nothing is."""


class Project:
    """An open project; a context manager. Its methods may be called from several threads."""

    def __init__(self, folder: Path, rng: random.Random | None = None) -> None:
        self.folder = folder
        self._rng = rng or random.Random()
        self._lock = threading.RLock()
        self._open: dict[str, list[Pair]] = {}
        self._members: tuple[int, dict[str, list[int]]] = (-1, {})
        self._seen: dict[str, set[tuple[int, int]]] = {}
        self._kept: set[str] = set()
        with ExitStack() as stack:
            stack.enter_context(held(folder))
            self.index = Index(index_folder(folder))
            stack.callback(self.index.close)
            self.votes = Votes(folder)
            self._prompts = Records(folder / PROMPTS)
            self.typed = {
                line["path"]: line["prompt"]
                for line in self._prompts.lines
                if isinstance(line.get("path"), str) and isinstance(line.get("prompt"), str)
            }
            self._pictures = Pictures(folder, self.index, lambda: self.typed)
            self.folders = _folders(folder)
            self._stack = stack.pop_all()

    @classmethod
    def open(cls, folder: Path) -> Project:
        """Open a folder as a project, and hold it.

        Raises:
            UserError: it is no folder, cannot be written, is open elsewhere, or has damaged settings.
        """
        folder = folder.expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: name the folder of your project or pictures")
        return cls(folder.resolve())

    @property
    def network_drive(self) -> str | None:
        """One sentence where the project is on a network drive."""
        return network_drive(self.folder)

    # --- pictures ---

    def scan(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
        """Look for new, changed and removed pictures; see `Pictures.scan`."""
        left_out = {self.folder / name for name in NOT_PICTURES}
        return self._pictures.scan([self.folder, *self.folders], left_out, stop)

    def add_folder(self, folder: Path) -> None:
        """Take the pictures of another folder too."""
        folder = folder.resolve()
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        with self._lock:
            if folder in self.folders or folder.is_relative_to(self.folder):
                return
            path = self.folder / SETTINGS
            names = [str(one) for one in (*self.folders, folder)]
            with disk_errors(path), atomic_path(path) as temporary:
                temporary.write_text(f"folders = {json.dumps(names)}\n", encoding="utf-8")
            self.folders.append(folder)

    def picture(self, id: int) -> Picture | None:
        """A picture by its number."""
        return self._pictures.get(id)

    def picture_file(self, id: int) -> Path | None:
        """The file of a picture that can be shown."""
        found = self.picture(id)
        return None if found is None or found.broken else self._pictures.file_of(found.path)

    def thumbnail(self, id: int) -> Path | None:
        """The small copy of a picture, which this program made; None before the job `looks` made it."""
        found = self.index.rows("select changed from pictures where id = ? and broken = ''", [id])
        path = thumbnail_file(self.folder, id, found[0][0]) if found else None
        return path if path is not None and path.is_file() else None

    def near(self, limit: int = 1000) -> list[tuple[int, int, int]]:
        """Pairs of pictures that are nearly the same, and in how many bits they differ; see `looks`."""
        rows = self.index.rows("select one, other, distance from near order by distance limit ?", [limit])
        return [(one, other, distance) for one, other, distance in rows]

    def pictures(self, group: int | None = None, after: int = 0, limit: int = 100) -> list[Picture]:
        """Pictures that can be shown, by number; `group` is a `Group.id`."""
        if group is None:
            return self._pictures.some("id > ? and broken = ''", [after], limit)
        same = "id > ? and broken = '' and prompt = (select prompt from pictures where id = ?)"
        return self._pictures.some(same, [after, group], limit)

    def groups(self) -> list[Group]:
        """The prompts."""
        return self._pictures.groups()

    def broken(self, after: int = 0, limit: int = 100) -> list[Picture]:
        """Files that cannot be shown, with the reason."""
        return self._pictures.some("id > ? and broken != ''", [after], limit)

    def unknown(self, after: int = 0, limit: int = 100) -> list[Picture]:
        """Pictures whose prompt has to be typed, with the reason."""
        return self._pictures.some("id > ? and broken = '' and prompt is null", [after], limit)

    def set_prompt(self, ids: Iterable[int], prompt: str) -> None:
        """Write down a prompt for pictures.

        Raises:
            UserError: the prompt is empty or too long, there is no such picture, the disk.
        """
        prompt = prompt.strip()
        if not 0 < len(prompt.encode("utf-8", "replace")) <= PROMPT_BYTES:
            raise UserError(f"a prompt has 1 to {PROMPT_BYTES:,} bytes")
        with self._lock:
            for id in ids:
                if (found := self.picture(id)) is None:
                    raise UserError(f"there is no picture {id}: scan the folder again")
                self._prompts.append({"path": found.path, "prompt": prompt})
                self.typed[found.path] = prompt
                self._pictures.set_prompt([id], prompt)

    # --- votes ---

    def next_pair(self, session: str) -> Pair | None:
        """The pair to show now; None where there is none."""
        return next(iter(self.next_pairs(session, 1)), None)

    def next_pairs(self, session: str, count: int = 2) -> list[Pair]:
        """The pair to show now and those after it, which can be loaded ahead.

        Args:
            session: a tab; it gets the same pairs until they have votes. No two tabs get the same one.
            count: how many.
        """
        with self._lock:
            mine = self._open.pop(session, [])
            self._open[session] = mine  # last, as the one used last
            while len(self._open) > _SESSIONS:
                del self._open[next(iter(self._open))]
            self._refresh()
            mine[:] = [pair for pair in mine if self.votes.find(pair.id) is None and self._shows(pair)]
            while len(mine) < count and (pair := self._draw()) is not None:
                mine.append(pair)
            return mine[:count]

    def _shows(self, pair: Pair) -> bool:
        return all(self.picture_file(id) is not None for id in (pair.left, pair.right))

    def _refresh(self) -> None:
        """Read the prompts again after a change of the index."""
        version = self._pictures.version
        if self._members[0] == version:
            return
        members = self._pictures.members()
        self._members = version, members
        votes = self.votes.all()
        self._kept = kept_prompts(self.folder, members, {vote.prompt for vote in votes})
        ids = dict(self.index.rows("select path, id from pictures"))
        self._seen = {}
        for vote in votes:
            if vote.left in ids and vote.right in ids:
                self._see(vote.prompt, ids[vote.left], ids[vote.right])
        for pairs in self._open.values():
            for pair in pairs:
                self._see(pair.prompt, pair.left, pair.right)

    def _see(self, prompt: str, one: int, other: int) -> None:
        self._seen.setdefault(prompt, set()).add((min(one, other), max(one, other)))

    def _draw(self) -> Pair | None:
        if self._rng.random() < REPEATS and (pair := self._repeated()) is not None:
            return pair
        keys = {vote.key for vote in self.votes.all()}
        for _ in range(_TRIES):
            found = draw(self._members[1], self._kept, self._seen, self._rng)
            if found is None:
                return None
            self._see(*found)
            digests = (self._pictures.digest(found.one), self._pictures.digest(found.other))
            if digests[0] == digests[1] or tuple(sorted(digests)) in keys:
                continue  # a file that was moved after its vote
            left, right = self._rng.sample((found.one, found.other), 2)
            return Pair(pair_id(digests, mirrored=False), found.prompt, left, right, mirrored=False)
        return None

    def _repeated(self) -> Pair | None:
        is_open = {pair.id for pairs in self._open.values() for pair in pairs}
        vote = repeat(self.votes.all(), is_open.__contains__, self._rng)
        return None if vote is None else self._pair_of(vote, exchanged=True)

    def _pair_of(self, vote: Vote, *, exchanged: bool) -> Pair | None:
        ids = dict(
            self.index.rows("select path, id from pictures where path in (?, ?)", [vote.left, vote.right])
        )
        if len(ids) < 2:
            return None
        left, right = ids[vote.left], ids[vote.right]
        if exchanged:
            return Pair(pair_id(vote.key, mirrored=True), vote.prompt, right, left, mirrored=True)
        return Pair(vote.pair, vote.prompt, left, right, vote.mirrored)

    def vote(self, pair_id: str, answer: Answer, seconds: float) -> bool:
        """Write a vote down: it is on the disk when this returns.

        Returns:
            False where the pair has this answer already.

        Raises:
            UserError: the pair is not open or has another answer; the disk. Then nothing is written.
        """
        with self._lock:
            pair = next((p for pairs in self._open.values() for p in pairs if p.id == pair_id), None)
            found = self.votes.find(pair_id)
            if pair is None and found is None:
                raise UserError("this pair is not open any more: go on with the next one")
            if pair is None or found is not None:
                assert found is not None
                return self.votes.add(found if found.answer == answer else _other(found, answer))
            left, right = self.picture(pair.left), self.picture(pair.right)
            if left is None or right is None:
                raise UserError("a picture of this pair is gone: go on with the next one")
            digests = self._pictures.digest(pair.left), self._pictures.digest(pair.right)
            return self.votes.add(
                Vote(
                    pair.id,
                    pair.prompt,
                    left.path,
                    right.path,
                    *digests,
                    pair.mirrored,
                    answer,
                    min(max(float(seconds), 0.0), 86400.0),
                    time.time(),
                )
            )

    def undo(self, session: str | None = None) -> Pair | None:
        """Take the last vote back; its pair is the tab's next one again."""
        with self._lock:
            vote = self.votes.undo()
            pair = None if vote is None else self._pair_of(vote, exchanged=False)
            if pair is not None and session is not None:
                self._open.setdefault(session, []).insert(0, pair)
            return pair

    # --- what is trained on ---

    def write_data(self, *, kto: bool = False, soft: bool = False) -> tuple[Path, int]:
        """Write the votes as a data set, `data/pairs` or `data/singles`; its folder and the number of rows.

        Args:
            kto: single pictures instead of pairs.
            soft: write the share of votes as each pair's label, for objectives that take one.

        Raises:
            UserError: no vote chose a picture; the disk.
        """
        votes = self.votes.all()
        folder = self.folder / DATA / ("singles" if kto else "pairs")
        with disk_errors(folder):
            folder.parent.mkdir(exist_ok=True)
            if kto:
                return folder, write_singles(folder, singles(votes), self._file_finder(votes))
            return folder, write_pairs(folder, decided(votes), self._file_finder(votes), soft=soft)

    def _file_finder(self, votes: list[Vote]) -> Callable[[str], Path | None]:
        """Finds the file of a SHA-256: where it was voted on, or where it has been moved to."""
        known = dict(self.index.rows("select digest, path from pictures where digest is not null"))
        voted = {d: p for v in votes for d, p in ((v.left_sha256, v.left), (v.right_sha256, v.right))}

        def find(digest: str) -> Path | None:
            path = known.get(digest) or voted.get(digest)
            file = None if path is None else self._pictures.file_of(path)
            return file if file is not None and file.is_file() and not file.is_symlink() else None

        return find

    def data_card(self) -> list[str]:
        """Warnings about what else the votes follow: model, sampler, LoRA, size, colour."""
        pictures = {p.path: p for p in self._pictures.some("broken = ''", [], -1)}
        at = {v.left_sha256: v.left for v in self.votes.all()}
        at |= {v.right_sha256: v.right for v in self.votes.all()}
        pairs = [
            (pictures[at[one.chosen]], pictures[at[one.rejected]])
            for one in decided(self.votes.all())
            if at[one.chosen] in pictures and at[one.rejected] in pictures
        ]
        return leaks(pairs, dict(self.index.rows("select id, colour from pictures where colour is not null")))

    def kept(self) -> list[str]:
        """The prompts that are not voted on."""
        with self._lock:
            self._refresh()
            return sorted(self._kept)

    def status(self) -> Status:
        """Figures of the project."""
        with self._lock:
            self._refresh()
            members, votes = self._members[1], self.votes.all()
            ((broken, unknown, shown),) = self.index.rows(
                "select coalesce(sum(broken != ''), 0), coalesce(sum(broken = '' and prompt is null), 0), "
                "coalesce(sum(broken = ''), 0) from pictures"
            )
            single = sum(len(ids) == 1 for ids in members.values())
            return Status(
                shown,
                broken,
                unknown,
                len(members),
                len(self._kept),
                single,
                len(votes),
                sum(vote.winner is not None for vote in votes),
                *agreement(votes),
                _missing(shown, unknown, len(members), single),
            )

    def __enter__(self) -> Project:
        """Use as a context manager."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let others open the project."""
        self._stack.close()


def _other(vote: Vote, answer: Answer) -> Vote:
    return Vote(**{**vars(vote), "answer": answer})


def _missing(pictures: int, unknown: int, prompts: int, single: int) -> str:
    if not pictures:
        return "there is no picture yet: open a folder with pictures, or make candidates from prompts"
    if not prompts:
        return f"no picture says its prompt: type the prompts of {unknown} pictures"
    if single == prompts:
        return (
            f"each of the {prompts} prompts has one picture, and a vote needs two of one prompt: make "
            "candidates for them"
        )
    return ""


def _folders(project: Path) -> list[Path]:
    """Folders of pictures besides the project's own."""
    path = project / SETTINGS
    try:
        found = parse_toml(read_bytes(path, 1 << 20).decode("utf-8")).get("folders", [])
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UserError(f'{path}: folders must be a list of folders, such as ["/home/me/pictures"]')
    return [Path(one) for one in found]
