"""A golden case of any sizes, names and folder is run by what its case.json says; the expected values are from plain calls."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from eridiff.models.autoencoder import Autoencoder, AutoencoderConfig
from eridiff.models.flux import Flux, FluxConfig, patchify, position_ids, unpatchify
from eridiff.models.mmdit import MMDiT, MMDiTConfig
from eridiff.models.unet import UNet, UNetConfig, size_vector
from eridiff.schedulers.discrete import alphas_cumprod, sigma_table
from eridiff.schedulers.flow_match import flux_schedule
from eridiff.trace.cases import inputs_of, weights_of
from eridiff.trace.hashfill import parameter, uniform
from eridiff.weights.detect import sizes_of
from eridiff.weights.keymap import key_map
from tests.golden import RUNNERS, run_case
from tests.golden.case import Float32Sinusoid, GoldenFrequencies

SALT = "swan"
Case = dict[str, Any]
Built = tuple[Case, dict[str, Tensor]]
CASES: dict[str, Callable[[Path], Built]] = {}


def case_of(kind: str) -> Callable[[Callable[[Path], Built]], Callable[[Path], Built]]:
    return lambda build: CASES.setdefault(kind, build)


def filled(network: str, module: Any, layout: str = "original", prefix: str = "") -> list[list[Any]]:
    """Gives a module hashfill's weights by the names of a layout, in float64; the list of these names for case.json."""
    table, sizes = key_map(network).layouts[layout], {}
    if network in ("flux", "mmdit", "unet", "vae"):
        sizes = sizes_of(module.config)
    state = {n: t for n, t in module.double().eval().state_dict().items() if n != "encoder.embed_tokens.weight"}
    foreign = table.to_foreign(state, sizes)
    foreign.pop("encoder.embed_tokens.weight", None)  # T5's second name of the embedding
    parameters = [[prefix + name, list(t.shape)] for name, t in foreign.items()]
    tensors = weights_of({"parameters": parameters, "salt": SALT, "overrides": []})
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for entry in table.entries(shapes, sizes):
        state[entry.native] = entry.read(
            [tensors[prefix + n] for n in entry.foreign if prefix + n in tensors], shapes[entry.native]
        )
    module.load_state_dict(state, strict=False)
    module.requires_grad_(False)
    return parameters


def given(**shapes: tuple[int, ...] | list[Any]) -> list[dict[str, Any]]:
    """Inputs of case.json: a tuple is a shape, a list the values."""
    return [
        {"name": name, "shape": list(v), "scale": 2.0} if isinstance(v, tuple) else {"name": name, "values": v}
        for name, v in shapes.items()
    ]


def described(inputs: list[dict[str, Any]], **facts: Any) -> tuple[Case, dict[str, Tensor]]:
    case = {"salt": SALT, "overrides": [], "inputs": inputs, **facts}
    return case, inputs_of(case)


def flux(**changes: Any) -> tuple[Flux, Case]:
    config = FluxConfig(
        in_channels=24, out_channels=24, pooled_width=10, text_width=14, hidden=40, heads=2, mlp_ratio=2.0, double_depth=1,
        single_depth=2, rope_axes=(4, 6, 10), theta=500, **changes,
    )  # fmt: skip
    network = Flux(config)
    facts = {"axes_dim": [4, 6, 10], "theta": 500, "num_heads": 2, "guidance_embed": config.guidance}
    return network, {"parameters": filled("flux", network), "config": facts}


@case_of("flux")
def one_flux(_: Path) -> Built:
    network, said = flux()
    inputs = given(img=(1, 3 * 4 + 2, 24), txt=(1, 4, 14), y=(1, 10), timesteps=[0.625], guidance=[2.0])
    case, x = described(inputs, **said, grid=[3, 4], reference_grid=[1, 2], intermediates=["text_in", "out"])
    ids = torch.cat([position_ids((3, 4)), position_ids((1, 2), index=1)])
    out = network(x["img"], x["txt"], x["y"], x["timesteps"], guidance=x["guidance"], ids=ids)
    return case, {"text_in": network.text_in(x["txt"]), "out": out}


