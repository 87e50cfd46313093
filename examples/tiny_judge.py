"""Whether an image shows what was asked: nearest of everything that could have been asked for.

A noun is right when, of all nouns at that size on the pair's mean background, shifted by up to one pixel, the asked one
is the nearest in mean squared error; a size, when of all sizes of that noun it is; a background, when its mean image
is the nearest, the glyph's square left out. How outlined an image is goes from 0, as plain renderings, to 1, as outlined ones.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from tiny_world import BACKGROUNDS, NOUNS, SIDE, SIZES, Scene, World


class Judge:
    """`Judge().right(images, scenes)` is `[n, 3]` bool: noun, background, size; `outlines` expects the style of the LoRA."""

    def __init__(self, outlines: bool = False) -> None:
        self.world = World(outlines)
        self.shifted = cache(self._shifted)
        self.means = np.stack([(first + second) / 2 for first, second in self.world.backgrounds])

    def _shifted(self, noun: int, background: int, size: str) -> np.ndarray:
        """`[9, 64 * 64 * 3]` uint8: a scene on its mean background, shifted by up to a pixel."""
        scene = Scene(noun, background, size)
        drawn = [self.world.draw(scene, None, dx, dy) for dx, dy in product((-1, 0, 1), repeat=2)]
        return np.stack(drawn).reshape(9, -1)

    def distance(self, picture: np.ndarray, noun: int, background: int, size: str) -> float:
        drawn = self.shifted(noun, background, size)
        return float(((drawn - picture) ** 2).mean(1).min())

    def noun(self, picture: np.ndarray, scene: Scene) -> int:
        return int(np.argmin([self.distance(picture, n, scene.background, scene.size) for n in range(len(NOUNS))]))

    def size(self, picture: np.ndarray, scene: Scene) -> str:
        return min(SIZES, key=lambda size: self.distance(picture, scene.noun, scene.background, size))

    def background(self, picture: np.ndarray, scene: Scene) -> int:
        outside, edge = np.ones((SIDE, SIDE, 1)), (SIDE - SIZES[scene.size]) // 2 - 1
        outside[edge : SIDE - edge, edge : SIDE - edge] = 0
        return int((((self.means - picture.reshape(SIDE, SIDE, 3)) ** 2) * outside).sum((1, 2, 3)).argmin())

    def right(self, images: Sequence[object], scenes: Sequence[Scene]) -> np.ndarray:
        found = []
        for image, scene in zip(images, scenes, strict=True):
            picture = np.asarray(image, dtype=np.float32).reshape(-1)
            told = self.noun(picture, scene), self.background(picture, scene), self.size(picture, scene)
            found.append([a == b for a, b in zip(told, (scene.noun, scene.background, scene.size), strict=True)])
        return np.array(found)


def outline(images: Sequence[object], scenes: Sequence[Scene]) -> float:
    """How much of the outline is there, the mean over images: 0 is none, as in plain renderings, and 1 all of it.

    The share, by least squares, of the difference between the outlined rendering and the plain one, where the noun is.
    """
    plain, outlined = Judge(), Judge(outlines=True)
    found = []
    for image, s in zip(images, scenes, strict=True):
        picture = np.asarray(image, dtype=float).reshape(-1)
        pairs = zip(
            plain.shifted(s.noun, s.background, s.size), outlined.shifted(s.noun, s.background, s.size), strict=True
        )
        best = []
        for without, with_it in pairs:
            ring, rest = with_it.astype(float) - without, picture - without
            share = float(ring @ rest / (ring @ ring))
            best.append((((rest - share * ring) ** 2).sum(), share))
        found.append(min(best)[1])
    return float(np.mean(found))


def sample(count: int, seed: int = 7) -> list[Scene]:
    """Scenes at random, every noun, background and size as often as `count` lets it."""
    rng = np.random.default_rng(seed)

    def spread(choices: int) -> np.ndarray:
        return rng.permutation(np.resize(rng.permutation(choices), count))

    nouns, backgrounds, sizes = spread(len(NOUNS)), spread(len(BACKGROUNDS)), spread(len(SIZES))
    return [Scene(int(n), int(b), list(SIZES)[s]) for n, b, s in zip(nouns, backgrounds, sizes, strict=True)]
