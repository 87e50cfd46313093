"""The figures of the documentation, as SVG: `python docs/figures.py` writes docs/images/*.svg; a test runs it.

Every figure is 440 units wide, so that its text can be read on a phone, and has its own background, light or dark as the reader's
system is.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "images"
WIDTH = 440
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2933; text-anchor: middle; }
  .small { font-size: 11px; fill: #52606d; }
  .left { text-anchor: start; } .right { text-anchor: end; }
  .title { font-weight: 600; font-size: 15px; }
  .page { fill: #ffffff; } .group { fill: #f3f6f8; stroke: #cbd2d9; }
  .line { fill: none; stroke: #52606d; stroke-width: 1.5; } .head { fill: #52606d; }
  .vector { stroke: #9446b3; stroke-dasharray: 4 3; }
  rect { stroke-width: 1.2; }
  .plain { fill: #eceff2; stroke: #9aa5b1; } .tensor { fill: #ffffff; stroke: #52606d; }
  .attention { fill: #ffe8cc; stroke: #d9822b; } .mlp { fill: #d9f2e3; stroke: #2f8f5b; }
  .norm { fill: #f6e4fb; stroke: #9446b3; } .block { fill: #dcebfa; stroke: #2b6cb0; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e7eb; } .small { fill: #a8b3bf; }
    .page { fill: #1b2129; } .group { fill: #232b35; stroke: #3e4c59; }
    .line { stroke: #a8b3bf; } .head { fill: #a8b3bf; } .vector { stroke: #d29ae8; }
    .plain { fill: #323f4b; stroke: #7b8794; } .tensor { fill: #1b2129; stroke: #a8b3bf; }
    .attention { fill: #4a3218; stroke: #e09a4f; } .mlp { fill: #1d3d2c; stroke: #56b881; }
    .norm { fill: #3c2647; stroke: #d29ae8; } .block { fill: #1d3550; stroke: #63a4e0; }
  }
"""


class Figure:
    """Boxes, lines and words; y grows downwards, and each method returns nothing."""

    def __init__(self, name: str, title: str, height: int) -> None:
        self.name, self.title, self.height, self.parts = name, title, height, list[str]()
        self.text(WIDTH / 2, 24, title, "title")

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """A line of text around `x` on the baseline `y`; the class `left` or `right` moves it to one side."""
        escaped = words.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escaped}</text>')

    def box(self, x: float, y: float, width: float, words: str, kind: str = "plain", note: str = "") -> None:
        """A box centred at `x` whose top is `y`: 30 high, or 44 with a note below its words."""
        high = 44 if note else 30
        round_ = 15 if kind == "tensor" and not note else 5
        self.parts.append(
            f'<rect x="{x - width / 2:g}" y="{y:g}" width="{width:g}" height="{high}" rx="{round_}" class="{kind}"/>'
        )
        self.text(x, y + (19 if note else 20), words)
        if note:
            self.text(x, y + 35, note, "small")

    def group(self, x: float, y: float, width: float, height: float) -> None:
        """A frame whose left upper corner is `x`, `y`; what belongs into it is added afterwards."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" class="group"/>')

    def line(self, *points: tuple[float, float], kind: str = "", arrow: bool = True) -> None:
        """Straight pieces through the points, with a head at the last one."""
        path = " ".join(f"{'M' if i == 0 else 'L'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        head = ' marker-end="url(#head)"' if arrow else ""
        self.parts.append(f'<path d="{path}" class="line {kind}"{head}/>')

    def down(self, x: float, *ys: float) -> None:
        """Arrows between the pairs of heights: from ys[0] to ys[1], from ys[2] to ys[3], ..."""
        for top, bottom in zip(ys[::2], ys[1::2], strict=True):
            self.line((x, top), (x, bottom))

    def plus(self, x: float, y: float, words: str = "+") -> None:
        """A circle around `x`, `y` at which a residual is added."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="9" class="tensor"/>')
        self.text(x, y + 4.5, words)

    def svg(self) -> str:
        """The whole file."""
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6.5" markerHeight="6.5" orient="auto-start-reverse">'
            '<path d="M0 0 L8 4 L0 8 z" class="head"/></marker>'
        )
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}" role="img">',
            f"<title>{self.title}</title>", f"<style>{STYLE}</style>", f"<defs>{head}</defs>",
            f'<rect width="{WIDTH}" height="{self.height}" rx="10" class="page"/>', *self.parts, "</svg>", "",
        ])  # fmt: skip


