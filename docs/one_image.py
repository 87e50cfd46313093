"""The tables and images of docs/numbers.md, by the built-in model: `python docs/one_image.py`; a test runs it.

A table is between `<!-- NAME -->` and `<!-- end -->`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import eridiff
from eridiff.images import to_images
from eridiff.inference import DiffusionInference, Step
from eridiff.trace import record

DOCUMENT = Path(__file__).parent / "numbers.md"
FOLDER = Path(__file__).parent / "images"
PROMPT, SEED = "a swan on mars", 7
STEP = 4  # whose tensors and attention are shown
BLOCK = "single_blocks.2"  # whose attention is shown
ROWS = {  # name in the recording -> what it is
    "prepare:text": "the prompt by T5, `[B, L, text_width]`",
    "prepare:pooled": "the prompt by CLIP, one vector",
    "conditioning_vector": "time, guidance and pooled prompt, for all steps",
    "text_in": "the text in the width of the network",
    "step:latents": "the latents as tokens",
    "image_in": "the tokens in the width of the network",
    "double_blocks.0.image.qkv": "queries, keys, values of the image",
    "double_blocks.0.attention:0": "all queries, after the norm and RoPE",
    "double_blocks.0.attention": "what the attention returns, text first",
    "double_blocks.0.image.mlp": "the MLP of the image stream",
    "double_blocks.0.0": "the image after the double block",
    "double_blocks.0.1": "the text after the double block",
    "single_blocks.0": "text and image after the first single block",
    "single_blocks.1": "after the second",
    "single_blocks.2": "after the third",
    "single_blocks.3": "after the fourth",
    "final": "the velocity, as tokens",
}


def spread(tensor: Tensor) -> str:
    """Mean and standard deviation as two cells; a mean that rounds to nothing has no sign."""
    return f"{round(float(tensor.mean()), 2) + 0.0:.2f} | {tensor.std():.2f}"


class Numbers:
    """One generation on a CPU in float32, with everything that the page shows of it."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, Tensor, Tensor]] = []  # the sigma that is left, latents, clean latents
        self.flux: DiffusionInference = eridiff.load(device="cpu", dtype=torch.float32, progress=False)

        def keep(step: Step) -> None:
            self.steps.append((step.sigma, step.latents.clone(), step.clean.clone()))

        with record(self.flux, calls="all") as self.tensors:
            self.result = self.flux.generate(PROMPT, seed=SEED, keep=("noise",), callback=keep)

    def tensor(self, name: str) -> Tensor:
        """What was recorded in the step that is shown; of a tensor that is computed once, that."""
        return self.tensors[f"{name}@{STEP}"] if f"{name}@{STEP}" in self.tensors else self.tensors[name]

    def of_tensors(self) -> Iterator[str]:
        for name, what in ROWS.items():
            tensor = self.tensor(name)
            yield f"| `{name}` | {what} | {list(tensor.shape)} | {spread(tensor)} |"

    def of_steps(self) -> Iterator[str]:
        latents, sigma = self.result.noise, 1.0
        assert latents is not None
        for i, (left, after, clean) in enumerate(self.steps):
            velocity = (latents - clean) / sigma
            yield f"| {i} | {sigma:.3f} | {' | '.join(map(spread, (latents, velocity, clean)))} |"
            latents, sigma = after, left

    def clean_images(self) -> list[Image.Image]:
        """What the network takes the image to be at each step."""
        return [to_images(self.flux.decode_vae(clean))[0] for _, _, clean in self.steps]

    def attention(self) -> Tensor:
        """The weights of the attention that is shown, the mean of its heads: `[S, S]`, a row for each query."""
        queries, keys = (self.tensor(f"{BLOCK}.attention:{i}")[0] for i in (0, 1))  # H S D
        return (queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5).softmax(-1).mean(0)

    def words(self) -> list[str]:
        """The text tokens, as T5's tokenizer cuts them."""
        ids = self.tensors["t5.forward:input_ids"][0].tolist()
        return [word.lstrip("▁") for word in self.flux.t5.tokenizer.convert_ids_to_tokens(ids)]  # type: ignore[attr-defined]


def strip(images: list[Image.Image], captions: list[str], side: int = 128) -> Image.Image:
    """Images in a row, each with a caption below."""
    sheet = Image.new("RGB", (len(images) * (side + 6) + 6, side + 28), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = 6 + i * (side + 6)
        sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, 6))
        pen.text((left + side / 2, side + 8), caption, fill="black", font=font, anchor="ma")
    return sheet


def attention_maps(numbers: Numbers, side: int = 128) -> Image.Image:
    """For each word: how strongly each token of the image attends to it, laid over the image.

    Brighter is more, by each word's own largest weight; below it the word's share of all attention of the image.
    """
    weights, words = numbers.attention(), numbers.words()
    text = len(words)
    seen = weights[text:, :text]  # of an image token to a word
    last = [i for i, word in enumerate(words) if word not in ("</s>", "<pad>")]
    grid = int(seen.shape[0] ** 0.5)
    shown = []
    for i in last:
        strength = seen[:, i].reshape(grid, grid) / seen[:, i].max()
        mask = Image.fromarray((strength * 255).byte().numpy()).resize((side, side), Image.Resampling.BILINEAR)
        image = numbers.result.images[0].resize((side, side), Image.Resampling.BICUBIC)
        shown.append(Image.composite(image, Image.eval(image, lambda level: level // 5), mask))
    shares = [float(seen[:, i].mean()) for i in last]
    return strip(shown, [f"{words[i]}  {100 * share:.1f} %" for i, share in zip(last, shares, strict=True)], side)


def made(numbers: Numbers) -> dict[str, Image.Image]:
    """The images by their file names."""
    levels = [1.0, *(left for left, _, _ in numbers.steps[:-1])]
    return {
        "numbers-clean.png": strip(numbers.clean_images(), [f"sigma {level:.3f}" for level in levels]),
        "numbers-attention.png": attention_maps(numbers),
    }


def written(text: str, numbers: Numbers) -> str:
    """The document with its tables made anew."""
    tables = {
        "tensors": ("| tensor | what | shape | mean | deviation |", numbers.of_tensors()),
        "steps": ("| step | sigma | latents: mean | deviation | velocity: mean | deviation | clean: mean | deviation |", numbers.of_steps()),
    }  # fmt: skip
    for name, (head, rows) in tables.items():
        table = "\n".join([head, "|" + "---|" * (head.count("|") - 1), *rows])
        block = f"<!-- {name} -->\n\n{table}\n\n<!-- end -->"
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{DOCUMENT} has {count} places for the table '{name}'")
    return text


if __name__ == "__main__":
    numbers = Numbers()
    DOCUMENT.write_text(written(DOCUMENT.read_text(), numbers))
    for name, image in made(numbers).items():
        image.save(FOLDER / name, optimize=True)
