"""What towers take on a card: `work_bytes` says never less, and at most 2 % more.

Without a card launches are noted only, and arrays are counted as CuPy's pool would have them.
"""

from __future__ import annotations

import bisect
import weakref
from typing import Any

import numpy as np
import pytest

from benchmarks.measure import own_pool
from benchmarks.pictures import media_for
from benchmarks.presets import config_of
from minioscar.cache import BF16
from minioscar.ops.cuda import Cuda, OnPaper
from minioscar.ops.launch import Card
from minioscar.towers.media import Medium, Tower

BLOCK = 512
CASES = [
    ("qwen3-vl-8b", "image", "1024x1024"), ("qwen3-vl-8b", "image", "2464x1568"), ("qwen3-vl-8b", "image", "256x256"),
    ("qwen3-vl-8b", "image", "6400x96"), ("qwen3-vl-8b", "video", "2f480x640"), ("llava-next-7b", "image", "672x672"),
    ("qwen3-omni-30b-a3b", "image", "1024x1024"), ("qwen3-omni-30b-a3b", "audio", "30s"),
    ("qwen3-omni-30b-a3b", "audio", "300s"),
]  # fmt: skip


class Pool:
    """NumPy whose arrays are counted: the smallest free chunk that is large enough is split, neighbours that are free
    become one again, and where none is large enough memory is taken from the card."""

    def __init__(self) -> None:
        self.total, self.free = 0, []  # of free chunks: size, segment, start; sorted
        self.owners: set[int] = set()  # arrays that were counted

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if name not in ("empty", "zeros", "concatenate", "ascontiguousarray"):
            return found
        return lambda *args, **kwargs: self.counted(found(*args, **kwargs))

    def asarray(self, x: Any, dtype: Any = None) -> np.ndarray:
        """From the host, unless it is an array that was counted."""
        return x if isinstance(x, np.ndarray) and id(_owner(x)) in self.owners else self.counted(np.array(x, dtype))

    def counted(self, x: np.ndarray) -> np.ndarray:
        owner = _owner(x)
        if id(owner) in self.owners:
            return x
        size = -(-owner.nbytes // BLOCK) * BLOCK
        at = bisect.bisect_left(self.free, (size, -1, -1))
        if at == len(self.free):
            self.total += size
            chunk, rest = (size, self.total, 0), 0
        else:
            found, segment, start = self.free.pop(at)
            chunk, rest = (size, segment, start), found - size
            if rest:
                bisect.insort(self.free, (rest, segment, start + size))
        self.owners.add(id(owner))
        weakref.finalize(owner, self.release, chunk, id(owner))
        return x

    def release(self, chunk: tuple[int, int, int], owner: int) -> None:
        self.owners.discard(owner)
        size, segment, start = chunk
        for other in [of for of in self.free if of[1] == segment]:
            if other[2] + other[0] == start or start + size == other[2]:
                self.free.remove(other)
                size, start = size + other[0], min(start, other[2])
        bisect.insort(self.free, (size, segment, start))


class Paper(OnPaper):
    add_product = staticmethod(lambda *_: None)

    def __init__(self) -> None:
        super().__init__(Card(132, 90))
        self.xp = self.products.xp = Pool()


def _owner(x: np.ndarray) -> np.ndarray:
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def encode(tower: Tower, media: list[Medium], weights: dict[str, Any], ops: Any) -> None:
    for medium in media:
        tower.encode(medium, weights, ops)


@pytest.mark.parametrize(("preset", "kind", "size"), CASES)
def test_the_arrays_of_a_tower_are_what_work_bytes_says(preset: str, kind: str, size: str) -> None:
    config, ops = config_of(preset), Paper()
    tower, media = config.towers[kind], media_for(config, size)
    weights = {name: np.zeros(shape, BF16) for name, shape in config.towers[tower.weights_of].expected().items()}
    encode(tower, media, weights, ops)  # the products' scratch stays
    before = ops.products.scratch.workspace.nbytes
    ops.xp.total, ops.xp.free = 0, []
    encode(tower, media, weights, ops)
    assert before == ops.products.scratch.workspace.nbytes
    assert ops.xp.total <= tower.work_bytes(media[0].tokens, ops) <= 1.02 * ops.xp.total


@pytest.mark.gpu
@pytest.mark.parametrize(("preset", "kind", "size"), CASES)
def test_a_card_gives_a_tower_what_work_bytes_says(preset: str, kind: str, size: str) -> None:
    config, ops = config_of(preset), Cuda()
    tower, media = config.towers[kind], media_for(config, size)
    weights = {name: ops.xp.zeros(shape, BF16) for name, shape in config.towers[tower.weights_of].expected().items()}
    encode(tower, media, weights, ops)  # the products' scratch stays
    with own_pool(ops.xp) as taken:
        for _ in range(3):
            encode(tower, media, weights, ops)
        assert taken() <= tower.work_bytes(media[0].tokens, ops) <= 1.02 * taken()
