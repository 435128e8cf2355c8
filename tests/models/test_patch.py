"""The patched UNet against the plain one: the same numbers, the same names, less saved."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import mapo_fast
from mapo_fast import patch_unet, unpatch_unet
from mapo_fast.engine.layouts import apply_layout
from mapo_fast.util.errors import UserError
from tests.unets import DEEP, FAMILIES, inputs, make_unet, run

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


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_every_gradient_in_fp64(family: str) -> None:
    unet = make_unet(family, **DEEP)
    want = run(unet, family, torch.float64)
    assert len(want) == 2 + len(list(unet.parameters()))
    assert_same(run(patch_unet(unet), family, torch.float64), want)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["joint", "split"])
def test_gradient_checkpointing(layout: Any) -> None:
    unet = make_unet("sdxl")
    want = run(unet, "sdxl", torch.float64)
    apply_layout(patch_unet(unet), layout, gradient_checkpointing=True)
    assert_same(run(unet, "sdxl", torch.float64), want)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "prepare"), [(torch.float32, lambda unet: None), (torch.bfloat16, add_fp32_lora)]
)
def test_autocast(dtype: torch.dtype, prepare: Callable[[Any], object]) -> None:
    """The trainer's `bf16`: fp32 weights, or fp32 LoRA factors on a bf16 base, and bf16 arithmetic."""
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


# --- What wraps a module ---


def sample_of(unet: Any) -> Tensor:
    latents, others = inputs("sdxl", torch.float64)
    with torch.no_grad():
        return unet(latents, **others).sample  # type: ignore[no-any-return]


def kinds_of_modules(unet: Any) -> dict[str, list[str]]:
    """The names of all modules that are called with a tensor, by what they are called in their blocks."""
    kinds: dict[str, list[str]] = {}
    for name, module in unet.named_modules():
        if re.fullmatch(r"|(down|up)_blocks\.\d+", name) is None and not isinstance(module, nn.ModuleList):
            kinds.setdefault(
                re.sub(r"^.*(blocks|attentions|resnets|mid_block)\.(\d+\.)?", "", name), []
            ).append(name)
    return kinds


def own_forward(unet: Any, name: str, seen: list[tuple[str, Tensor, Tensor]]) -> Callable[[], None]:
    """Replace a module's `forward`, as LyCORIS and kohya's networks do."""
    module = unet.get_submodule(name)
    before = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = before(x, *args, **kwargs)
        seen.append((name, x, out))
        return out * 1.5 if isinstance(out, Tensor) else out

    module.forward = forward
    return lambda: delattr(module, "forward")


def forward_hook(unet: Any, name: str, seen: list[tuple[str, Tensor, Tensor]]) -> Callable[[], None]:
    def hook(module: Any, args: Any, out: Any) -> Any:
        seen.append((name, args[0], out))
        return out * 1.5 if isinstance(out, Tensor) else out

    return unet.get_submodule(name).register_forward_hook(hook).remove  # type: ignore[no-any-return]


def forward_pre_hook(unet: Any, name: str, seen: list[tuple[str, Tensor, Tensor]]) -> Callable[[], None]:
    def hook(module: Any, args: Any) -> Any:
        seen.append((name, args[0], args[0]))
        return (args[0] * 1.5, *args[1:])

    return unet.get_submodule(name).register_forward_pre_hook(hook).remove  # type: ignore[no-any-return]


def diffusers_hook(unet: Any, name: str, seen: list[tuple[str, Tensor, Tensor]]) -> Callable[[], None]:
    from diffusers.hooks import HookRegistry, ModelHook

    class Times(ModelHook):  # type: ignore[misc]
        def post_forward(self, module: Any, out: Any) -> Any:
            seen.append((name, *[out if isinstance(out, Tensor) else out[0]] * 2))
            return out * 1.5 if isinstance(out, Tensor) else out

    registry = HookRegistry.check_if_exists_or_initialize(unet.get_submodule(name))
    registry.register_hook(Times(), "times")
    return lambda: registry.remove_hook("times")


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [own_forward, forward_hook, forward_pre_hook, diffusers_hook])
def test_what_wraps_any_module_sees_and_changes_the_values_of_the_plain_unet(wrap: Any) -> None:
    """Wrapped after patching, one kind of module after the other; everything is as before when that ends."""
    unet = make_unet("sdxl")
    pair = unet, patch_unet(copy.deepcopy(unet))
    want = sample_of(unet)
    for kind, names in kinds_of_modules(unet).items():
        results = []
        for each in pair:
            seen: list[tuple[str, Tensor, Tensor]] = []
            removers = [wrap(each, name, seen) for name in names]
            results.append((sample_of(each), seen))
            for remove in removers:
                remove()
        (plain, of_plain), (fused, of_fused) = results
        assert [name for name, *_ in of_fused] == [name for name, *_ in of_plain], kind
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11, msg=lambda m, k=kind: f"{k}: {m}")
        for (name, *got), (_, *true) in zip(of_fused, of_plain, strict=True):
            for a, b in zip(got, true, strict=True):
                if isinstance(b, Tensor):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(sample_of(pair[1]), want, rtol=1e-9, atol=1e-12)
    unpatch_unet(pair[1])
    assert [type(m) for m in pair[1].modules()] == [type(m) for m in unet.modules()]
    assert torch.equal(sample_of(pair[1]), want)


