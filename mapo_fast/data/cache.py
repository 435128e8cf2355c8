# TEMPORARY STUB by the lead so that the trainer can be exercised; H2 overwrites this file.
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import Tensor
from mapo_fast.draws import pair_noise

@dataclass(frozen=True)
class CachedPair:
    id: str
    bucket: tuple[int, int]

@dataclass(frozen=True)
class PairBatch:
    chosen_latents: Tensor
    rejected_latents: Tensor
    prompt_embeds: Tensor
    pooled_embeds: Tensor
    time_ids_chosen: Tensor
    time_ids_rejected: Tensor

class PairCache:
    fingerprint = "stub"
    flips = False
    @classmethod
    def open(cls, folder, *, verify=True):
        c = cls()
        c.train = [CachedPair(f"{i:032x}", (32, 32)) for i in range(20)]
        c.held_out = [CachedPair(f"{i:032x}", (32, 32)) for i in range(20, 26)]
        return c
    def check(self, *a): pass
    def batch(self, pairs, *, flip, drop):
        g = lambda n, s: torch.stack([pair_noise(0, n, p.id, s) for p in pairs])
        return PairBatch(g("c", (4, 8, 8)), g("r", (4, 8, 8)), g("p", (77, 40)), g("q", (24,)), torch.full((len(pairs), 6), 32.), torch.full((len(pairs), 6), 32.))
