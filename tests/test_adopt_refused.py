"""What cannot be followed on a trainer's network is named; what changes no value is let be."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from lycoris.modules import LokrModule
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from eridiff import load_lora
from eridiff.adopt import adopt
from eridiff.adopt.layers import Elsewhere, wrapped
from eridiff.blocks import checkpoint_blocks
from eridiff.errors import ConfigError, EridiffError
from eridiff.lora import attach_lora, inject_lora
from eridiff.models.flux import FluxConfig
from eridiff.trace.record import relative_l2
from eridiff.training import Sampler, averaged_weights
from tests import adapters, families, tiny
from tests.test_handing_in import under_the_originals_names
from tests.trainers import BOUND, FAMILIES, Family, small_unet, small_vae


def test_what_acts_on_whole_blocks_is_refused_by_name(family: Family) -> None:
    foreign = family.make()
    block = next(m for m in foreign.modules() if isinstance(m, nn.ModuleList))[0]
    name, kind = next(n for n, m in foreign.named_modules() if m is block), type(block).__name__
    adopted = adopt(foreign)

    def louder(*args: Any, **options: Any) -> Any:
        raise AssertionError("never called")

    block.forward = louder
    for refused in (adopted.refresh, lambda: adopt(foreign)):
        with pytest.raises(
            ConfigError, match=rf"'{name}' \({kind}\) has a forward of its own, from tests.test_adopt_refused, which"
        ):
            refused()
    del block.forward
    handles = [block.register_forward_hook(louder)]
    with pytest.raises(ConfigError, match=rf"'{name}' \({kind}\) has a forward hook, from tests.test_adopt_refused"):
        adopt(foreign)
    handles.pop().remove()
    handles.append(foreign.register_forward_pre_hook(louder))
    with pytest.raises(ConfigError, match=rf"the whole network \({type(foreign).__name__}\) has a forward hook"):
        adopt(foreign)
    handles.pop().remove()
    assert family.distance(adopt(foreign)) < BOUND


def test_an_attention_processor_that_nobody_knows_is_refused(family: Family) -> None:
    class Louder:
        def __call__(self, *args: Any, **options: Any) -> Any:
            raise AssertionError("never called")

    foreign = family.make()
    attention = next(m for m in foreign.modules() if hasattr(m, "processor"))
    attention.processor = Louder()
    with pytest.raises(
        ConfigError, match=r"\(\w*Attention\) has an attention processor, from tests.test_adopt_refused, which"
    ):
        adopt(foreign)


def test_bare_weights_that_are_one_matrix_here_have_to_be_copied() -> None:
    foreign = FAMILIES["flux"].make()
    attention = foreign.transformer_blocks[0].attn
    bare = nn.Module()
    bare.weight, bare.bias = attention.to_q.weight, attention.to_q.bias
    attention.to_q = bare
    with pytest.raises(
        ConfigError, match="'transformer_blocks.0.attn.to_q' has weights but no forward .* allow_copies=True"
    ):
        adopt(foreign)
    adopted = adopt(foreign, allow_copies=True)
    assert adopted.copied_bytes > 0
    adopted.release()
    with pytest.raises(ConfigError, match=r"and their copy was released: call refresh\(\) of what adopt returned"):
        adopted.network(*FAMILIES["flux"].inputs)


def test_what_changes_no_value_is_let_be(family: Family) -> None:
    """accelerate's mixed precision and placement, gradient checkpointing, compilation."""
    from accelerate import Accelerator
    from accelerate.hooks import CpuOffload, add_hook_to_module
    from accelerate.state import AcceleratorState

    foreign = family.make()
    foreign.enable_gradient_checkpointing()
    block = next(m for m in foreign.modules() if isinstance(m, nn.ModuleList))[0]
    with checkpoint_blocks(foreign):
        adopt(foreign)
    block.forward = torch.compile(block.forward)
    adopt(foreign)
    del block.forward
    block.compile()
    add_hook_to_module(block, CpuOffload("cpu"))
    AcceleratorState._reset_state(True)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(foreign)
    assert "forward" in vars(foreign) and "forward" in vars(block)
    with torch.no_grad():
        found, plain = (adopt(module).network(*family.inputs) for module in (prepared, family.make()))
    assert torch.equal(found, plain)


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": partial(torch.compile, backend="eager"),
    "checkpointed": checkpoint_wrapper,
    "both": lambda block: torch.compile(checkpoint_wrapper(block), backend="eager"),
}