@pytest.mark.slow
@pytest.mark.parametrize("patched_first", [False, True])
def test_adapters_that_replace_forwards_get_every_gradient(patched_first: bool) -> None:
    grads = []
    for patched in (False, True):
        unet = make_unet("sdxl")
        if patched and patched_first:
            patch_unet(unet)
        torch.manual_seed(3)
        adapters = nn.ModuleList()
        for module in [m for m in unet.modules() if isinstance(m, nn.Linear)]:
            down = nn.Linear(module.in_features, 2, bias=False, dtype=torch.float64)
            up = nn.Linear(2, module.out_features, bias=False, dtype=torch.float64)
            adapters.append(nn.Sequential(down, up))
            before, adapter = module.forward, adapters[-1]
            module.forward = lambda x, before=before, adapter=adapter: before(x) + adapter(x)
        if patched and not patched_first:
            patch_unet(unet)
        run(unet, "sdxl", torch.float64)
        grads.append({name: p.grad for name, p in adapters.named_parameters() if p.grad is not None})
    assert grads[0]
    assert_same(grads[1], grads[0])


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrized(module: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Half())


def pruned(module: Any) -> None:
    prune.l1_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]


def subclassed(module: Any) -> None:
    if type(module) is nn.Linear:
        module.__class__ = Twice


def weight_norm(module: Any) -> None:
    torch.nn.utils.weight_norm(module)


@pytest.mark.slow
@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("change", [parametrized, pruned, subclassed, weight_norm])
def test_layers_of_other_kinds_compute_what_they_compute(change: Any, patched_first: bool) -> None:
    unet = make_unet("sdxl")
    plain = copy.deepcopy(unet)
    if patched_first:
        patch_unet(unet)
    for each in (plain, unet):
        for module in list(each.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)) or (
                change is not weight_norm and isinstance(module, (nn.LayerNorm, nn.GroupNorm))
            ):
                change(module)
    if not patched_first:
        patch_unet(unet)
    want = sample_of(plain)
    torch.testing.assert_close(sample_of(unet), want, rtol=1e-9, atol=1e-11)


def test_torchs_global_hooks_see_every_module() -> None:
    unet = make_unet("sdxl")
    counts = []
    for each in (unet, patch_unet(copy.deepcopy(unet))):
        seen: list[str] = []
        names = {module: name for name, module in each.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, names=names, seen=seen: seen.append(names[module])
        )
        try:
            sample_of(each)
        finally:
            handle.remove()
        counts.append(seen)
    assert counts[1] == counts[0]


def test_an_activation_of_another_kind_stays() -> None:
    unet = patch_unet(make_unet("sdxl"))
    plain = make_unet("sdxl")
    for each in (unet, plain):
        each.mid_block.resnets[0].nonlinearity = nn.Mish()
        each.conv_act = nn.Mish()
        each.mid_block.attentions[0].transformer_blocks[0].norm2 = nn.Identity()
    torch.testing.assert_close(sample_of(unet), sample_of(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("call", [patch_unet, unpatch_unet])
def test_accelerates_hooks_are_refused_until_they_are_removed(call: Any) -> None:
    import accelerate

    unet = make_unet("sdxl")
    want = sample_of(unet)
    if call is unpatch_unet:
        patch_unet(unet)
    accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    torch.testing.assert_close(sample_of(unet), want, rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match=r"accelerate's hooks .* Remove them: pipe\.remove_all_hooks\(\)"):
        call(unet)
    accelerate.hooks.remove_hook_from_submodules(unet)
    call(unet)
    assert not any("forward" in vars(module) for module in unet.modules())
    torch.testing.assert_close(sample_of(unet), want, rtol=1e-9, atol=1e-12)
    assert torch.equal(sample_of(unpatch_unet(unet)), want)


def test_layerwise_casting_works_on_a_patched_unet() -> None:
    unet = make_unet("sdxl", dtype=torch.float32)
    latents, others = inputs("sdxl", torch.float32)
    samples = []
    for each in (unet, patch_unet(copy.deepcopy(unet))):
        each.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        with torch.no_grad():
            samples.append(each(latents, **others).sample)
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "adalora", "dora", "loha", "oft"])
def test_every_kind_of_adapter_computes_what_peft_computes(kind: str) -> None:
    import peft

    configs = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=list(ATTENTION), init_lora_weights=False),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=list(ATTENTION), use_dora=True),
        "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_modules=list(ATTENTION), total_step=9),
        "loha": lambda: peft.LoHaConfig(r=2, target_modules=list(ATTENTION), init_weights=False),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=list(ATTENTION)),
    }
    samples = []
    for patched in (False, True):
        unet = make_unet("sdxl")
        torch.manual_seed(3)
        model = peft.get_peft_model(unet, configs[kind]()).double()  # type: ignore[no-untyped-call]
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 10)
        samples.append(sample_of(patch_unet(unet) if patched else unet))
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_patched_unet_with_an_adapter_can_be_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no UNet was patched before, as in another process."""
    from mapo_fast.models import patch as fuse

    unet = make_unet("sdxl")
    add_lora(unet)
    want = sample_of(patch_unet(unet))
    data = pickle.dumps(unet)
    twins = [name for name in vars(fuse) if name in fuse._LORA]
    assert twins
    for name in twins:
        monkeypatch.delattr(fuse, name)
    for again in (pickle.loads(data), copy.deepcopy(unet)):
        torch.testing.assert_close(sample_of(again), want, rtol=1e-9, atol=1e-12)
        unpatch_unet(again)
        assert {type(m).__module__ for m in again.modules()}.isdisjoint({fuse.__name__})


# --- The same UNet otherwise ---


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
