import hashlib
import random

import pytest

from mapo_fast.data.split import held_out_pairs


def key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def pairs(count: int, prompts: int) -> list[tuple[bytes, bytes, bytes]]:
    return [(key(f"p{i % prompts}"), key(f"w{i}"), key(f"l{i}")) for i in range(count)]


def test_share_is_reached() -> None:
    held = held_out_pairs(pairs(400, 400), 0.1)
    assert sum(held) == 40


def test_no_prompt_or_image_is_on_both_sides() -> None:
    rng = random.Random(0)
    members = [tuple(key(f"{kind}{rng.randrange(150)}") for kind in ("p", "i", "i")) for _ in range(60)]
    held = held_out_pairs(members, 0.3)
    sides = [
        {k for keys, h in zip(members, held, strict=True) if h is side for k in keys}
        for side in (True, False)
    ]
    assert any(held)
    assert not all(held)
    assert not sides[0] & sides[1]


def test_connected_through_a_chain_stays_together() -> None:
    chain = [(key(f"p{i}"), key(f"i{i}"), key(f"i{i + 1}")) for i in range(10)]
    held = held_out_pairs([*chain, *pairs(90, 90)], 0.5)
    assert len(set(held[:10])) == 1


def test_independent_of_row_order() -> None:
    members = pairs(120, 40)
    order = random.Random(1).sample(range(120), 120)
    held = held_out_pairs(members, 0.2)
    shuffled = held_out_pairs([members[i] for i in order], 0.2)
    assert shuffled == [held[i] for i in order]


@pytest.mark.parametrize(("members", "share"), [(pairs(30, 1), 0.2), (pairs(30, 30), 0.0), ([], 0.1)])
def test_nothing_held_out(members: list[tuple[bytes, bytes, bytes]], share: float) -> None:
    assert not any(held_out_pairs(members, share))


def test_at_least_one_component_of_a_small_set() -> None:
    assert sum(held_out_pairs(pairs(6, 6), 0.05)) == 1
