"""Record what the original code of Flux, Stable Diffusion 3.5 or SDXL computes; needs no eridiff.

from trace_original import recorded           # beside black-forest-labs/flux, Stability-AI/sd3.5, generative-models
with recorded(model, "reference.safetensors"):   # flux.model.Flux, mmditx.MMDiTX, sgm's UNetModel; an autoencoder
    model(...)

eridiff diff mine.safetensors reference.safetensors --map flux
"""

import json
import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from safetensors.torch import save_file


@contextmanager
def recorded(network, path, wanted=lambda name: True):
    """Inputs and outputs of modules, q, k and attention of each block, as docs/traces.md of eridiff has them."""
    trace, counts, running = {}, {}, []

    def keep(name, value):
        if isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                keep(name if len(value) == 1 else f"{name}.{i}", item)
        elif isinstance(value, torch.Tensor) and wanted(name):
            call = counts[name] = counts.get(name, -1) + 1
            trace[f"{name}@{call}" if call else name] = value.detach().to("cpu", copy=True).contiguous()

    def before(name, args, kwargs):
        running.append(name)
        for key, value in [*enumerate(args), *kwargs.items()]:
            keep(f"{name}:{key}", value)

    def after(output):
        keep(running.pop(), output)

    def kept(function, *names):
        def call(*args, **kwargs):
            value = function(*args, **kwargs)
            for name, item in zip(names, value if len(names) > 1 else [value], strict=True):
                keep(f"{running[-1]}.{name}", item)
            return value

        return call

    files = {sys.modules[type(m).__module__] for m in network.modules()}
    files |= {sys.modules[f.attention.__module__] for f in files if hasattr(f, "attention")}
    with ExitStack() as stack:
        for name, *gives in (["attention", "attention"], ["apply_rope", "q_rope", "k_rope"]):
            for file in filter(lambda f: callable(getattr(f, name, None)), files):
                stack.enter_context(patch.object(file, name, kept(getattr(file, name), *gives)))
        for path_in, module in network.named_modules():
            hook = lambda _, args, kwargs, n=path_in or "forward": before(n, args, kwargs)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(lambda _, args, output: after(output)).remove)
        yield trace
    save_file(trace, path, {"order": json.dumps(list(trace))})
