"""How published variants are sampled when nothing is said, and what each text encoder reads of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from eridiff.errors import ConfigError
from eridiff.request import Text


@dataclass(frozen=True)
class Defaults:
    """How a published variant is sampled when nothing is said; families add what they need."""

    steps: int = 28
    cfg_scale: float = 1.0
    sampler: str = "euler"
    width: int = 1024
    height: int = 1024


def spoken(prompts: Sequence[Text], encoder: str, encoders: Sequence[str]) -> list[str]:
    """What one of a model's text encoders reads; raises ConfigError for a prompt that names another encoder."""
    for prompt in prompts:
        wrong = [] if isinstance(prompt, str) else [name for name in prompt if name not in encoders]
        if wrong or not isinstance(prompt, str) and not prompt:
            raise ConfigError(
                f"a prompt for each encoder names {', '.join(encoders)}, not {wrong[0] if wrong else 'none'}"
            )
    return [p if isinstance(p, str) else p.get(encoder, next(iter(p.values()))) for p in prompts]
