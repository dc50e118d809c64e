"""A window that is not emptied: how much is packed at every length, and that a row may be cut, interrupted, copied and
saved anywhere."""

from __future__ import annotations

from dataclasses import replace
from functools import cache as cache_results

import numpy as np
import pytest

from minioscar import oscar
from minioscar.cache import BF16, Cache, NewTokens
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES

from .test_cache import config
from .tiny import WINDOWS, key_feedback

KV = ["oscar", *WINDOWS]
LENGTHS = [1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 159, 160, 191, 192, 193, 255, 256, 257, 300, 385]


def scheme_of(kv: str) -> oscar.Scheme:
    return (SCHEMES | WINDOWS)[kv]


class Text:
    """Queries, keys and values of the tokens of two texts; [texts, tokens, heads, d]."""

    def __init__(self, scheme: oscar.Scheme, seed: int, tokens: int = 512):
        rng = np.random.default_rng(seed)
        self.scheme, self.ops = scheme, Reference()
        self.q = rng.standard_normal((2, tokens, 4, 64)).astype(np.float32)
        self.k, self.v = rng.standard_normal((2, 2, tokens, 2, 64)).astype(BF16).astype(np.float32)

    def cache(self, context: int = 512, batch: int = 2) -> Cache:
        return Cache(config(num_hidden_layers=1), self.scheme, batch, context, self.ops)

    def feed(self, cache: Cache, ends: dict[int, int], text: int | None = None) -> np.ndarray:
        """Rows of the cache up to so many tokens, in one pass; row b is text b, or all are `text`. What attention
        gives."""
        batch = cache.batch_for(ends, [end - int(cache.lengths[slot]) for slot, end in ends.items()])
        at = [(slot if text is None else text, slice(start, ends[slot])) for slot, start, _ in batch.spans()]
        q, k, v = (np.concatenate([x[where] for where in at]) for x in (self.q, self.k, self.v))
        norms = oscar.token_norms(k) if self.scheme.scale else None
        new = NewTokens(k, v, norms, key_feedback(self.scheme, 2, 64))
        out = self.ops.attention(q, new, cache.layers[0], batch)
        cache.advance(batch)
        return out


def same_row(a: Cache, b: Cache, slot: int = 0) -> bool:
    return same(a.export_row(slot)[0], b.export_row(slot)[0])


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("flush", "keep"), [(128, 0), (64, 64), (128, 128), (32, 96), (64, 0), (64, 192), (32, 32)])
def test_packed_tokens_grow_by_flush_and_the_window_holds_keep_or_more(flush, keep):
    """The definition, counted token by token: when the number of tokens is a multiple of flush, the oldest flush tokens
    of the window are packed if keep others are left."""
    scheme, packed = replace(SCHEMES["int2"], flush=flush, keep=keep), 0
    assert scheme.packed_tokens(0) == 0
    for length in range(1, 1025):
        window = length - packed
        assert window <= scheme.ring
        if length % flush == 0 and window - flush >= keep:
            packed += flush
        assert scheme.packed_tokens(length) == packed
    assert SCHEMES["bf16"].packed_tokens(1000) == 0


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("int2", (48, 0)), ("int2", (256, 0)), ("int2", (64, 32)), ("int2-compact", (32, 32)), ("int2", (0, 0)),
        ("ott", (64, 64)), ("kvarn-2", (64, 0)), ("int2", (64, -64)),
    ],
)
def test_a_window_that_packs_no_whole_blocks_is_refused(name, window):
    with pytest.raises(ValueError, match=f"{name}: a window that packs {window[0]} tokens"):
        replace(SCHEMES[name], flush=window[0], keep=window[1])


@pytest.mark.parametrize("kv", KV)
def test_rows_of_unequal_lengths_are_what_each_is_alone(kv, seed):
    text = Text(scheme_of(kv), seed)
    for first, second in zip(LENGTHS, LENGTHS[::-1], strict=True):
        cache = text.cache()
        text.feed(cache, {0: first, 1: second})
        both = text.feed(cache, {1: second + 70, 0: first + 1})
        for slot, lengths, part in ((0, (first, first + 1), both[70:]), (1, (second, second + 70), both[:70])):
            alone = text.cache()
            text.feed(alone, {slot: lengths[0]})
            np.testing.assert_array_equal(text.feed(alone, {slot: lengths[1]}), part)
            assert same_row(alone, cache, slot)


def some_cuts(length: int, seed: int) -> list[int]:
    drawn = np.random.default_rng(seed + length).integers(0, length, 6).tolist()
    return sorted({0, *drawn, *(n for n in LENGTHS if n < length)})


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("length", [1, 64, 97, 128, 200, 257, 385])
def test_a_row_that_was_cut_and_fed_again_is_one_that_never_was_longer(kv, length, seed):
    """Cut anywhere, fed again up to the cut and then with other tokens: pages, window, and what these attend to."""
    scheme = scheme_of(kv)
    text = Text(scheme, seed)
    cache = text.cache()
    text.feed(cache, {1: length}, text=0)
    for cut in some_cuts(length, seed):
        fresh = text.cache()
        cache.copy(1, 0)
        left = cache.truncate(0, cut)
        assert left == cache.lengths[0] <= cut and cut - left < scheme.ring
        for row in (cache, fresh):
            if row.lengths[0] < cut:
                text.feed(row, {0: cut})
        assert not cut or same_row(cache, fresh)
        for end in (cut + 1, cut + 100):
            ours, theirs = (text.feed(row, {0: end}, text=1) for row in (cache, fresh))
            np.testing.assert_array_equal(ours, theirs)
        assert same_row(cache, fresh)


