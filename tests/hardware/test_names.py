"""Cards by name: as written, memory variants, laptops, other makers, unknown ones."""

from __future__ import annotations

import re

import pytest

from mapo_fast.hardware.cards import CARDS, LAPTOP
from mapo_fast.hardware.names import find_card
from mapo_fast.util.errors import UserError
from mapo_fast.util.sizes import GIB, parse_size


@pytest.mark.parametrize("name", ["4090", "rtx 4090", "RTX4090", "RTX 4090 24 GB", "NVIDIA GeForce RTX 4090"])
def test_a_card_is_known_by_its_names(name: str) -> None:
    assert find_card(name).name == "RTX 4090"


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", "RTX 4060 Laptop"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", "RTX 5090 Laptop"),
    ],
)
def test_a_card_is_known_by_its_drivers_name(driver: str, name: str) -> None:
    assert find_card(driver).name == name


def test_every_card_is_found_by_its_own_name() -> None:
    assert [find_card(card.name) for card in CARDS] == list(CARDS)


def test_memory_tells_cards_of_one_name_apart_and_may_be_another() -> None:
    assert [find_card(f"RTX 4060 Ti{size}").gib for size in (" 16GB", " 8 GB")] == [16, 8]
    assert [find_card(f"RTX 4090 {size}").gib for size in ("48GB", "11.5 GiB")] == [48, 11.5]
    laptop = find_card("NVIDIA GeForce RTX 3060 Laptop GPU 6GB")
    assert (laptop.gib, laptop.kind) == (6, LAPTOP)
    assert laptop.rates.source.endswith("one with a lower power limit is slower")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("RTX 3050", "4, 6 or 8"),
        ("rtx 3060", "8 or 12"),
        ("RTX 2060", "6 or 12"),
        ("NVIDIA GeForce RTX 3080", "10 or 12"),
        ("4060 Ti", "8 or 16"),
        ("RTX 5060 Ti", "8 or 16"),
        ("RTX 3080 Laptop GPU", "8 or 16"),
        ("RTX A2000", "6 or 12"),
        ("A100", "40 or 80"),
        ("H100", "80 or 94"),
        ("RTX 3060 16GB", "8 or 12"),
    ],
)
def test_a_card_that_is_made_with_several_sizes_is_asked_for_its_own(name: str, sizes: str) -> None:
    with pytest.raises(UserError, match=rf"{sizes} GB\? Say which, as in --card") as asked:
        find_card(name)
    assert "\n" not in str(asked.value)
    example = re.search(r'--card "(.*)"$', str(asked.value))
    assert example is not None
    assert find_card(example[1]).name == example[1]


@pytest.mark.parametrize(
    ("name", "maker"),
    [
        ("RX 7900 XTX", "AMD"),
        ("AMD Radeon RX 9070", "AMD"),
        ("MI300X", "AMD"),
        ("Intel Arc B580", "Intel"),
        ("Arc A770 16GB", "Intel"),
        ("Apple M3 Max", "Apple"),
        ("M2 Ultra", "Apple"),
    ],
)
def test_another_makers_card_is_answered_by_name(name: str, maker: str) -> None:
    with pytest.raises(UserError, match=f"is made by {maker}: the kernels need an NVIDIA GPU"):
        find_card(name)


def test_an_unknown_card_names_the_nearest_ones() -> None:
    with pytest.raises(UserError, match="did you mean RTX 4090 or"):
        find_card("RTX 409")
    with pytest.raises(UserError, match="did you mean RTX A6000 or RTX 6000 Ada or RTX PRO 6000"):
        find_card("RTX 6000")
    with pytest.raises(UserError, match="--vram with its memory"):
        find_card("Voodoo")


def test_sizes_are_read_with_and_without_a_unit() -> None:
    assert parse_size("24", "--vram") == parse_size("24 GB", "--vram") == 24 * GIB
    assert parse_size("1.5 GB", "--vram") == parse_size("1536 MiB", "--vram") == 3 * GIB // 2
    for wrong in ("0", "lots", "-3GiB", "24 TB", ""):
        with pytest.raises(UserError, match=f'--vram = {wrong!r} is not a size: write it as "24GiB"'):
            parse_size(wrong, "--vram")


@pytest.mark.parametrize("name", ["GTX 1080", "NVIDIA GeForce GTX 1660 Ti", "Titan X"])
def test_cards_that_are_too_old_are_answered_so(name: str) -> None:
    with pytest.raises(UserError, match="older than RTX 20"):
        find_card(name)
