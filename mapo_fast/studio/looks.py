"""The job that looks at every picture: small copies for lists, and which ones are nearly the same.

Two pictures are near where at most `NEAR` of the 64 bits of their difference hashes differ: of a grid of
9 x 8 grey values, whether each is brighter than its right neighbour. Candidates share one of `NEAR` + 1 bands
of bits, which all near pairs do, so no pair is missed and not all pairs are compared.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from itertools import combinations
from pathlib import Path

from mapo_fast.studio.index import Index, index_folder
from mapo_fast.studio.render import Renderer
from mapo_fast.util.errors import UserError
from mapo_fast.util.files import atomic_path

NEAR = 4
THUMBNAIL = 256
_BITS = 64
_MOST = 200
"""Most pictures in a band that are compared with each other: more are plain surfaces."""


def thumbnail_file(project: Path, id: int, digest: int) -> Path:
    """A picture's small copy; `digest` is `changed` of the index."""
    return index_folder(project) / "thumbnails" / f"{id}-{digest & 0xFFFFFFFFFFFF:x}.webp"


def main(argv: list[str]) -> None:
    """Look at the pictures of a project that were not looked at."""
    project = Path(argv[0]).resolve()
    with closing(Index(index_folder(project))) as index, Renderer() as renderer:
        look(project, index, renderer)


def look(project: Path, index: Index, renderer: Renderer) -> None:
    """Make small copies and hashes; list near pictures in the index."""
    (index_folder(project) / "thumbnails").mkdir(exist_ok=True)
    left = index.rows("select id, path, changed from pictures where broken = '' and look is null")
    for done, (id, path, changed) in enumerate(left, 1):
        try:
            small = renderer.render(project / path, THUMBNAIL)
        except UserError as error:
            index.write("update pictures set broken = ? where id = ?", [(str(error), id)])
            continue
        with atomic_path(thumbnail_file(project, id, changed)) as temporary:
            temporary.write_bytes(small)
        look, colour = _facts(small)
        index.write(
            "update pictures set look = ?, colour = ? where id = ?", [(look.to_bytes(8, "big"), colour, id)]
        )
        if done % 100 == 0 or done == len(left):
            print(f"{done} of {len(left)} pictures", file=sys.stderr, flush=True)
    known = index.rows("select id, look from pictures where broken = '' and look is not null")
    found = near({id: int.from_bytes(look, "big") for id, look in known})
    index.write("delete from near", [()])
    index.write("insert into near values (?, ?, ?)", found)


def near(looks: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """Pairs of pictures whose hashes differ in at most `NEAR` bits, with the number of bits."""
    width = -(-_BITS // (NEAR + 1))
    seen: set[tuple[int, int]] = set()
    for band in range(NEAR + 1):
        groups: dict[int, list[int]] = defaultdict(list)
        for id, look in looks.items():
            groups[look >> band * width & (1 << width) - 1].append(id)
        for ids in groups.values():
            for pair in combinations(ids[:_MOST], 2):
                distance = (looks[pair[0]] ^ looks[pair[1]]).bit_count()
                if distance <= NEAR and pair not in seen:
                    seen.add(pair)
                    yield (*pair, distance)


def _facts(small: bytes) -> tuple[int, float]:
    """Difference hash, and mean saturation from 0 to 1, of a picture that this program wrote."""
    import io

    from PIL import Image, ImageStat

    with Image.open(io.BytesIO(small)) as image:
        grey = image.convert("L").resize((9, 8), Image.Resampling.BOX)
        saturation = ImageStat.Stat(image.convert("HSV").getchannel("S")).mean[0] / 255
    rows = [grey.tobytes()[9 * row : 9 * row + 9] for row in range(8)]
    bits = [row[x] > row[x + 1] for row in rows for x in range(8)]
    return sum(bit << place for place, bit in enumerate(bits)), saturation