def way() -> Figure:
    """From the prompt and the noise to the image, for all families."""
    f = Figure("way", "From a prompt to an image", 640)
    f.box(120, 44, 150, "prompt", "tensor")
    f.box(330, 44, 150, "seed", "tensor")
    f.box(120, 98, 180, "CLIP, T5", "block", "eridiff/text/")
    f.box(330, 98, 150, "noise", "plain", "float32, on the CPU")
    f.box(120, 166, 180, "text, pooled", "tensor")
    f.down(120, 74, 98, 142, 166)
    f.down(330, 74, 98)
    f.box(120, 220, 180, "prepare", "block", "eridiff/models/, once")
    f.down(120, 196, 220)
    f.group(20, 288, 400, 200)
    f.text(34, 308, "for each step", "small left")
    f.box(120, 326, 160, "step", "block", "the network")
    f.box(120, 394, 160, "guidance", "norm", "schedulers/guidance.py")
    f.box(330, 394, 150, "sampler step", "mlp", "schedulers/samplers.py")
    f.box(330, 326, 150, "latents", "tensor")
    f.down(120, 264, 326, 370, 394)
    f.line((200, 416), (255, 416))
    f.line((330, 394), (330, 356))
    f.line((255, 341), (200, 341))
    f.line((388, 142), (388, 326))
    f.box(300, 220, 136, "schedule", "norm", "alphas, sigmas, times")
    f.line((232, 242), (210, 242))
    f.line((300, 264), (300, 326))
    f.text(220, 474, "x = alpha · clean + sigma · noise", "small")
    f.box(330, 512, 150, "autoencoder", "block", "decode")
    f.line((405, 341), (430, 341), (430, 534), (405, 534))
    f.down(330, 556, 582)
    f.box(330, 582, 150, "image", "tensor", "PNG with its settings")
    return f


def network(
    name: str, title: str, text: tuple[str, str], image: tuple[str, str], blocks: tuple[str, str], second: tuple[str, str] | None, out: str
) -> Figure:  # fmt: skip
    """Flux and the MMDiT: two streams through their blocks, with one conditioning vector beside them."""
    extra = 116 if second else 0
    f = Figure(name, title, 436 + extra)
    f.box(80, 44, 120, *text[:1], "tensor", text[1])  # type: ignore[misc]
    f.box(220, 44, 130, *image[:1], "tensor", image[1])  # type: ignore[misc]
    f.box(366, 44, 120, "time, pooled", "tensor", "guidance (Flux dev)" if second else "prompt vector")
    f.box(80, 118, 120, "text_in", "plain")
    f.box(220, 118, 130, "image_in", "plain", "" if second else "patches, positions")
    f.box(366, 118, 120, "small MLPs, sum", "norm")
    for x in (80, 220, 366):
        f.line((x, 88), (x, 118))
    bottom = 148 if second else 162
    f.down(80, 148, 196)
    f.down(220, bottom, 196)
    f.box(150, 196, 270, blocks[0], "block", blocks[1])
    f.line((366, 148), (366, 218), (285, 218), kind="vector")
    f.text(382, 184, "vec", "small")
    for i, words in enumerate(("shift, scale", "and gate of", "each block")):
        f.text(325, 236 + 14 * i, words, "small")
    y = 240
    if second:
        f.down(80, y, y + 24)
        f.down(220, y, y + 24)
        f.box(150, y + 24, 270, "text and image as one sequence", "plain")
        f.down(150, y + 54, y + 72)
        f.box(150, y + 72, 270, second[0], "block", second[1])
        f.line((366, 218), (366, y + 94), (285, y + 94), kind="vector")
        y += 116
        f.down(150, y, y + 30)
        f.text(196, y + 20, "image tokens", "small")
    else:
        f.down(220, y, y + 30)
        f.text(96, y + 20, "the text ends here", "small")
    f.box(220 if not second else 150, y + 30, 200, "modulated norm, linear", "norm", "final")
    f.line((366, y - 22), (366, y + 52), (322 if not second else 252, y + 52), kind="vector")
    x = 150 if second else 220
    f.down(x, y + 74, y + 104)
    f.box(x, y + 104, 200, "velocity", "tensor", out)
    f.text(WIDTH / 2, y + 176, "velocity = noise − clean; the sampler makes the next latents from it", "small")
    return f