@torch.compiler.set_stance("force_eager")  # what is compiled has names of its own; tracing it takes seconds
@pytest.mark.parametrize("wrap", WRAPS)
def test_torchs_wrappers_around_single_blocks_and_layers_are_seen_through(family: Family, wrap: str) -> None:
    """As accelerate compiles regions: the blocks of a list are exchanged for wrappers, which have names of their own."""
    foreign = family.make()
    adapters.kohya(foreign, family.targets)
    expected = family.distance(adopt(foreign))
    for blocks in [m for m in foreign.modules() if isinstance(m, nn.ModuleList)]:
        for i, block in enumerate(blocks):
            blocks[i] = WRAPS[wrap](block)
    adopted = adopt(foreign)
    assert family.distance(adopted) == expected < BOUND
    averages = {name: 0.5 * p.detach() for name, p in family.make().named_parameters()}
    live = family.ask(foreign).detach()
    with torch.no_grad(), averaged_weights(foreign, averages):
        adopted.refresh()
        assert family.distance(adopted) < BOUND < relative_l2(family.ask(foreign), live)
    wrapper = next(m for m in foreign.modules() if wrapped(m) is not None)
    wrapper.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="has a forward hook, from tests.test_adopt_refused"):
        adopted.refresh()


def test_a_wrapper_of_the_trainers_own_is_refused_as_it_may_act(family: Family) -> None:
    class Louder(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **options: Any) -> Any:
            raise AssertionError("never called")

    foreign = family.make()
    blocks = next(m for m in foreign.modules() if isinstance(m, nn.ModuleList))
    blocks[0] = Louder(blocks[0])
    with pytest.raises(ConfigError, match=r"^'\w+\.0\.module\.[\w.]+' is inside a wrapper that is not torch's own"):
        adopt(foreign)


def test_a_layer_that_does_not_take_our_dtype_is_named(family: Family) -> None:
    """A LoRA in float32 on a network in bfloat16, trained under autocast: it generates under autocast too."""
    foreign = family.make().bfloat16()
    adapters.kohya(foreign, family.targets).eval()
    adopted = adopt(foreign)
    inputs = [x.bfloat16() if isinstance(x, Tensor) and x.ndim > 2 else x for x in family.inputs]
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"\(Linear\) does not take torch.bfloat16: .*autocast=torch.bfloat16"),
    ):
        adopted.network(*[x.bfloat16() if isinstance(x, Tensor) else x for x in inputs])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_l2(adopted.network(*inputs), family.theirs(foreign, *inputs).sample) < 2e-2


def test_the_weight_of_a_layer_that_is_called_cannot_be_read(family: Family) -> None:
    foreign = family.make()
    adapters.kohya(foreign, family.targets)
    network = adopt(foreign).network
    called = [p for p in network.parameters() if isinstance(p.data, Elsewhere)]
    assert len(called) > 5 and all(p.device.type == "cpu" and p.dtype == torch.float32 for p in called)
    with pytest.raises(
        ConfigError, match="is called in the trainer's own module, so its weight can be neither read nor moved"
    ):
        called[0].sum()
    with pytest.raises(ConfigError, match="called in the trainer's own module"):
        network.double()


