"""The patched UNet against the plain one: the same numbers, the same names, less saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mapo_fast
from mapo_fast import patch_unet, unpatch_unet
from mapo_fast.engine.layouts import apply_layout
from tests.unets import FAMILIES, inputs, make_unet, run

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*adapter.*:UserWarning"),
]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def relative(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """The error of every tensor, relative to its own norm."""
    assert got.keys() == want.keys()
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 1e-9) -> None:
    errors = relative(got, want)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= bound, (worst, errors[worst])


def rounding_ratios(
    dtype: torch.dtype,
    context: AbstractContextManager[Any],
    prepare: Callable[[Any], object] = lambda unet: None,
) -> tuple[dict[str, float], float]:
    """Root-mean-square error of the patched UNet over the plain one's, per tensor and over all."""
    squares: dict[str, list[float]] = {}
    for seed in range(6):
        unet = make_unet("sdxl", dtype=dtype, seed=seed)
        prepare(unet)
        truth = run(copy.deepcopy(unet).double(), "sdxl", dtype, compute=torch.float64)
        with context:
            plain = relative(run(unet, "sdxl", dtype), truth)
            fused = relative(run(patch_unet(unet), "sdxl", dtype), truth)
        for name in truth:
            sums = squares.setdefault(name, [0.0, 0.0])
            sums[0] += fused[name] ** 2
            sums[1] += plain[name] ** 2
    of_fused, of_plain = (sum(sums[i] for sums in squares.values()) for i in (0, 1))
    return {n: (a / b) ** 0.5 for n, (a, b) in squares.items()}, (of_fused / of_plain) ** 0.5


def add_lora(
    unet: Any, targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"), **settings: Any
) -> None:
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), **settings))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


# --- Exactness ---


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_every_gradient_in_fp64(family: str) -> None:
    unet = make_unet(family)
    want = run(unet, family, torch.float64)
    assert len(want) == 2 + len(list(unet.parameters()))
    assert_same(run(patch_unet(unet), family, torch.float64), want)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_at_most_twice_the_plain_one(dtype: torch.dtype, channels_last: bool) -> None:
    """Per tensor, against fp64 on the very same rounded weights and inputs.

    A tensor's error is one draw from a distribution, mostly of what the layers around it rounded: root mean
    squares over several UNets are compared, not single draws.
    """
    order = torch.channels_last if channels_last else torch.contiguous_format
    ratios, overall = rounding_ratios(dtype, nullcontext(), lambda unet: unet.to(memory_format=order))
    assert max(ratios.values()) <= 2, sorted(ratios.items(), key=lambda item: -item[1])[:5]
    assert overall <= 1.1