def stream(f: Figure, x: float, top: float, words: str) -> None:
    """One stream of a joint block: into the attention at `top` + 232, and out of it to the end at `top` + 470."""
    f.box(x, top, 130, words, "tensor")
    f.box(x, top + 52, 150, "norm, shift, scale", "norm")
    f.box(x, top + 104, 150, "qkv", "plain", "queries, keys, values")
    f.box(x, top + 172, 150, "RMS norm of q and k", "norm")
    f.down(x, top + 30, top + 52, top + 82, top + 104, top + 148, top + 172, top + 202, top + 232)
    y = top + 232 + 44
    f.box(x, y + 22, 150, "proj, gate", "plain")
    f.plus(x, y + 78)
    f.box(x, y + 106, 150, "norm, shift, scale", "norm")
    f.box(x, y + 156, 150, "MLP (GELU), gate", "mlp")
    f.plus(x, y + 212)
    f.down(x, y, y + 22, y + 52, y + 69, y + 87, y + 106, y + 136, y + 156, y + 186, y + 203, y + 221, y + 244)
    side = x - 92 if x < WIDTH / 2 else x + 92
    near = x - 9 if x < WIDTH / 2 else x + 9
    f.line((x, top + 40), (side, top + 40), (side, y + 78), (near, y + 78))
    f.line((x, y + 96), (side, y + 96), (side, y + 212), (near, y + 212))
    f.box(x, y + 244, 130, words, "tensor")


def joint(name: str, title: str, attention: str, note: str, foot: tuple[str, ...]) -> Figure:
    """A block with two streams that meet in one attention."""
    f = Figure(name, title, 612 + 16 * len(foot))
    f.box(WIDTH / 2, 276, 372, attention, "attention", note)
    for x, words in ((118, "text"), (322, "image")):
        stream(f, x, 44, words)
    for i, words_ in enumerate(foot):
        f.text(WIDTH / 2, 618 + 16 * i, words_, "small")
    return f


def single() -> Figure:
    """Flux's single block: attention and MLP side by side."""
    f = Figure("flux-single", "Flux: a single block", 500)
    x = 220
    f.box(x, 44, 180, "text and image", "tensor")
    f.box(x, 98, 180, "norm, shift, scale", "norm")
    f.box(x, 152, 240, "linear1", "plain", "one matrix for q, k, v and the MLP's input")
    f.down(x, 74, 98, 128, 152)
    f.box(128, 226, 160, "RMS norm of q and k", "norm")
    f.box(128, 280, 160, "attention with RoPE", "attention")
    f.box(322, 252, 130, "GELU", "mlp")
    f.line((150, 196), (128, 226))
    f.down(128, 256, 280)
    f.line((290, 196), (322, 252))
    f.box(x, 344, 240, "linear2, gate", "plain", "both results side by side")
    f.line((128, 310), (160, 344))
    f.line((322, 282), (280, 344))
    f.plus(x, 414)
    f.down(x, 388, 405, 423, 446)
    f.line((x, 86), (424, 86), (424, 414), (229, 414))
    f.box(x, 446, 180, "text and image", "tensor")
    return f


def unet() -> Figure:
    """SDXL's UNet: three resolutions down and up, with what is kept on the way down."""
    f = Figure("unet", "SDXL: the UNet", 486)
    left, right = 116, 324
    f.box(left, 44, 160, "latents", "tensor", "4 × 128 × 128")
    f.box(right, 44, 160, "noise (epsilon) or v", "tensor", "4 × 128 × 128")
    rows = (("320 × 128 × 128", "no transformer"), ("640 × 64 × 64", "2 transformer blocks each"), ("1280 × 32 × 32", "10 transformer blocks each"))  # fmt: skip
    for i, (shape, depth) in enumerate(rows):
        y = 122 + 78 * i
        f.box(left, y, 180, f"{shape}", "block", depth)
        f.box(right, y, 180, f"{shape}", "block", depth)
        f.line((left + 90, y + 22), (right - 90, y + 22))
        if i:
            f.down(left, y - 34, y)
            f.line((right, y), (right, y - 34))
    f.down(left, 88, 122)
    f.line((right, 122), (right, 88))
    f.box(WIDTH / 2, 352, 300, "middle: 1280 × 32 × 32", "block", "10 transformer blocks")
    f.down(left, 322, 352)
    f.line((right, 352), (right, 322))
    f.text(220, 138, "kept", "small")
    f.text(WIDTH / 2, 424, "down: 2 residual blocks a stage, each followed by a transformer", "small")
    f.text(WIDTH / 2, 440, "up: 3 residual blocks a stage; each takes back one of the 9 kept outputs", "small")
    f.text(WIDTH / 2, 456, "the vector (time, pooled prompt, sizes) enters every residual block,", "small")
    f.text(WIDTH / 2, 472, "the text enters every transformer block", "small")
    return f