def test_eridiffs_lora_beside_an_adopted_network_acts_or_is_refused(family: Family, tmp_path: Path) -> None:
    foreign = family.make()
    adopted = adopt(foreign)
    with torch.no_grad():
        plain = adopted.network(*family.inputs)
        ours = inject_lora(adopted.network, 2)
        for p in ours.parameters():
            nn.init.normal_(p, std=0.1)
        alone = adopted.network(*family.inputs)
        theirs = adapters.kohya(foreign, family.targets).eval()
        adopted.refresh()
        both = adopted.network(*family.inputs)
        theirs.set_multiplier(0)
        assert relative_l2(adopted.network(*family.inputs), alone) < BOUND
        assert relative_l2(alone, plain) > 1e-3 and relative_l2(both, alone) > 1e-3
        ours.detach()
    lokr = nn.ModuleDict(
        {
            "lora": LokrModule(
                "x",
                dict(adapters.chosen(foreign, family.targets))[theirs.names[0]],
                1.0,
                2,
                factor=2,
                weight_decompose=True,
            )
        }
    )
    name = adapters.renamed("lycoris_")(theirs.names[0])
    save_file(
        {f"{name}.{key}": t.contiguous() for key, t in lokr["lora"].state_dict().items()}, tmp_path / "dora.safetensors"
    )
    with torch.no_grad(), pytest.raises(ConfigError, match="called in the trainer's own module"):
        attach_lora(adopted.network, load_lora(tmp_path / "dora.safetensors", adopted.network))
        adopted.network(*family.inputs)


def test_an_adapter_that_is_set_for_another_batch_is_named(family: Family) -> None:
    """ai-toolkit's are given a multiplier for each row; its network then gives no row at all."""
    foreign = family.make()
    layer = next(m for name, m in foreign.named_modules() if name.endswith("to_k"))
    before = layer.forward
    layer.forward = lambda x: before(x)[:0]
    with torch.no_grad(), pytest.raises(ConfigError, match=r"to_k' \(Linear\) gave \[0, .*set for another batch"):
        adopt(foreign).network(*family.inputs)


def test_a_layer_that_has_lost_its_weight_is_named(family: Family) -> None:
    foreign = family.make()
    adopted = adopt(foreign)
    name = next(name for name, m in foreign.named_modules() if name.endswith("to_k"))
    del foreign.get_submodule(name).weight
    with pytest.raises(ConfigError, match=rf"'{name}.weight' is no longer in this {type(foreign).__name__}"):
        adopted.refresh()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: small_vae(norm_num_groups=16),
            "norm_num_groups is 16, and an autoencoder here computes with 32 alone",
        ),
        (lambda: small_vae(act_fn="relu"), "act_fn is 'relu'"),
        (lambda: small_unet(act_fn="gelu"), "act_fn is 'gelu', and an SDXL here computes with 'silu' alone"),
        (lambda: small_unet(freq_shift=1), "freq_shift is 1"),
        (lambda: small_unet(flip_sin_to_cos=False), "flip_sin_to_cos is False"),
        (lambda: small_unet(mid_block_scale_factor=2), "mid_block_scale_factor is 2"),
        (lambda: small_unet(norm_eps=1e-3), "norm_eps is 0.001"),
    ],
)
def test_settings_that_leave_no_trace_in_shapes_are_compared(make: Any, says: str) -> None:
    """They change the trainer's numbers, and the networks here have one value of each."""
    with pytest.raises(ConfigError, match=says):
        adopt(make())


def stating(module: Any, **config: Any) -> Any:
    """With a configuration that says something else than its tensors."""
    module.register_to_config(**config)
    return module


def without_bias(module: Any) -> Any:
    module.transformer_blocks[0].attn.to_q.register_parameter("bias", None)
    return module


def inside(prefix: str, module: nn.Module) -> nn.Module:
    """As a checkpoint of a whole model has it, with another tensor beside it."""
    whole = nn.Module()
    owner = whole
    for part in prefix.split("."):
        owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    for name, child in module.named_children():
        owner.add_module(name, child)
    whole.add_module("other", nn.Linear(2, 2))
    return whole