@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize(
    "targets",
    [
        ATTENTION,
        ("to_q", "proj_in", "ff.net.0.proj", "ff.net.2", "time_emb_proj"),
        ("conv1", "conv_shortcut", "to_v"),
    ],
)
def test_peft_adapters(targets: tuple[str, ...], patched_first: bool) -> None:
    unet = make_unet("sdxl")
    plain = copy.deepcopy(unet)
    if patched_first:
        patch_unet(unet)
    for each in (plain, unet):
        torch.manual_seed(3)
        add_lora(each, targets)
    want = run(plain, "sdxl", torch.float64)
    assert any("lora_A" in name for name in want)
    assert_same(run(unet if patched_first else patch_unet(unet), "sdxl", torch.float64), want)
    unet.disable_adapters()
    plain.disable_adapters()
    with torch.no_grad():
        latents, others = inputs("sdxl", torch.float64)
        torch.testing.assert_close(unet(latents, **others), plain(latents, **others), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_adapters_it_cannot_fuse_stay_pefts(settings: dict[str, Any]) -> None:
    targets = ("to_q", "to_out.0") if "lora_bias" not in settings else ("to_out.0",)
    unet = make_unet("sdxl")
    add_lora(unet, targets, **settings)
    plain = copy.deepcopy(unet)
    patch_unet(unet)
    torch.manual_seed(5)
    want = run(plain, "sdxl", torch.float64)
    torch.manual_seed(5)
    assert_same(run(unet, "sdxl", torch.float64), want)


def test_dropout_in_the_unet_stays_where_it_is() -> None:
    unet = make_unet("sdxl")
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    plain = copy.deepcopy(unet)
    patch_unet(unet)
    torch.manual_seed(5)
    want = run(plain, "sdxl", torch.float64)
    torch.manual_seed(5)
    assert_same(run(unet, "sdxl", torch.float64), want)


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_gradient_checkpointing(layout: Any) -> None:
    unet = make_unet("sdxl")
    want = run(unet, "sdxl", torch.float64)
    apply_layout(patch_unet(unet), layout, gradient_checkpointing=True)
    assert_same(run(unet, "sdxl", torch.float64), want)


@pytest.mark.parametrize("layout", ["joint", "split"])
def test_checkpointing_what_takes_the_plain_way(layout: Any) -> None:
    """LoRA dropout leaves LayerNorm alone in front of peft's layers: recomputed like everything else."""
    unet = make_unet("sdxl")
    add_lora(unet, ATTENTION, lora_dropout=0.5)
    for module in unet.modules():
        if isinstance(module, nn.Dropout) and module.p == 0.5:
            module.p = 1e-12  # in effect, but the same whatever is drawn
    want = run(unet, "sdxl", torch.float64)
    apply_layout(patch_unet(unet), layout, gradient_checkpointing=True)
    assert_same(run(unet, "sdxl", torch.float64), want)


def add_fp32_lora(unet: Any) -> None:
    add_lora(unet, ATTENTION)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


@pytest.mark.parametrize(
    ("dtype", "prepare"), [(torch.float32, lambda unet: None), (torch.bfloat16, add_fp32_lora)]
)
def test_autocast(dtype: torch.dtype, prepare: Callable[[Any], object]) -> None:
    """As the trainer's `bf16`: fp32 weights, or fp32 LoRA factors on a bf16 base, and bf16 arithmetic."""
    ratios, overall = rounding_ratios(dtype, torch.autocast("cpu", dtype=torch.bfloat16), prepare)
    assert max(ratios.values()) <= 2, sorted(ratios.items(), key=lambda item: -item[1])[:5]
    assert overall <= 1.1


def test_masks_and_attention_arguments_take_the_plain_way() -> None:
    unet = make_unet("sdxl")
    plain = copy.deepcopy(unet)
    patch_unet(unet)
    latents, others = inputs("sdxl", torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    for extra in ({"encoder_attention_mask": mask}, {"cross_attention_kwargs": {"scale": 1.0}}):
        want, got = (each(latents, **others, **extra).sample for each in (plain, unet))
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_hooks_on_sub_modules_are_called() -> None:
    unet = patch_unet(make_unet("sdxl"))
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    seen: list[str] = []
    watched = {"q": block.attn1.to_q, "norm": block.norm2, "conv": unet.mid_block.resnets[0].conv1}
    watched |= {"groups": unet.mid_block.resnets[0].norm2, "ff": block.ff.net[2]}
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    latents, others = inputs("sdxl", torch.float64)
    got = unet(latents, **others).sample
    assert sorted(seen) == sorted(watched)
    torch.testing.assert_close(got, unpatch_unet(unet)(latents, **others).sample, rtol=1e-9, atol=1e-12)


# --- The same UNet otherwise ---


def test_state_dict_and_saving(tmp_path: Path) -> None:
    unet = make_unet("sdxl")
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    patch_unet(unet)
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    unet.save_pretrained(tmp_path)
    again = type(make_unet("sdxl")).from_pretrained(tmp_path, local_files_only=True)
    assert all(torch.equal(again.state_dict()[k].double(), before[k]) for k in before)
    unet.load_state_dict({k: v + 1 for k, v in before.items()})
    assert all(torch.equal(v, before[k] + 1) for k, v in unet.state_dict().items())


def test_q_k_and_v_are_three_parameters_in_one_storage() -> None:
    unet = patch_unet(make_unet("sdxl"))
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    weights = [layer.weight for layer in (attn.to_q, attn.to_k, attn.to_v)]
    assert all(isinstance(w, nn.Parameter) and w.is_leaf for w in weights)
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    assert weights[1].data_ptr() == weights[0].data_ptr() + weights[0].nbytes
    unpatch_unet(unet)
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 3


def test_unpatching_restores_every_class() -> None:
    unet = make_unet("sdxl")
    add_lora(unet)
    classes = [type(m) for m in unet.modules()]
    want = run(unet, "sdxl", torch.float64)
    patch_unet(patch_unet(unet))
    assert [type(m) for m in unet.modules()] != classes
    unpatch_unet(unet)
    assert [type(m) for m in unet.modules()] == classes
    got = run(unet, "sdxl", torch.float64)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_peft_files_are_the_same(tmp_path: Path) -> None:
    """An adapter trained on a patched UNet loads into a plain one, and the other way round."""
    from peft.utils import get_peft_model_state_dict

    unet = make_unet("sdxl")
    add_lora(unet)
    before = {k: v.clone() for k, v in get_peft_model_state_dict(unet).items()}
    patch_unet(unet)
    after = get_peft_model_state_dict(unet)
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    unet.save_lora_adapter(tmp_path)
    fresh = make_unet("sdxl")
    fresh.load_lora_adapter(
        tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors", local_files_only=True
    )
    latents, others = inputs("sdxl", torch.float64)
    torch.testing.assert_close(
        fresh(latents, **others).sample, unet(latents, **others).sample, rtol=1e-6, atol=1e-7
    )


@pytest.mark.filterwarnings("ignore")  # Dynamo's own
def test_one_block_compiles_in_one_graph() -> None:
    unet = patch_unet(make_unet("sdxl"))
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    resnet = unet.mid_block.resnets[0]
    tokens, context = torch.randn(2, 12, 32, dtype=torch.float64), torch.randn(2, 5, 24, dtype=torch.float64)
    image, time = torch.randn(2, 32, 4, 4, dtype=torch.float64), torch.randn(2, 64, dtype=torch.float64)
    for module, args in ((block, (tokens, None, context)), (resnet, (image, time))):
        first = args[0].requires_grad_()
        compiled = torch.compile(module, backend="aot_eager_decomp_partition", fullgraph=True)
        results = []
        for call in (module, compiled):
            out = call(*args)
            grads = torch.autograd.grad(out.square().sum(), [first, *module.parameters()])
            results.append((out, *grads))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_is_not_a_unet() -> None:
    with pytest.raises(TypeError, match=r"got a Linear, needs a diffusers UNet2DConditionModel"):
        patch_unet(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_importing_mapo_fast_stays_light() -> None:
    assert {"patch_unet", "unpatch_unet"} <= set(mapo_fast.__all__)