def unet_blocks() -> Figure:
    """The residual block and the transformer block of the UNet."""
    f = Figure("unet-blocks", "SDXL: residual block and transformer block", 520)
    x = 112
    f.box(x, 44, 130, "pixels", "tensor")
    for y, words, kind in ((98, "group norm, SiLU", "norm"), (148, "convolution 3 × 3", "plain"), (256, "group norm, SiLU", "norm"), (306, "convolution 3 × 3", "plain")):  # fmt: skip
        f.box(x, y, 146, words, kind)
    f.plus(x, 206)
    f.plus(x, 364)
    f.down(x, 74, 98, 128, 148, 178, 197, 215, 256, 286, 306, 336, 355, 373, 400)
    f.line((x, 86), (22, 86), (22, 364), (103, 364))
    f.line((196, 206), (121, 206), kind="vector")
    f.text(172, 198, "vec", "small")
    f.box(x, 400, 130, "pixels", "tensor")
    x = 322
    f.box(x, 44, 130, "pixels as tokens", "tensor")
    for y, words, kind in ((90, "norm, self-attention", "attention"), (182, "norm, cross-attention", "attention"), (274, "norm, GEGLU MLP", "mlp")):  # fmt: skip
        f.box(x, y, 164, words, kind)
        f.plus(x, y + 54)
        f.down(x, y + 30, y + 45)
        f.line((x, y - 9), (424, y - 9), (424, y + 54), (331, y + 54))
    f.down(x, 74, 90, 153, 182, 245, 274, 337, 400)
    f.line((216, 160), (216, 197), (240, 197), kind="vector")
    f.text(222, 150, "text", "small")
    f.box(x, 400, 130, "pixels as tokens", "tensor")
    f.text(WIDTH / 2, 462, "Where a block changes the number of channels,", "small")
    f.text(WIDTH / 2, 478, "the input is added through a 1 × 1 convolution.", "small")
    f.text(WIDTH / 2, 500, "70 transformer blocks in SDXL base", "small")
    return f


def house() -> Figure:
    """The folders, in the direction in which they import each other."""
    f = Figure("house", "Which folder uses which", 586)
    rows = (
        (("cli/", "one file per command", "plain"),),
        (("training/", "sampling in a loop", "mlp"), ("trace/", "record, compare", "mlp")),
        (("inference/", "one loop for all families", "block"),),
        (("adopt/", "trainers' own modules", "norm"), ("memory/", "offload, plan, strips", "norm")),
        (("text/", "CLIP, T5", "block"), ("lora/", "read, attach, merge", "norm")),
        (("request.py, config.py", "all settings", "plain"),),
        (("weights/", "files to modules", "attention"), ("weights_map/", "names, as data", "attention")),
        (("models/", "the networks", "block"), ("schedulers/", "noise levels, samplers", "block")),
    )
    for i, row in enumerate(rows):
        y = 44 + 66 * i
        width = 190 if len(row) == 2 else 398
        for j, (words, note, kind) in enumerate(row):
            f.box(WIDTH / 2 if len(row) == 1 else (116, 324)[j], y, width, words, kind, note)
        if i:
            f.line((WIDTH / 2, y - 22), (WIDTH / 2, y))
    return f


FIGURES = (
    way(),
    network(
        "flux", "Flux: the network", ("T5", "[512, 4096]"), ("latents", "[4096, 64]"), ("19 double blocks", "text and image apart"), ("38 single blocks", "common weights"), "[4096, 64]"
    ),
    joint("flux-double", "Flux: a double block", "attention with RoPE", "over text and image together", ("shift, scale and gate come from the vector: six for each stream.",)),
    single(),
    network(
        "mmdit", "SD 3 and 3.5: the network", ("CLIPs and T5", "[154, 4096]"), ("latents", "[16, 128, 128]"), ("24 or 38 joint blocks", "text and image apart"), None, "[16, 128, 128]"
    ),
    joint("mmdit-block", "SD 3 and 3.5: a joint block", "attention", "over text and image together", (
        "sd3-medium has no norm of q and k.",
        "In 13 blocks of sd3.5-medium the image has a second attention to itself,",
        "with its own shift, scale and gate. In the last block the text ends.",
    )),
    unet(),
    unet_blocks(),
    house(),
)  # fmt: skip

if __name__ == "__main__":
    for figure in FIGURES:
        (FOLDER / f"{figure.name}.svg").write_text(figure.svg(), encoding="utf-8")