@case_of("flux-trajectory")
def flux_trajectory(_: Path) -> Built:
    network, said = flux(guidance=False)
    case, x = described(given(noise=(2, 6, 4, 10), txt=(2, 3, 14), y=(2, 10)), **said, steps=3, shift=True, guidance=0)
    sigmas, latents, expected = flux_schedule(3, 10).sigmas, patchify(x["noise"]), {}
    for i in range(3):
        velocity = network(latents, x["txt"], x["y"], sigmas[i].repeat(2), (2, 5))
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
        expected |= {f"velocity.{i}": velocity, f"latents.packed.{i + 1}": latents}
    return case, expected | {"out": unpatchify(latents, (2, 5))}


def mmdit() -> tuple[MMDiT, Case]:
    network = MMDiT(
        MMDiTConfig(
            in_channels=6, out_channels=6, pooled_width=10, text_width=14, hidden=48, heads=3, mlp_ratio=4.0, depth=3,
            table_side=5, dual_blocks=(1,),
        )
    )  # fmt: skip
    facts = {"depth": 3, "num_heads": 3, "pos_embed_max_size": 5, "qk_norm": "rms", "dual_attention_layers": [1]}
    return network, {"parameters": filled("mmdit", network), "config": facts}


@case_of("mmdit")
def one_mmdit(_: Path) -> Built:
    network, said = mmdit()
    case, x = described(given(x=(1, 6, 8, 4), t=[310.0], context=(1, 4, 14), y=(1, 10)), **said)
    with Float32Sinusoid():
        output = network(x["x"], x["context"], x["y"], x["t"] / 1000)
    return case, {"output": output, "context_embedder": network.text_in(x["context"])}


def pairs(rows: int) -> dict[str, tuple[int, ...]]:
    return {n + mark: (rows, *s) for n, s in (("context", (4, 14)), ("y", (10,))) for mark in ("", "_negative")}


@case_of("mmdit-skip-layers")
def skip_layers(_: Path) -> Built:
    network, said = mmdit()
    inputs = given(x=(2, 6, 6, 4), t=[640.0, 25.0], **pairs(2))
    case, x = described(inputs, **said, cfg=3.0, slg_scale=1.5, skip_blocks=[0, 2])
    with Float32Sinusoid():
        times = x["t"] / 1000
        output = network(x["x"], x["context"], x["y"], times)
        negative = network(x["x"], x["context_negative"], x["y_negative"], times)
        skipped = network(x["x"], x["context"], x["y"], times, skip_blocks=[0, 2])
    guided = negative + 3.0 * (output - negative) + 1.5 * (output - skipped)
    return case, {"output": output, "output.negative": negative, "output.skip_0_2": skipped, "guided": guided}


@case_of("mmdit-trajectories")
def mmdit_trajectory(_: Path) -> Built:
    network, said = mmdit()
    run = {"name": "late", "sampler": "euler", "steps": 2, "cfg": 3.0, "denoise": 0.5}
    case, x = described(
        given(noise=(2, 6, 6, 4), init_latent=(2, 6, 6, 4), **pairs(2)), **said, scale_factor=0.5, shift_factor=0.25,
        runs=[run],
    )  # fmt: skip
    sigmas = torch.tensor([0.75, 0.5, 0.0], dtype=torch.float64)
    latents = 0.75 * x["noise"] + 0.25 * x["init_latent"]
    expected = {"late.sigmas": sigmas, "late.x_start": latents}
    for i in range(2):
        with Float32Sinusoid():
            positive = network(latents, x["context"], x["y"], sigmas[i].repeat(2))
            negative = network(latents, x["context_negative"], x["y_negative"], sigmas[i].repeat(2))
        velocity = negative + 3.0 * (positive - negative)
        expected[f"late.denoised.{i}"] = latents - sigmas[i] * velocity
        latents = expected[f"late.x.{i}"] = latents + (sigmas[i + 1] - sigmas[i]) * velocity
    return case, expected | {"late.latent_out": latents / 0.5 + 0.25}


def unet(channels: int = 32) -> tuple[UNet, Case]:
    config = UNetConfig(
        in_channels=3, out_channels=3, channels=channels, channel_multipliers=(1, 2), transformer_depths=(0, 1), middle_depth=1,
        head_width=16, text_width=14, vector_width=10,
    )  # fmt: skip
    network = UNet(config)
    facts = {"num_head_channels": 16, "channel_mult": [1, 2], "context_dim": 14, "adm_in_channels": 10}
    return network, {"parameters": filled("unet", network), "config": facts, "tolerance": {"float32": 1e-4}}


