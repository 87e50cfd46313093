"""Record what the modules of any PyTorch network give, diffusers' above all; needs no eridiff.

from trace_diffusers import recorded
with recorded(pipeline.transformer, "reference.safetensors"):
    pipeline("a fox at night", num_inference_steps=1)

eridiff diff mine.safetensors reference.safetensors --map flux
"""

import json
from contextlib import contextmanager

import torch
from safetensors.torch import save_file


def leaves(name, value):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(name if len(value) == 1 else f"{name}.{i}", item)


@contextmanager
def recorded(network, path, wanted=lambda name: True):
    """Inputs and outputs of every module's calls in the order of computation, as docs/traces.md of eridiff has them."""
    trace, counts, handles = {}, {}, []

    def keep(name, value, call):
        for leaf, tensor in leaves(name, value):
            if wanted(leaf):
                trace[f"{leaf}@{call}" if call else leaf] = tensor.detach().to("cpu", copy=True).contiguous()

    def watch(name, module):
        def before(_, args, kwargs):
            counts[name] = counts.get(name, -1) + 1
            for key, value in [*enumerate(args), *kwargs.items()]:
                keep(f"{name}:{key}", value, counts[name])

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _, args, output: keep(name, output, counts[name])))

    for name, module in network.named_modules():
        watch(name or "forward", module)
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
    save_file(trace, path, {"order": json.dumps(list(trace))})
