"""Whether an image shows what was asked: nearest of everything that could have been asked for.

A noun is right when, of all nouns at that size on the pair's mean background, shifted by up to one pixel, the asked one
is the nearest in mean squared error; a size, when of all sizes of that noun it is; a background, when its mean image
is the nearest, the glyph's square left out.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from tiny_world import BACKGROUNDS, NOUNS, SIDE, SIZES, Scene, World


class Judge:
    """`Judge().right(images, scenes)` is `[n, 3]` bool: noun, background, size."""

    def __init__(self) -> None:
        self.world = World()
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


def sample(count: int, seed: int = 7) -> list[Scene]:
    """Scenes at random, every noun, background and size as often as `count` lets it."""
    rng = np.random.default_rng(seed)

    def spread(choices: int) -> np.ndarray:
        return rng.permutation(np.resize(rng.permutation(choices), count))

    nouns, backgrounds, sizes = spread(len(NOUNS)), spread(len(BACKGROUNDS)), spread(len(SIZES))
    return [Scene(int(n), int(b), list(SIZES)[s]) for n, b, s in zip(nouns, backgrounds, sizes, strict=True)]