@case_of("unet")
def one_unet(_: Path) -> Built:
    network, said = unet()
    case, x = described(given(x=(1, 3, 4, 6), timesteps=[400.0], context=(1, 4, 14), y=(1, 10)), **said)
    places = {
        "input_blocks.0": network.conv_in, "input_blocks.5": network.down[1].transformer[1],
        "input_blocks.3": network.down[0].downsample, "output_blocks.2": network.up[1].upsample,
        "output_blocks.1": network.up[1].transformer[1], "output_blocks.3": network.up[0].residual[0], "middle_block.0": network.middle.residual[0],
    }  # fmt: skip
    expected: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: expected.update({name: out.clone()}))
        for name, module in places.items()
    ]
    expected["output"] = network(x["x"], x["context"], x["y"], x["timesteps"])
    for hook in hooks:
        hook.remove()
    with Float32Sinusoid():
        expected["output.sinusoid_float32"] = network(x["x"], x["context"], x["y"], x["timesteps"])
    return case, expected


def deterministic_runs(ask: Callable[[Tensor, float, str], Tensor], x: dict[str, Tensor]) -> tuple[Case, dict[str, Tensor]]:  # fmt: skip
    """Euler with guidance, the last steps of one from an image; DDIM by strides to pure noise's other end."""
    alphas, noise, picture = alphas_cumprod(), x["noise"], x["image_latents"]
    sigmas = torch.cat([sigma_table(alphas)[[749, 499, 249]], torch.zeros(1, dtype=torch.float64)])
    latents = picture + sigmas[0] * noise
    euler, clean = [latents], []
    for i, t in enumerate((749.0, 499.0, 249.0)):
        scaled = latents / (1 + sigmas[i] ** 2).sqrt()
        positive, negative = ask(scaled, t, "cond"), ask(scaled, t, "uncond")
        output = negative + 2.0 * (positive - negative)
        clean.append(latents - sigmas[i] * output)
        latents = latents + (sigmas[i + 1] - sigmas[i]) * output
        euler.append(latents)
    roots = alphas_cumprod(zero_terminal_snr=True).sqrt()
    latents, ddim = noise, [noise]
    for t in (999, 499):
        output = ask(latents, float(t), "cond")
        a, b = float(roots[t]), float((1 - roots[t] ** 2).sqrt())
        predicted, rest, end = a * latents - b * output, b * latents + a * output, max(t - 498, 0)
        latents = roots[end] * predicted + (1 - roots[end] ** 2).sqrt() * rest
        ddim.append(latents)
    facts = {
        "here": {
            "sampler": "euler", "steps": 4, "first": 1, "table": {"places": "trailing"}, "prediction": "epsilon",
            "zero_snr": False, "exploding": True, "guidance": 2.0, "timesteps": [749.0, 499.0, 249.0],
        },
        "there": {
            "sampler": "ddim", "steps": 2, "table": {"places": "trailing"}, "prediction": "v", "zero_snr": True,
            "exploding": False, "guidance": 1, "stride": 498, "timesteps": [999.0, 499.0],
        },
    }  # fmt: skip
    tensors = {"here/x": euler, "here/denoised": clean, "there/x": ddim}
    return facts, {name: torch.stack(rows) for name, rows in tensors.items()}


NOISES = {f"noise.{i}": (1, 3, 4, 6) for i in range(4)} | {"noise": (1, 3, 4, 6), "image_latents": (1, 3, 4, 6)}


@case_of("unet-trajectories")
def unet_trajectories(_: Path) -> Built:
    network, said = unet()
    texts = {f"{p}.{n}": s for p in ("cond", "uncond") for n, s in (("context", (1, 4, 14)), ("y", (1, 10)))}
    case, x = described(given(**NOISES, **texts), **said)

    def ask(latents: Tensor, t: float, prompt: str) -> Tensor:
        return network(latents, x[f"{prompt}.context"], x[f"{prompt}.y"], torch.tensor([t], dtype=torch.float64))

    case["trajectories"], expected = deterministic_runs(ask, x)
    return case, expected


