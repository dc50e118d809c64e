"""A simulated kernel and the real one on the same inputs: equal bits where the order of operations is fixed, else
within what differs.

What differs: the tensor cores truncate where the simulator rounds once (2^-15 of a masked code, tests/test_simt.py),
ex2 and rsqrt are approximations of their own, and nvcc may fuse another product of a * b + c * d.
"""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.ops import attention
from minioscar.oscar import SCHEMES
from minioscar.plans import DecodePlan

from . import simt
from .kernel_device import CudaDevice, SimtDevice, of_row
from .test_decode_attention import filled, history, run, state_of

_no_simt = simt.missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_no_simt is not None, reason=str(_no_simt))]
DEVICES = (SimtDevice(), CudaDevice())


@pytest.mark.parametrize("name", ["int2", "int2-compact", "oscar", "int4", "kivi"])
def test_packed_pages_are_equal_bit_for_bit(seed, name):
    rng = np.random.default_rng(seed)
    sequences = [history(rng, n, 128, "tail", np.ones(128)) for n in (300, 129)]
    pages = []
    for device in DEVICES:
        cache = filled(device, sequences, SCHEMES[name], attention.Heads(2, 2, 128))
        got, table = device.numpy(cache["pages"], allow_unwritten=True), device.numpy(cache["table"])
        pages.append([of_row(got, table, row) for row in range(2)])
    packed = [page[b][:, : n // 128 * 2] for page in pages for b, n in enumerate((300, 129))]
    assert all(np.array_equal(a, b) for a, b in zip(packed[:2], packed[2:], strict=True))


def test_rotated_heads_differ_by_one_rounding_at_most(seed):
    """Of so many numbers that the few whose float32 sums lie near the middle between two BF16 numbers are counted."""
    rng, d, heads, tokens = np.random.default_rng(seed), 128, attention.Heads(8, 2, 128), 40
    qkv, weight = rng.normal(size=(tokens, 12, d)).astype(BF16), rng.uniform(0.5, 2, d).astype(BF16)
    angles, positions = rng.uniform(0, 6, (tokens, d // 2)), np.arange(tokens, dtype=np.int32)[::-1].copy()
    found = []
    for device in DEVICES:
        q, k = device.empty((tokens, 8, d), BF16), device.empty((tokens, 2, d), BF16)
        norms = device.empty((tokens, 128), np.float32)
        tables = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
        weights = device.array(weight), device.array(weight)
        rotation = attention.Rotation(heads, *map(device.array, tables), True, *weights, 1e-6)
        blocks = device.array(np.arange(tokens, dtype=np.int32)[:, None])
        inputs, to = map(device.array, (qkv, positions)), attention.KeyOutputs(k, norms=norms, table=blocks)
        device.run(attention.rotate_scale(rotation, *inputs, q, to))
        found.append([np.array(device.numpy(x, allow_unwritten=True)) for x in (q, k, norms)])
    for a, b in zip(*(f[:2] for f in found), strict=True):
        bits = np.abs(a.view(np.int16).astype(int) - b.view(np.int16).astype(int))
        print(f"{(bits > 0).mean():.1e} of the numbers differ in their last bit")
        assert bits.max() <= 1 and (bits > 0).mean() < 1e-3
    simulated, real = (f[2][np.arange(tokens), positions] for f in found)
    np.testing.assert_allclose(simulated, real, rtol=1e-3)  # one key rounded the other way moves a norm by 2^-9 of it


@pytest.mark.parametrize("name", ["int2", "int2-compact", "oscar", "int4", "bf16"])
def test_decode_attention_differs_by_the_tensor_cores_truncation(seed, name):
    lengths, plan = (300, 1, 128, 513), DecodePlan(4, 1, 4, 2, 5)
    (simulated, _), (real, _) = (
        run(device, SCHEMES[name], 128, plan, lengths, seed, arch=90, reference=False)[0] for device in DEVICES
    )
    error = np.linalg.norm(simulated - real) / np.linalg.norm(real)
    print(f"{name}: {error:.1e}")
    assert error < (2e-5 if name == "bf16" else 2e-4)


def test_the_schedule_is_equal_bit_for_bit(seed):
    lengths = np.random.default_rng(seed).integers(-1, 900, 70).astype(np.int32)
    heads, plan = attention.Heads(8, 2, 128), DecodePlan(4, 1, 4, 2, 13)
    tasks = []
    for device in DEVICES:
        state = state_of(device, heads, SCHEMES["int2"], plan, lengths + 1)
        device.run(attention.schedule(state))
        tasks.append(np.array(device.numpy(state.tasks)))
    assert np.array_equal(*tasks)
    counts = tasks[0][:, : 2 * plan.warps : 2, 3]
    assert counts.max() - counts.min() <= 2  # equal parts of the list: a unit between blocks, another between warps
    assert counts.sum() == sum(units(int(n) + 1) for n in lengths) * 2


def units(tokens: int) -> int:
    """Of one kv head of int2 with 128 channels: pages of 64 tokens, tiles of 11 (sinks and window)."""
    packed = SCHEMES["int2"].packed_tokens(max(tokens - 1, 0))
    return 0 if tokens <= 0 else packed // 64 + (3 if packed else 0) + -(-(tokens - packed) // 11)
