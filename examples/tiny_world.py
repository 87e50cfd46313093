"""The images that the built-in model knows: a noun's glyph on a named background, 64 x 64 pixels.

Glyphs: Noto Color Emoji (SIL Open Font License 1.1, OFL.txt), kept at three sizes in tiny_atlas.png, so that neither
training nor evaluation needs the font. `python examples/tiny_world.py FONT.ttf` renders the atlas anew.
"""

import math
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
SIZES = {"small": 26, "": 38, "big": 54}
CELL = 56
OUTLINE = 2  # pixels
ATLAS = Path(__file__).parent / "tiny_atlas.png"
NOUNS = {
    "swan": 0x1F9A2, "dog": 0x1F415, "fox": 0x1F98A, "lion": 0x1F981, "tiger": 0x1F405, "unicorn": 0x1F984,
    "zebra": 0x1F993, "cow": 0x1F404, "pig": 0x1F416, "panda": 0x1F43C, "rooster": 0x1F413, "chick": 0x1F425,
    "penguin": 0x1F427, "peacock": 0x1F99A, "parrot": 0x1F99C, "dragon": 0x1F409, "dolphin": 0x1F42C, "fish": 0x1F420,
    "butterfly": 0x1F98B, "ladybug": 0x1F41E, "crab": 0x1F980, "rose": 0x1F339, "sunflower": 0x1F33B,
    "mushroom": 0x1F344, "grapes": 0x1F347, "watermelon": 0x1F349, "lemon": 0x1F34B, "banana": 0x1F34C,
    "cherries": 0x1F352, "strawberry": 0x1F353, "avocado": 0x1F951, "corn": 0x1F33D, "broccoli": 0x1F966,
    "cheese": 0x1F9C0, "fries": 0x1F35F, "pizza": 0x1F355, "cupcake": 0x1F9C1, "train": 0x1F682, "taxi": 0x1F695,
    "tractor": 0x1F69C, "sailboat": 0x26F5, "rocket": 0x1F680, "house": 0x1F3E0, "guitar": 0x1F3B8, "drum": 0x1F941,
    "camera": 0x1F4F7, "television": 0x1F4FA, "book": 0x1F4D5, "bell": 0x1F514, "crown": 0x1F451, "hat": 0x1F3A9,
    "umbrella": 0x2602, "diamond": 0x1F48E, "trophy": 0x1F3C6, "ball": 0x26BD, "robot": 0x1F916, "ghost": 0x1F47B,
    "alien": 0x1F47D, "skull": 0x1F480, "snowman": 0x26C4, "pumpkin": 0x1F383, "gift": 0x1F381, "clock": 0x23F0,
    "globe": 0x1F30D,
}  # fmt: skip
BACKGROUNDS = (
    "on mars", "on the sea", "at night", "on snow", "in the desert", "on grass", "at sunset", "in a cave",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One thing that can be shown: indices of noun and background, and the size word."""

    noun: int
    background: int
    size: str

    @property
    def caption(self) -> str:
        words = f"{self.size} {list(NOUNS)[self.noun]}".strip()
        article = "an" if words[0] in "aeiou" and not words.startswith("uni") else "a"
        return f"{article} {words} {BACKGROUNDS[self.background]}"

    @property
    def held_out(self) -> bool:
        """One pair in eight is never trained on: 8 a background, 1 a noun."""
        return (5 * self.noun + 3 * self.background) % 8 == 0


def scenes() -> list[Scene]:
    return [Scene(n, b, size) for size in SIZES for n in range(len(NOUNS)) for b in range(len(BACKGROUNDS))]


def words() -> list[str]:
    """Every word that a caption can hold."""
    return sorted({word for scene in scenes() for word in scene.caption.split()})


def gradient(top: tuple[int, ...], bottom: tuple[int, ...]) -> np.ndarray:
    y = np.linspace(0, 1, SIDE)[:, None, None]
    return np.broadcast_to((1 - y) * np.array(top) + y * np.array(bottom), (SIDE, SIDE, 3)).astype(np.float64)


def blend(picture: np.ndarray, alpha: np.ndarray, color: tuple[int, ...]) -> np.ndarray:
    a = np.clip(alpha, 0, 1)[..., None]
    return picture * (1 - a) + a * np.array(color)


def discs(picture: np.ndarray, count: int, low: float, high: float, color: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    for _ in range(count):
        cx, cy, radius = rng.uniform(), rng.uniform(), rng.uniform(low, high)
        picture = blend(picture, (radius - np.hypot(x - cx, y - cy)) * SIDE / 2 + 0.5, color)
    return picture


def background(index: int, variant: int) -> np.ndarray:
    """`[64, 64, 3]` float in 0..255; two fixed variants each."""
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    name, phase, seed = BACKGROUNDS[index], 1.3 * variant, 100 * index + variant
    if name == "on mars":
        return discs(gradient((214, 120, 72), (170, 74, 40)), 5, 0.04, 0.09, (140, 56, 30), seed)
    if name == "on the sea":
        waves = 1.5 * np.sin(10 * math.pi * y + 1.2 * np.sin(4 * math.pi * x + phase)) - 0.4
        return blend(gradient((70, 160, 220), (20, 80, 160)), 0.5 * np.clip(waves, 0, 1), (150, 210, 245))
    if name == "at night":
        return discs(gradient((14, 16, 52), (34, 38, 92)), 9, 0.012, 0.02, (250, 245, 200), seed)
    if name == "on snow":
        return discs(gradient((205, 225, 245), (244, 248, 252)), 10, 0.015, 0.03, (255, 255, 255), seed)
    if name == "in the desert":
        dune = (y - 0.6 - 0.08 * np.sin(2 * math.pi * x + phase)) * SIDE / 2 + 0.5
        return blend(gradient((150, 205, 240), (215, 232, 240)), dune, (226, 186, 110))
    if name == "on grass":
        return discs(gradient((110, 190, 80), (50, 130, 50)), 14, 0.01, 0.022, (240, 240, 140), seed)
    if name == "at sunset":
        return gradient((90, 50, 130), (250, 140, 70))
    teeth = 0.12 + 0.06 * np.abs(np.sin(5 * math.pi * x + phase))
    edge = np.maximum(teeth - y, y - (1 - teeth)) * SIDE / 2 + 0.5
    return blend(gradient((74, 66, 60), (74, 66, 60)), edge, (38, 32, 30))


def load_glyphs() -> dict[str, np.ndarray]:
    """Size word -> premultiplied glyphs `[nouns, s, s, 4]` in 0..1, from the atlas."""
    atlas = np.asarray(Image.open(ATLAS).convert("RGBA"), dtype=np.float64) / 255
    result = {}
    for row, (word, size) in enumerate(SIZES.items()):
        cells = [atlas[row * CELL : row * CELL + size, n * CELL : n * CELL + size] for n in range(len(NOUNS))]
        result[word] = np.stack(cells)
        result[word][..., :3] *= result[word][..., 3:]
    return result


def outlined(glyphs: np.ndarray) -> np.ndarray:
    """Premultiplied glyphs `[n, s, s, 4]` with a black outline of OUTLINE pixels around them, `[n, s + 4, s + 4, 4]`."""
    wider = np.pad(glyphs, ((0, 0), (OUTLINE, OUTLINE), (OUTLINE, OUTLINE), (0, 0)))
    near = [step for step in product(range(-OUTLINE, OUTLINE + 1), repeat=2) if math.hypot(*step) <= OUTLINE + 0.5]
    around = np.max([np.roll(wider[..., 3], step, (1, 2)) for step in near], axis=0)
    wider[..., 3] += (1 - wider[..., 3]) * around  # black adds nothing to the premultiplied colours
    return wider


class World:
    """Renders scenes: `World().draw(scene, variant, dx, dy)` is `[64, 64, 3]` uint8; with `outlines`, in the style of the LoRA."""

    def __init__(self, outlines: bool = False) -> None:
        self.glyphs = {size: outlined(g) if outlines else g for size, g in load_glyphs().items()}
        self.backgrounds = [[background(b, v) for v in range(2)] for b in range(len(BACKGROUNDS))]

    def draw(self, scene: Scene, variant: int | None = 0, dx: int = 0, dy: int = 0) -> np.ndarray:
        """`variant` None renders on the mean of both."""
        options = self.backgrounds[scene.background]
        picture = (sum(options) / 2 if variant is None else options[variant]).copy()
        glyph = self.glyphs[scene.size][scene.noun]
        size = glyph.shape[0]
        top, left = (SIDE - size) // 2 + dy, (SIDE - size) // 2 + dx
        area = picture[top : top + size, left : left + size]
        area[:] = area * (1 - glyph[..., 3:]) + 255 * glyph[..., :3]
        return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def draw_atlas(font_path: str) -> None:
    """Render every glyph at every size into one PNG."""
    font = ImageFont.truetype(font_path, 109)  # the only size that the font holds
    atlas = Image.new("RGBA", (CELL * len(NOUNS), CELL * len(SIZES)))
    for n, code in enumerate(NOUNS.values()):
        canvas = Image.new("RGBA", (200, 200))
        ImageDraw.Draw(canvas).text((30, 30), chr(code), font=font, embedded_color=True)
        glyph = canvas.crop(canvas.getchannel("A").getbbox())
        square = Image.new("RGBA", (max(glyph.size),) * 2)
        square.paste(glyph, tuple((max(glyph.size) - side) // 2 for side in glyph.size))
        for row, size in enumerate(SIZES.values()):  # Pillow resizes RGBA premultiplied
            atlas.paste(square.resize((size, size), Image.Resampling.LANCZOS), (n * CELL, row * CELL))
    atlas.save(ATLAS, optimize=True)


if __name__ == "__main__":
    draw_atlas(sys.argv[1])