@case_of("formula-trajectories")
def formula_trajectories(_: Path) -> Built:
    said = {"kept": 0.5, "added": 0.25, "period": 100, "cond": 0.75, "uncond": -0.25}
    case, x = described(given(**NOISES), formula=said)
    matrix = torch.from_numpy(parameter("W", (3, 3), SALT))
    u, v = (torch.from_numpy(uniform(name, (3,), SALT)) for name in ("u", "v"))

    def ask(latents: Tensor, t: float, prompt: str) -> Tensor:
        by_pixel = latents.movedim(1, -1)
        inner = by_pixel @ matrix.T + u * math.cos(t / 100) + v * said[prompt]
        return (0.5 * by_pixel + 0.25 * inner.tanh()).movedim(-1, 1)

    case["trajectories"], expected = deterministic_runs(ask, x)
    return case, expected


@case_of("vae")
def autoencoder(_: Path) -> Built:
    network = Autoencoder(
        AutoencoderConfig(
            channels=32, channel_multipliers=(1, 2), residual_blocks=1, latent_channels=3, scale=0.5, shift=0.25
        )
    )
    case, x = described(
        given(image=(2, 3, 4, 8), latents=(2, 3, 2, 4), noise=(2, 3, 2, 4)),
        parameters=filled("vae", network), config={"scale_factor": 0.5, "shift_factor": 0.25},
    )  # fmt: skip
    mean, log_variance = network.moments(x["image"])
    return case, {
        "encoder.conv_in": network.encoder.conv_in(x["image"]),
        "moments": torch.cat([mean, log_variance], dim=1), "mode": mean, "latents.mode": (mean - 0.25) * 0.5,
        "latents.sample": (mean + (log_variance / 2).exp() * x["noise"] - 0.25) * 0.5,
        "decoded": network.decoder(x["latents"] / 0.5 + 0.25),
    }  # fmt: skip


@case_of("size-vector")
def vector(_: Path) -> Built:
    inputs = given(short=(2, 5), numbers=[[3, 7], [40, 0]])
    case, x = described(inputs, vectors={"small": ["short", "numbers"]})
    made = size_vector(x["short"], x["numbers"].double())
    return case, {"small.vector": made, "small.vector.float32": made.float()}


