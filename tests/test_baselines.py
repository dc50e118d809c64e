"""The published baselines: their bytes are those that they are billed for, and each of their stages counts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from minioscar import oscar
from minioscar.attention_inputs import AttentionInputs
from minioscar.cache import cache_bytes
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.evaluation import baselines, own_samples
from minioscar.hadamard import hadamard
from minioscar.ops.paged import kernel_cache
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES, WINDOW
from minioscar.weights import load as load_weights

from .patience import PATIENCE
from .tiny import CONFIG, load, relative, write_model

NAMES = [scheme.name for scheme in baselines.RIVALS]


def block(seed: int, dim: int = 64, tokens: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values, [2, tokens, dim]: channels and tokens of unequal sizes, a few of them far from the others."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0, 0.7, (2, 2, 1, dim)) * rng.lognormal(0, 0.7, (2, 2, tokens, 1))
    return tuple((rng.standard_normal((2, 2, tokens, dim)) * sizes).astype(np.float32))


def round_trip(scheme: oscar.Scheme, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is read back of keys and values: through H where the scheme wants them rotated, and back again."""
    turn = oscar.rotate if scheme.rotate else np.asarray
    norms = oscar.token_norms(keys.swapaxes(0, 1))
    back = scheme.unpack(scheme.pack(turn(keys), turn(values), norms), norms)
    return turn(back[0]), turn(back[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_stored_bytes_are_the_billed_bits(name, dim, seed):
    """Scales included. Beside the blocks a cache keeps its window and sinks in BF16, which are not in these bits."""
    scheme, tokens = SCHEMES[name], 3 * WINDOW
    keys, values = block(seed, dim, tokens)
    packed = scheme.pack(keys, values, None)
    assert {name: (x.shape[1:], x.dtype) for name, x in packed.items()} == scheme.packed_layout(tokens, dim)
    billed = scheme.bits_per_element(dim) * keys.size * 2 / 8
    assert sum(x.nbytes for x in packed.values()) == pytest.approx(billed, rel=1e-12)
    config = Config.from_dict({**CONFIG, "head_dim": dim})
    whole = 2 * config.num_layers * config.num_kv_heads * dim
    kept = 2 * (WINDOW + scheme.sinks)
    want = whole * (tokens * scheme.bits_per_element(dim) / 8 + kept)
    assert cache_bytes(config, scheme, 1, tokens) == pytest.approx(want, rel=1e-12)
    assert kernel_cache(config, scheme) is None


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("kvarn-2", {"rotate": False}), ("kvarn-2", {"rounds": 0}), ("kvarn-2", {"rounds": 1}),
        ("kvarn-2", {"key_bits": 4}), ("kvarn-k4v2", {"value_bits": 4}), ("oscar-cov", {"key_clip": 1.0}),
        ("oscar-cov", {"value_clip": 1.0}), ("oscar-cov", {"rotate": False}), ("q4_0", {"rotate": False}),
        ("q4_0", {"group": 64}), ("turboquant", {"group": 32}), ("ott", {"outliers": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_each_stage_changes_what_is_read_back(name, without, seed):
    keys, values = block(seed)
    scheme = SCHEMES[name]
    whole, less = round_trip(scheme, keys, values), round_trip(replace(scheme, **without), keys, values)
    changed = [not np.array_equal(a, b) for a, b in zip(whole, less, strict=True)]
    kind = next(iter(without))
    assert changed == [not kind.startswith("value_"), not kind.startswith("key_")]


def test_equal_deviations_makes_rows_and_columns_alike(seed, monkeypatch):
    """Within the authors' limits it does what it can; without them it converges."""
    keys, _ = block(seed, tokens=WINDOW)

    def spreads(x: np.ndarray) -> np.ndarray:
        return np.array([(d := x.std(axis=over, ddof=1)).max(axis=-1) / d.min(axis=-1) for over in (-1, -2)])

    for axis in (-1, -2):
        along, across = baselines.equal_deviations(100 * keys, axis, 16)
        assert (spreads(keys / along / across).sum(axis=0) < spreads(keys).sum(axis=0)).all()
    monkeypatch.setattr(baselines, "LIMITS", np.exp(np.array([-20, 20], np.float32)))
    for axis in (-1, -2):
        along, across = baselines.equal_deviations(100 * keys, axis, 16)
        assert along.shape[axis] == 1 and across.shape[-3 - axis] == 1
        assert spreads(keys / along / across).max() < 1.05 < 3 < spreads(keys).min()


def test_equal_deviations_gives_the_same_scales_whoever_sums_the_numbers(seed):
    """Many rounds are equal but for a rounding, and each has another share of the tile's size in either scale."""
    rng = np.random.default_rng(seed)
    tiles = rng.standard_normal((40, WINDOW, 64)).astype(np.float32)
    nearly = (tiles * (1 + 1e-7 * rng.standard_normal(tiles.shape))).astype(np.float32)
    for axis in (-1, -2):
        for a, b in zip(*(baselines.equal_deviations(x, axis, 16) for x in (tiles, nearly)), strict=True):
            assert np.abs(a / b - 1).max() < 1e-5


def test_equal_deviations_never_leaves_a_tile_less_even_than_it_was():
    """A tile of zeros, one with a dead channel, one of small numbers: the scales stay within limits, and finite."""
    tiles = np.random.default_rng(0).standard_normal((4, WINDOW, 64)).astype(np.float32)
    tiles[0] = 0
    tiles[1, :, 3] = 0
    tiles[2] *= 1e-4
    tiles[3] *= 1e6
    low, high = baselines.LIMITS
    for scale in (scales := baselines.equal_deviations(tiles, -2, 16)):  # a factor moves between them afterwards
        assert np.isfinite(scale).all() and scale.min() >= low * low / high and scale.max() <= high * high / low
    product = scales[0] * scales[1]
    assert product.min() >= 0.999 * low * low and product.max() <= 1.001 * high * high
    scheme = SCHEMES["kvarn-2"]
    back, _ = scheme.unpack(scheme.pack(tiles[:3], tiles[:3], None), None)
    assert np.array_equal(back[0], tiles[0]) and np.isfinite(back).all()


def test_kvarn_is_its_formula_by_hand(seed):
    """One token and channel each: (code * step + min) * scale, keys scaled by token, values by channel."""
    keys, values = block(seed, tokens=WINDOW)
    scheme = SCHEMES["kvarn-k4v2"]
    row = scheme.pack(keys, values, None)
    back = scheme.unpack(row, None)
    codes = {kind: oscar.unpack(row[f"{kind}_codes"], bits) for kind, bits in (("key", 4), ("value", 2))}
    for t, c in ((0, 0), (17, 63), (127, 5)):
        for head in (0, 1):
            for kind, step, scale in (("key", (0, c), (t, 0)), ("value", (t, 0), (0, c))):
                places = {"step": step, "min": step, "scale": scale}
                s, low, other = (np.float32(row[f"{kind}_{name}"][head][at]) for name, at in places.items())
                want = (codes[kind][head, t, c] * s + low) * other
                assert back[kind == "value"][head, t, c] == pytest.approx(want, rel=1e-6)
    assert relative(back[0], keys) < 0.12 and relative(back[1], values) < 0.6


def test_q4_0_is_what_ggml_writes():
    """quantize_row_q4_0_ref, number by number; the largest number of a block negative, positive, and zero."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 1, 32)).astype(np.float32)
    x[0, 0, 7], x[1, 0, 30], x[2] = -5, 5, 0
    codes, step = SCHEMES["q4_0"].quantize(x, 32, np)
    for i in range(3):
        largest = max(x[i, 0], key=abs)
        d = np.float32(largest / -8)
        want = [min(15, int(np.float32(v * (1 / d if d else 0)) + np.float32(8.5))) for v in x[i, 0]]
        assert step[i, 0, 0] == np.float16(d)
        assert abs(codes[i, 0].astype(int) - want).max() == 0
    assert codes[0, 0, 7] == 0 and codes[1, 0, 30] == 0  # the largest is -8 whatever its sign
    np.testing.assert_array_equal(SCHEMES["q4_0"].dequantize(codes, step, np)[2], x[2])


def test_clipping_keeps_all_but_the_ends_of_a_group():
    x = np.random.default_rng(1).permutation(128).astype(np.float32)[None]
    got = baselines.clip_to_ranks(x, 128, 0.96)
    assert (got.min(), got.max()) == (4, 122) and np.array_equal(got[(x > 4) & (x < 122)], x[(x > 4) & (x < 122)])
    halves = baselines.clip_to_ranks(x, 64, 0.92)
    for half, whole in zip(halves.reshape(2, 64), x.reshape(2, 64), strict=True):
        assert (half.min(), half.max()) == (np.sort(whole)[4], np.sort(whole)[58])
    np.testing.assert_array_equal(baselines.clip_to_ranks(x, 64, 1.0), x)


# --- the calibrated one


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("calibrated") / "m", 6, head_dim=64, model_type="qwen2")
    config, ops = Config.from_folder(folder), Reference()
    plain = load_weights(folder, config, ops)
    return folder, config, ops, plain, own_samples.calibrate(plain, config, ops)


def test_rotations_are_orthogonal_and_differ_by_layer_head_and_kind(calibrated):
    _, config, _, plain, weights = calibrated
    found = np.stack([layer.rotations for layer in weights.layers])
    assert found.shape == (config.num_layers, 2, config.num_kv_heads, 64, 64)
    np.testing.assert_allclose(found @ found.swapaxes(-1, -2), np.broadcast_to(np.eye(64), found.shape), atol=1e-5)
    each = found.reshape(-1, 64, 64)
    assert all(relative(a, b) > 0.1 for i, a in enumerate(each) for b in [*each[:i], hadamard(64)])
    assert plain.layers[0].rotations is None and weights.layers[0].down is plain.layers[0].down


def test_samples_are_the_same_every_time_and_the_models_own(calibrated):
    _, config, ops, plain, weights = calibrated
    ids = own_samples.samples(plain, config, ops)
    assert ids.shape == (own_samples.ROWS, own_samples.TOKENS) and 0 <= ids.min() <= ids.max() < config.vocab_size
    np.testing.assert_array_equal(ids, own_samples.samples(plain, config, ops))
    other = replace(plain, head=plain.head[::-1].copy())
    assert (own_samples.samples(other, config, ops)[:, 0] == ids[:, 0]).all()  # the first is drawn without the model
    assert (own_samples.samples(other, config, ops) != ids).mean() > 0.5


def test_covariances_are_those_of_queries_and_of_values_by_their_weight(seed):
    """Two samples are as one; a token whose key no query looks along counts for nothing among the values."""
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((10, 4, 8)), rng.standard_normal((10, 2, 8)), rng.standard_normal((10, 2, 8))
    q[..., 5:] = 0
    k[3, :, :5] = 0
    moments = own_samples.Moments()
    for part in (slice(0, 4), slice(4, 10)):
        moments.add(AttentionInputs(q[part], k[part], v[part]))
    queries, values = moments.covariances()
    for head in range(2):
        mine = q[:, 2 * head : 2 * head + 2].reshape(-1, 8)
        np.testing.assert_allclose(queries[head], mine.T @ mine)
        pairs = [(k[t, head], v[t, head]) for t in range(10) if t != 3]
        want = sum((key @ queries[head] @ key) * np.outer(value, value) for key, value in pairs)
        np.testing.assert_allclose(values[head], want)


def test_a_mixed_rotation_spreads_every_eigenvector_evenly(seed):
    """In the rotated channels each direction that queries look along has the same share, whatever its weight."""
    x = np.random.default_rng(seed).standard_normal((2, 200, 16)) * np.geomspace(1, 100, 16)
    covariance = x.swapaxes(1, 2) @ x
    rotated = own_samples.mixed(covariance).swapaxes(1, 2) @ covariance @ own_samples.mixed(covariance)
    diagonal = np.diagonal(rotated, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal / diagonal.mean(axis=1, keepdims=True), 1, rtol=1e-3)


def test_the_folded_rotations_change_nothing_until_something_is_quantized(calibrated, seed):
    folder, config, *_ = calibrated
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, 300)
    ours, exact = load(folder, "oscar-cov"), load(folder, "bf16")
    assert relative(ours.logits(ids), exact.logits(ids)) < 1e-4  # a prompt attends to itself as it is


def test_a_calibrated_cache_goes_into_no_file(calibrated, tmp_path):
    folder, *_ = calibrated
    cache = load(folder, "oscar-cov").prefill(list(range(40)))
    with pytest.raises(UserError, match="oscar-cov cannot be written.*use another --kv"):
        cache.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "said"),
    [("eval nowhere --kv nothing", ", ".join(SCHEMES)), ("generate nowhere x --kv nothing", ", ".join(SCHEMES)),
     ("cache nowhere --prompt-file F --out x --kv oscar-cov", "oscar-cov cannot be written to a file")],
)  # fmt: skip
def test_the_command_line_knows_them_in_a_process_of_its_own(args, said):
    """Here they are imported by conftest.py."""
    command = [sys.executable, "-m", "minioscar", *args.replace(" F ", f" {__file__} ").split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and said in done.stderr and "\n" not in done.stderr.strip()
