"""The pool of blocks by itself, and rows that share and swap them: nothing leaks, nothing changes on the way."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.cache import Cache
from minioscar.ops.reference import Reference
from minioscar.serve.blocks import BlockPool, chained_keys
from minioscar.serve.pooled import PooledCache

from .test_cache import config
from .test_cuda_backend import on_each_backend
from .test_window import Text, same_row, scheme_of

KV = ["oscar", "int2", "plain-128-128", "plain-32-96", "oscar-64-0"]


def check_pool(pool: BlockPool, rows: list[list[int]]) -> None:
    """Holders are those that the rows say, and free is what nobody holds."""
    held = [sum(block in row for row in rows) for block in range(pool.size)]
    assert pool.holders == held and set(pool.free) == {block for block, n in enumerate(held) if not n}
    assert all(pool.keys[block] == key for key, block in pool.by_key.items())


def test_random_rows_come_and_go_and_no_block_is_lost_or_given_twice(seed):
    rng, pool, rows = np.random.default_rng(seed), BlockPool(40), []
    texts = [rng.integers(0, 9, 128 * 12).tolist() for _ in range(3)]
    for _ in range(600):
        if rows and rng.random() < 0.45:
            pool.release(rows.pop(rng.integers(len(rows)))[0])
        else:
            text, size = texts[rng.integers(3)], int(rng.integers(1, 12))
            keys = list(chained_keys(text[: 128 * size]))
            found = pool.find(keys)
            if sum(block in pool.free for block in found) + size - len(found) > len(pool.free):
                continue
            pool.hold(found)
            own = pool.take(size - len(found))
            assert not set(own) & {block for row, _ in rows for block in row}
            for block, key in zip(own, keys[len(found) :], strict=True):
                pool.publish(block, key)
            rows.append(([*found, *own], keys))
        check_pool(pool, [row for row, _ in rows])
        for row, keys in rows:  # what a row holds is what its tokens say, as long as it holds it
            assert [pool.keys[block] for block in row] == keys
    for row, _ in rows:
        pool.release(row)
    assert len(pool.free) == 40 and pool.num_shared == 0
    with pytest.raises(ValueError, match="41 blocks are more than the 40 of 40 that are free"):
        pool.take(41)


def test_of_a_row_that_is_gone_the_last_block_is_taken_first():
    pool, keys = BlockPool(4), list(chained_keys(list(range(128 * 3))))
    row = pool.take(3)
    for block, key in zip(row, keys, strict=True):
        pool.publish(block, key)
    pool.release(row)
    assert pool.find(keys) == row and pool.num_known == 3
    for left in (3, 2, 1, 0):  # first the one that nobody can ask for
        pool.take(1)
        assert pool.find(keys) == row[:left]


def test_a_key_is_of_all_tokens_from_the_first_on():
    a = list(range(384))
    b = [*a[:130], 0, *a[131:]]
    one, two = list(chained_keys(a)), list(chained_keys(b))
    assert one[0] == two[0] and one[1] != two[1] and one[2] != two[2]
    assert list(chained_keys(a[128:], one[0])) == one[1:] and list(chained_keys(a[:383])) == one[:2]


class Pool(Text):
    """Rows of a pooled cache fed with a text; keys and values repeat in every row."""

    def pooled(self, blocks: int = 16, batch: int = 3, on_host: int = 0) -> PooledCache:
        return PooledCache(config(num_hidden_layers=1), self.scheme, batch, 512, self.ops, blocks, on_host)

    def grown(self, cache: Cache, slot: int, end: int, text: int = 0) -> np.ndarray:
        if isinstance(cache, PooledCache):
            cache.reserve(slot, end)
        return self.feed(cache, {slot: end}, text)


@pytest.mark.parametrize("kv", KV)
def test_a_row_in_a_pool_is_the_row_in_blocks_of_its_own(kv, seed):
    text = Pool(scheme_of(kv), seed)
    pooled, own = text.pooled(), text.cache()
    for ends in ((100, 7), (130, 300), (257, 301), (400, 430)):  # blocks of the two rows alternate
        for slot, end in enumerate(ends):
            np.testing.assert_array_equal(text.grown(pooled, slot, end, slot), text.grown(own, slot, end, slot))
    assert pooled.table[0, 1] - pooled.table[0, 0] > 1
    assert same_row(pooled, own, 0) and same_row(pooled, own, 1)


@pytest.mark.parametrize("kv", KV)
def test_rows_that_begin_alike_hold_whole_blocks_together_and_write_none_of_them(kv, seed):
    """Whole rows and cut ones; both then go on with texts of their own and are what they are alone."""
    text = Pool(scheme_of(kv), seed)
    for length in (128, 192, 200, 300):
        cache, alone = text.pooled(), text.cache()
        text.grown(cache, 0, 300)
        left = cache.take_over(0, 1, length)
        assert left == cache.left_to_share(0, length) <= length
        whole = min(cache.packed_tokens(0), left) // 128
        assert cache.blocks[0][:whole] == cache.blocks[1][:whole]
        assert not set(cache.blocks[0][whole:]) & set(cache.blocks[1][whole:]) and cache.pool.num_shared == whole
        text.grown(cache, 0, 430)
        text.feed(alone, {0: 300}, 0)
        assert alone.truncate(0, length) >= left
        if left < alone.lengths[0]:
            alone.lengths[0] = alone.cuts[0] = left
        for end in (length, length + 90):
            if end > cache.lengths[1]:
                other = int(end > length)
                both = text.grown(cache, 1, end, other), text.grown(alone, 0, end, other)
                np.testing.assert_array_equal(*both)
        check_pool(cache.pool, cache.blocks)
        again = text.cache()
        text.feed(again, {0: 300}, 0)
        text.feed(again, {0: 430}, 0)
        assert same_row(cache, again, 0)


@pytest.mark.parametrize("kv", KV)
def test_blocks_of_a_row_that_is_gone_begin_another_one(kv, seed):
    """Its sinks with them. Fed from there on, it is the row that a prompt read in pieces up to there would be."""
    scheme, ids = scheme_of(kv), np.random.default_rng(seed).integers(0, 99, 460).tolist()
    text = Pool(scheme, seed)
    cache, pieces = text.pooled(), text.cache()
    text.grown(cache, 0, 400)
    cache.publish(0, ids[:400])
    assert cache.match(list(chained_keys([*ids[:127], 100, *ids[128:]])), 460) == []
    cache.reset(0)
    text.grown(cache, 0, 100, 1)  # of what was known, nothing is taken as long as there is other room
    keys = cache.match(list(chained_keys(ids)), len(ids))
    assert len(keys) == min(scheme.packed_tokens(400), scheme.packed_tokens(460)) // 128
    count = cache.begin_with(1, keys)
    assert count == 128 * len(keys) == cache.lengths[1] == cache.packed_tokens(1)
    text.feed(pieces, {0: 400}, 0)
    pieces.lengths[0] = pieces.cuts[0] = count
    np.testing.assert_array_equal(text.grown(cache, 1, 460), text.grown(pieces, 0, 460))
    (mine,), (theirs,) = cache.export_row(1), pieces.export_row(0)
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    check_pool(cache.pool, cache.blocks)


@pytest.mark.parametrize("kv", KV)
def test_what_the_pool_gave_away_comes_back_from_the_host_as_if_it_had_stayed(kv, seed):
    """Blocks that lie in the pool and blocks that the host alone has, in one chain."""
    scheme, ids = scheme_of(kv), np.random.default_rng(seed).integers(0, 99, 460).tolist()
    text, keys = Pool(scheme, seed), list(chained_keys(ids))
    cache, stayed = text.pooled(blocks=4, on_host=8), text.pooled()
    for of in (cache, stayed):
        text.grown(of, 0, 400)
        of.publish(0, ids[:400])
        of.reset(0)
    whole = len(stayed.match(keys, 460))
    for others in (1, 2, 3, 4):  # so many blocks are taken for another text
        cache.reserve(1, 128 * others)
        for name in cache.block_arrays:
            cache.arrays[name][:, cache.blocks[1]] = 1
        cache.reset(1)
        found = cache.match(keys, 460)
        assert len(found) == whole == cache.free_for(found) > 1
        held, restored = len(cache.host), cache.restored
        cache.begin_with(0, found)
        assert cache.restored - restored == max(others - (4 - whole), 0) <= held and not cache.free_for(found)
        check_pool(cache.pool, cache.blocks)
        cache.reset(0)
    for of in (cache, stayed):
        of.begin_with(0, of.match(keys, 460))
    np.testing.assert_array_equal(text.grown(cache, 0, 460), text.grown(stayed, 0, 460))
    (mine,), (theirs,) = cache.export_row(0), stayed.export_row(0)
    assert all(np.array_equal(mine[name], theirs[name]) for name in mine)


def test_the_host_keeps_what_was_used_last_and_sinks_beside_it(seed):
    """17 beginnings, of which the card keeps the sinks of 16; the host has room for all blocks, then for two."""
    text, rng = Pool(scheme_of("int2"), seed), np.random.default_rng(seed)
    texts = [rng.integers(0, 99, 330).tolist() for _ in range(18)]
    for on_host, count in ((40, 2), (2, 0)):
        cache = text.pooled(blocks=3, on_host=on_host)
        first = None
        for at, ids in enumerate(texts):
            text.grown(cache, 0, 330, at % 2)
            cache.publish(0, ids)
            (of_row,) = cache.export_row(0)
            first = first or of_row
            cache.reset(0)
            found = cache.match(list(chained_keys(ids)), 330)
            assert len(found) == 2 and all(key in cache.pool.by_key for key in found)
        keys = list(chained_keys(texts[0]))
        found = cache.match(keys, 330)
        assert len(found) == count and len(cache.sinks) == 16 and not cache.unused_sinks
        if found:
            assert keys[0] in cache.host_sinks and cache.begin_with(1, found) == 256
            text.grown(cache, 1, 330)
            (again,) = cache.export_row(1)
            assert all(np.array_equal(again[name], first[name]) for name in first if name.startswith("sink"))
        check_pool(cache.pool, cache.blocks)


@on_each_backend
def test_a_block_comes_back_from_the_host_bit_for_bit(make, seed):
    """And a beginning's sinks: random bits in all layers, overwritten on the card meanwhile."""
    rng, scheme, ops = np.random.default_rng(seed), scheme_of("int2"), make()
    cache, ids = PooledCache(config(), scheme, 2, 512, ops, 3, 2), rng.integers(0, 99, 384).tolist()
    names = [name for name in cache.arrays if name != "table"]
    bits = {name: rng.integers(0, 256, cache.arrays[name].nbytes, np.uint8) for name in names}
    for name, of in bits.items():
        array = cache.arrays[name]
        array[...] = ops.xp.asarray(of.view(array.dtype).reshape(array.shape))
    cache.reserve(0, 384)
    cache.lengths[0] = 384
    blocks = cache.blocks[0][:2]
    cache.publish(0, ids)
    cache.reset(0)
    cache.reserve(1, 384)
    cache.unused_sinks.clear()
    cache._sinks_for(b"another beginning")  # in the place of this one's, as many others would have it
    for name in names:
        cache.arrays[name][...] = 0
    cache.reset(1)
    found = cache.match(list(chained_keys(ids)), 384)
    assert len(found) == 2 and not set(found) & cache.pool.by_key.keys()
    cache.begin_with(0, found)
    for name in cache.block_arrays:
        array = cache.arrays[name]
        want = bits[name].view(array.dtype).reshape(array.shape)[:, blocks]
        assert ops.numpy(array)[:, cache.blocks[0]].tobytes() == want.tobytes()
    for name in ("sink_keys", "sink_values"):
        want = bits[name].view(cache.arrays[name].dtype).reshape(cache.arrays[name].shape)[:, 0]
        assert ops.numpy(cache.arrays[name])[:, 0].tobytes() == want.tobytes()