def clip(network: str, layout: str, prefix: str = "") -> tuple[Any, dict[str, Any], list[list[Any]]]:
    """Of 9 positions and 20 tokens, whose 13 is the end token."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "hidden_act": "quick_gelu" if network == "clip" else "gelu"}
    module = CLIPTextModelWithProjection(
        CLIPTextConfig(
            **sizes, vocab_size=20, intermediate_size=24, projection_dim=16, num_hidden_layers=3, max_position_embeddings=9,
            bos_token_id=0, eos_token_id=13,
        )
    )  # fmt: skip
    return module, {**sizes, "vocab_size": 20, "end_token": 13}, filled(network, module, layout, prefix)


IDS = [[12, 4, 15, 13, 13, 0, 0, 0, 0], [12, 1, 2, 3, 4, 5, 6, 7, 13]]
ENDS = [3, 8]  # the first end token of each row


def clip_states(module: Any, ids: list[list[int]]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # in which transformers 4 makes CLIP's causal mask
    try:
        found = module(input_ids=torch.tensor(ids), output_hidden_states=True)
    finally:
        torch.set_default_dtype(before)
    pooled = found.last_hidden_state[range(len(ids)), ENDS[: len(ids)]]
    return list(found.hidden_states), found.last_hidden_state, pooled, module.text_projection(pooled)


@case_of("clip")
def one_clip(_: Path, kind: str = "clip", layout: str = "huggingface") -> Built:
    module, config, parameters = clip(kind, layout)
    case, _x = described([{"name": "ids", "values": IDS}], config=config, parameters=parameters)
    hidden, last, pooled, projected = clip_states(module, IDS)
    return case, {"hidden.0": hidden[0], "hidden.2": hidden[2], "last": last, "pooled": pooled, "projected": projected}


@case_of("clip_g")
def one_clip_g(folder: Path) -> Built:
    return one_clip(folder, "clip_g", "openclip")


def t5(prefix: str = "", width: int = 16) -> tuple[Any, list[list[Any]]]:
    module = T5EncoderModel(
        T5Config(
            vocab_size=30, d_model=width, d_kv=4, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=8,
        )
    )  # fmt: skip
    parameters = filled("t5", module, "huggingface", prefix)
    module.encoder.embed_tokens.weight = module.shared.weight
    for layer in module.modules():
        if type(layer).__name__ == "T5LayerNorm":  # with the mean square in float64, as in the reference

            def norm(x: Tensor, own: nn.Module = layer) -> Tensor:
                return F.rms_norm(x, x.shape[-1:], own.weight, own.variance_epsilon)  # type: ignore[arg-type]

            layer.forward = norm
    return module, parameters


@case_of("t5")
def one_t5(_: Path) -> Built:
    module, parameters = t5()
    ids = [[5, 29, 3, 1, 0, 0, 0], [7, 7, 2, 11, 23, 17, 1]]
    case, x = described([{"name": "ids", "values": ids}], config={"vocab_size": 30}, parameters=parameters)
    return case, {"output": module(input_ids=x["ids"]).last_hidden_state}


@case_of("sdxl-text")
def sdxl_text(_: Path) -> Built:
    first, own, mine = clip("clip", "huggingface", "conditioner.embedders.0.transformer.")
    second, other, theirs = clip("clip_g", "openclip", "conditioner.embedders.1.model.")
    numbers = [[64, 32], [16, 8]]
    case, _x = described(
        [{"name": n, "values": v} for n, v in (("ids.clip_l", IDS), ("ids.open_clip", IDS), ("sizes", numbers))],
        config={"clip_l": own, "clip_g": other, "size_embed_dim": 6}, parameters=mine + theirs,
    )  # fmt: skip
    (a, last, _p, _q), (b, g_last, _r, pooled) = clip_states(first, IDS), clip_states(second, IDS)
    angles = torch.tensor(numbers).double()[..., None] * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    sizes = torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)
    return case, {
        "context": torch.cat([a[-2], b[-2]], dim=2), "pooled": pooled, "vector": torch.cat([pooled, sizes], dim=1),
        "size_embedding": sizes, "clip_l.last_hidden_state": last, "open_clip.embedding": b[0],
        "open_clip.ln_final": g_last, "open_clip.penultimate": b[-2],
        **{f"clip_l.hidden.{i}": state for i, state in enumerate(a)},
        **{f"open_clip.block.{i}": state for i, state in enumerate(b[1:])},
    }  # fmt: skip


@case_of("sd3-text")
def sd3_text(_: Path) -> Built:
    first, own, one = clip("clip", "huggingface", "text_encoders.clip_l.transformer.")
    second, other, two = clip("clip_g", "huggingface", "text_encoders.clip_g.transformer.")
    third, three = t5("text_encoders.t5xxl.transformer.", 40)
    for network in (first, second, third):  # rounded to float32, as the case's file is
        for weight in network.parameters():
            weight.copy_(weight.float())
    t5_ids = [5, 9, 1, 0, 0]
    ids = {name: {"l": IDS[i], "g": IDS[i], "t5": t5_ids} for i, name in enumerate(("shown", "hidden"))}
    config = {"clip_l": own, "clip_g": other, "t5xxl": {"vocab_size": 30}}
    case, _x = described([], config=config, parameters=one + two + three, token_ids=ids)
    tokens, expected = third(input_ids=torch.tensor([t5_ids])).last_hidden_state, {}
    (a, last, _p, pooled), (b, g_last, before, projected) = clip_states(first, IDS), clip_states(second, IDS)
    for i, mark in enumerate(("", "hidden.")):
        states = F.pad(torch.cat([a[-2][i], b[-2][i]], dim=1), (0, 40 - 32))
        expected[f"{mark}context"] = torch.cat([states[None], tokens], dim=1)
        expected[f"{mark}pooled"] = torch.cat([pooled[i], projected[i]])[None]
    expected |= {"clip_l.layers.1": a[2][:1], "clip_g.layers.2": b[3][:1], "clip_l.last_hidden": last[:1]}
    return case, expected | {"clip_g.last_hidden": g_last[:1], "clip_g.pooled_before_projection": before[:1]}


def lora(folder: Path, case: Case, base: str) -> Built:
    """A LoRA of rank 3 on one weight matrix."""
    matrix = weights_of(case)[base]
    rows, columns = matrix.shape
    down, up = (torch.from_numpy(uniform(n, s, SALT)).float() for n, s in (("down", (3, columns)), ("up", (rows, 3))))
    key = f"diffusion_model.{base.removesuffix('.weight')}"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(6.0)}
    save_file(tensors, folder / "lora.safetensors")
    change = 2.0 * up.double() @ down.double()
    size = float(change.norm() / matrix.norm())
    module = {"key": key, "kind": "lora", "rank": 3, "alpha": 6, "scale": 2.0, "dw_over_w": size}
    half = {"name": "half", "scale": 0.5, "dora": "peft"}
    save_file({base: matrix + change / 2}, folder / "expected.half.safetensors")
    facts = {"modules": [module], "alpha_is_rank": False, "at_scales": [half], "tolerance": {"value": 1e-6}}
    return case | facts, {base: matrix + change}


@case_of("flux-lora")
def flux_lora(folder: Path) -> Built:
    _, said = flux()
    inputs = given(img=(1, 8, 24), txt=(1, 3, 14), y=(1, 10), timesteps=[0.5], guidance=[3.0])
    return lora(folder, described(inputs, **said, grid=[2, 4])[0], "double_blocks.0.img_attn.qkv.weight")


@case_of("mmdit-lora")
def mmdit_lora(folder: Path) -> Built:
    _, said = mmdit()
    inputs = given(x=(1, 6, 4, 6), t=[500.0], context=(1, 4, 14), y=(1, 10))
    return lora(folder, described(inputs, **said)[0], "joint_blocks.1.x_block.attn.qkv.weight")


@case_of("unet-lora")
def unet_lora(folder: Path) -> Built:
    with patch("eridiff.models.unet.group_norm", lambda channels, eps=1e-5: nn.GroupNorm(8, channels, eps=eps)):
        _, said = unet(channels=16)
    said["config"]["norm_groups"] = 8
    inputs = given(x=(1, 3, 4, 6), timesteps=[500.0], context=(1, 4, 14), y=(1, 10))
    return lora(folder, described(inputs, **said)[0], "middle_block.1.transformer_blocks.0.attn2.to_q.weight")


def test_there_is_a_case_of_every_kind() -> None:
    assert CASES.keys() == RUNNERS.keys()


@pytest.mark.parametrize("kind", CASES)
def test_a_case_runs_by_what_it_says(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    with torch.no_grad(), GoldenFrequencies():
        case, expected = CASES[kind](folder)
    (folder / "case.json").write_text(json.dumps({"case": "mine", "kind": kind, **case}))
    save(expected, folder)
    rows = run_case(folder)
    assert {row.dtype for row in rows} == {"float64", "float32"} and {row.case for row in rows} == {"mine"}
    assert [row for row in rows if not row.passed] == []
    checked = {name for name in expected if not name.endswith((".sigmas", ".float32"))}  # a run begins with its sigmas
    for name in checked:
        expected[name][-1] += 0.01 * expected[name][-1].abs().max()
    save(expected, folder)
    wrong = {about(row.name) for row in run_case(folder, (torch.float64,)) if not row.passed}
    assert checked - wrong == set()


def about(row: str) -> str:
    """The stored tensor that a row compares."""
    name = row.removeprefix("merged ").partition(",")[0]
    return name.rpartition(".")[0] if "/" in name else name  # of a step


def save(expected: dict[str, Tensor], folder: Path) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors")


@pytest.mark.parametrize(
    ("case", "says"),
    [({"kind": "tokenizers"}, "does not know: tokenizers"), ({"case": "flux-dev-tiny"}, "does not know: None")],
)
def test_a_case_of_no_known_kind_is_refused_whatever_its_name(case: Case, says: str, tmp_path: Path) -> None:
    folder = tmp_path / "flux-dev-tiny"
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps(case))
    with pytest.raises(ValueError, match="flux-dev-tiny holds no expected.safetensors"):
        run_case(folder)
    save({}, folder)
    with pytest.raises(ValueError, match=says):
        run_case(folder)