FLUX = FAMILIES["flux"].make
MODULES: dict[str, tuple[Callable[[], Any], str]] = {
    "sizes of heads": (lambda: stating(FLUX(), axes_dims_rope=(4, 6)), r"'FluxTransformer2DModel': its configuration says axes_dims_rope \[4, 6\], three even"),
    "no sizes of heads": (lambda: stating(FLUX(), axes_dims_rope=None), "heads of 16 features are in no published Flux; give axes_dims_rope in its configuration"),
    "depth": (lambda: stating(FLUX(), num_layers=3), r"'FluxTransformer2DModel': its configuration says num_layers 3, the tensors say \d$"),
    "heads": (lambda: stating(small_unet(), attention_head_dim=(3, 3, 3)), r"'UNet2DConditionModel': its configuration says \[3, 3, 3\] heads"),
    "heads that are not numbers": (lambda: stating(small_unet(), attention_head_dim="many"), "'UNet2DConditionModel': its configuration says the heads 'many', not their numbers"),
    "depths": (lambda: stating(small_unet(), transformer_layers_per_block=(2, 2, 2)), "its configuration says transformer_layers_per_block"),
    "scale": (lambda: stating(small_vae(), scaling_factor="large"), "'AutoencoderKL': its configuration says scaling_factor 'large', not a number"),
    "positions": (lambda: oblong(FAMILIES["sd3"].make()), r"'SD3Transformer2DModel': its table of \d+ positions is not a square$"),
    "a lost bias": (lambda: without_bias(FLUX()), "'FluxTransformer2DModel': 1 tensors are missing, the first is 'transformer_blocks.0.attn.to_q.bias'"),
    "a part of another module": (lambda: inside("model.diffusion_model", original_flux()), "the network is inside this Module, and not all of it: adopt its 'model.diffusion_model'$"),
    "a text encoder": (tiny.clip_module, "'CLIPTextModelWithProjection' holds a CLIP text encoder, not a Flux or .* or an autoencoder$"),
}  # fmt: skip


def original_flux() -> nn.Module:
    return under_the_originals_names(tiny.flux(FluxConfig(64, 64, 8, 12, 128, 1, 4.0, 1, 1)), "flux")


def oblong(module: Any) -> Any:
    module.pos_embed.pos_embed = module.pos_embed.pos_embed[:, :-1]
    return module


@pytest.mark.parametrize("fault", MODULES)
def test_a_module_that_is_refused_is_not_spoken_of_as_a_file(fault: str) -> None:
    make, says = MODULES[fault]
    with pytest.raises(EridiffError, match=says) as error:
        adopt(make())
    assert not re.search(r"file|download|json|metadata|allow_unknown|option|two models", str(error.value))


@pytest.mark.parametrize(("heads", "width"), [(3, 64), (3, 48), (4, 32), (5, 16)])
def test_an_sd3_without_a_norm_has_the_heads_of_its_configuration(heads: int, width: int) -> None:
    """Their number leaves no trace in shapes there."""
    family, hidden = FAMILIES["sd3"], heads * width
    foreign: Any = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=width, num_attention_heads=heads, joint_attention_dim=12,
        caption_projection_dim=hidden, pooled_projection_dim=8, pos_embed_max_size=6, out_channels=16,
    )  # fmt: skip
    adopted = adopt(tiny.scaled(foreign))
    assert adopted.network.config.heads == heads and family.distance(adopted) < BOUND  # type: ignore[union-attr]


def test_the_network_in_training_is_not_its_own_average(tmp_path: Path) -> None:
    model = families.inference("flux")
    with pytest.raises(ConfigError, match="ema is the network that is trained"):
        Sampler(model, {"prompts": ["a"], "out": str(tmp_path)}, ema=model.network)
