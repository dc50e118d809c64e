"""Models whose shapes no kernel has: they run on the array path of the CUDA back end in BF16, and say so in one
line."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.engine import Engine
from minioscar.errors import UserError
from minioscar.memory import needed
from minioscar.oscar import SCHEMES

from .test_cuda_backend import on_each_backend
from .test_decode_step import of_backend
from .tiny import MOE, load, relative, write_model

BIASES = {"attention_bias": True, "mlp_bias": True}
SHAPES = {
    "head_dim 96": {"hidden_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 96, **BIASES},
    "head_dim 80": {"hidden_size": 80, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 80},
    "head_dim 20": {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20},
    "head_dim 100": {
        "hidden_size": 200, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": None, **BIASES
    },
    "hidden and intermediate size 60, 50": {
        "hidden_size": 60, "head_dim": 64, "vocab_size": 101, "intermediate_size": 50, **BIASES,
    },
    "hidden and intermediate size 64, 20": {**MOE, "moe_intermediate_size": 20, "head_dim": 64},
}
BY_KERNELS = {"head_dim": 64, **BIASES}, {**MOE, "head_dim": 64}  # nothing is said


@on_each_backend
@pytest.mark.parametrize(("reason", "shape"), [*SHAPES.items(), *(("", shape) for shape in BY_KERNELS)])
def test_a_shape_without_kernels_runs_in_bf16_and_says_why_it_is_slow(make, reason, shape, tmp_path, capsys):
    """Prompts of few tokens, of a batch of kernels and of cuBLAS, and a decode of two rows."""
    reference, other, ops = of_backend(make, write_model(tmp_path / "m", 1, num_hidden_layers=1, **shape), "bf16")
    capsys.readouterr()
    engine = Engine(other.config, other.model.weights, None, other.scheme, ops)
    said = capsys.readouterr().err
    assert said.startswith(f"[{reason}") and "array code" in said and said.count("\n") == 1 if reason else said == ""
    ids = np.random.default_rng(0).integers(0, engine.config.vocab_size, 300)
    for tokens in (5, 40, 300):
        assert relative(np.asarray(engine.logits(ids[:tokens])), reference.logits(ids[:tokens])) < 0.03
    rows = [ids[:20].tolist(), ids[:7].tolist()]
    for ours, theirs in zip(engine.generate(rows, max_tokens=3), reference.generate(rows, max_tokens=3), strict=True):
        assert ours.token_ids == theirs.token_ids


@pytest.mark.parametrize("head_dim", [20, 72, 100])
def test_sizes_without_groups_run_as_they_are_and_refuse_quantized_caches_by_name(head_dim, tmp_path):
    folder = write_model(tmp_path / "m", 2, head_dim=head_dim)
    engine = load(folder, "bf16")
    assert engine.generate(list(range(30)), max_tokens=4).token_ids
    assert needed(engine.config, engine.scheme, engine.ops, 1, 64).cache == 2 * 2 * 2 * 64 * head_dim * 2
    for name in SCHEMES.keys() - {"bf16"}:
        with pytest.raises(UserError, match=f"head_dim {head_dim} is not a multiple of 16.*use --kv bf16"):
            load(folder, name)