@pytest.mark.parametrize("kv", [kv for kv, scheme in WINDOWS.items() if scheme.keep])
def test_a_cut_row_is_saved_and_stepped_only_when_it_is_whole_again(kv, seed):
    scheme = scheme_of(kv)
    text, packed = Text(scheme, seed), scheme.packed_tokens(400)
    cache = text.cache()
    text.feed(cache, {0: 400})
    assert cache.truncate(0, packed + 1) == scheme.packed_tokens(packed + 1)
    with pytest.raises(ValueError, match=f"row 0 was cut to {cache.lengths[0]} tokens; feed those that followed"):
        cache.export_row(0)
    text.feed(cache, {0: packed + 1})
    cache.export_row(0)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("context", [512, 640])
def test_a_saved_row_is_cut_while_it_is_read(kv, context, seed):
    """Into a cache that is longer, or has no room for all of it."""
    text = Text(scheme_of(kv), seed)

    @cache_results
    def want(cut: int) -> dict[str, np.ndarray]:
        fresh = text.cache()
        text.feed(fresh, {1: cut}, text=0)
        return fresh.export_row(1)[0]

    for length in LENGTHS:
        cache = text.cache()
        text.feed(cache, {0: length})
        saved = cache.export_row(0)
        for cut in some_cuts(length, seed) + [length]:
            target = text.cache(context if cut > 256 else 256)
            target.import_row(1, saved, length, cut)
            cache.copy(0, 1)
            assert cache.truncate(1, cut) == target.lengths[1]
            if target.lengths[1] < cut:
                text.feed(target, {1: cut}, text=0)
            assert not cut or same(target.export_row(1)[0], want(cut))


@pytest.mark.parametrize("kv", KV)
def test_a_row_is_whole_after_a_pass_that_was_interrupted(kv, seed):
    """The pass has written, and counts or does not: the row has its old tokens, or, where these were overwritten in
    the ring, all that are packed."""
    scheme = scheme_of(kv)
    text, lost = Text(scheme, seed), 0
    for length in LENGTHS:
        cache, fresh = text.cache(), text.cache()
        for row in (cache, fresh):
            text.feed(row, {1: length}, text=0)
        for count in (1, 2, 60, 127):
            for advanced in (False, True):
                cache.copy(1, 0)
                fresh.copy(1, 0)
                batch = cache.batch_for([0], [count])
                text.feed(cache, {0: length + count}, text=1)
                if not advanced:
                    cache.lengths[0] = length
                cache.rollback(batch)
                kept, packed = int(cache.lengths[0]), scheme.packed_tokens(length)
                assert kept == (length if count == 1 or length + count <= packed + scheme.ring else packed)
                lost += kept < length
                if kept == length:
                    assert same_row(cache, fresh)
                for row, end in ((cache, length + 3), (fresh, length + 3)):
                    row.truncate(0, length)
                    text.feed(row, {0: end})
                assert same_row(cache, fresh)
    assert lost


@pytest.mark.parametrize("kv", KV)
def test_a_copied_row_is_the_row_cut_or_not(kv, seed):
    text = Text(scheme_of(kv), seed)
    cache = text.cache()
    text.feed(cache, {0: 300})
    cache.truncate(0, 150)
    cache.copy(0, 1)
    ours = text.feed(cache, {1: 290}, text=0)
    np.testing.assert_array_equal(text.feed(cache, {0: 290}), ours)
    (one,), (two,) = cache.export_row(0), cache.export_row(1)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    cache.reset(0)
    text.feed(cache, {0: 20})
    assert cache.packed_tokens(0) == 0


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("unread", [1, 2])
def test_a_copy_of_a_row_whose_newest_steps_are_not_read_yet_is_cut_where_it_is_whole(kv, unread, seed):
    """A prefix taken over from a row that is being stepped: the host does not count the newest tokens, which may have
    overwritten the window's oldest slot."""
    scheme = scheme_of(kv)
    text = Text(scheme, seed)
    for length in (scheme.ring - 2, scheme.ring - 1, scheme.ring, 255, 256, 383):
        for cut in {length - 1, length, length - 40}:
            cache, fresh = text.cache(), text.cache()
            text.feed(cache, {0: length})
            for end in range(length + 1, length + unread + 1):
                text.feed(cache, {0: end}, text=1)
            cache.lengths[0] = length
            want = cache.left_after_cut(0, cut, unread)
            cache.copy(0, 1)
            assert cache.truncate(1, cut, unread) == want
            if want < cut:
                text.feed(cache, {1: cut}, text=0)
            text.feed(fresh, {1: cut}, text=0)
            np.testing.assert_array_equal(*(text.feed(row, {1: cut + 1}, text=0) for row in (cache, fresh)))
            assert same_row(cache, fresh, 1)
