"""The random words: known answers, and the same in torch as in a kernel."""

import pytest
import torch

from mapo_kernels._philox import philox_torch
from mapo_kernels._triton import jit, tl


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.int64) for v in values]


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # Random123's published known-answer vectors
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]) -> None:
    whole = key[0] | key[1] << 32
    signed = whole - 2**64 if whole >= 2**63 else whole
    got = philox_torch(torch.tensor(signed), *words(*counter))
    assert [int(w) for w in got] == list(want)


@jit
def _words(key, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    a, b, c, d = tl.philox(tl.load(key), i.to(tl.uint32), 0, 7, 0)
    tl.store(out + i, a.to(tl.int64))
    tl.store(out + N + i, b.to(tl.int64))
    tl.store(out + 2 * N + i, c.to(tl.int64))
    tl.store(out + 3 * N + i, d.to(tl.int64))


@pytest.mark.usefixtures("_launches")
@pytest.mark.parametrize("key", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_the_kernel_draws_the_same_words(device: str, key: int) -> None:
    out = torch.empty(4, 64, dtype=torch.int64, device=device)
    _words[(1,)](torch.tensor([key], device=device), out, 64)
    want = philox_torch(key, torch.arange(64), 0, 7, 0)
    assert torch.equal(out.cpu(), torch.stack(want))