@pytest.mark.parametrize("kv", KV)
def test_a_swapped_row_comes_back_bit_for_bit_whoever_had_its_blocks(kv, seed):
    text = Pool(scheme_of(kv), seed)
    cache, alone = text.pooled(blocks=4), text.cache()
    text.grown(cache, 0, 300)
    text.feed(alone, {0: 300}, 0)
    for other in (None, 130, 500):  # nobody, somebody some, somebody all of them
        cache.swap_out(0)
        assert not cache.blocks[0] and cache.left_to_share(0, 200) == 0
        if other:
            text.grown(cache, 1, other, 1)
            with pytest.raises(ValueError, match="row 0 lacks"):
                cache.reserve(0, 500)
            cache.reset(1)
        cache.reserve(0, 300)
        assert same_row(cache, alone, 0) and not cache.swapped
        check_pool(cache.pool, cache.blocks)
    np.testing.assert_array_equal(text.grown(cache, 0, 460), text.grown(alone, 0, 460))


def test_a_cache_that_packs_nothing_has_no_blocks():
    cache = PooledCache(config(), scheme_of("bf16"), 2, 512, Reference(), 9)
    assert cache.pool.size == cache.missing(0, 512) == cache.most_own == 0
    cache.reserve(0, 512)
    assert cache.match([b"a"], 500) == [] and cache.gauges()["blocks"][0] == 0
