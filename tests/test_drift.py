"""Generation drift, on models and runs whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.evaluation import drift
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES, Scheme
from minioscar.weights import load, rotate_values

from .tiny import write_model


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, Engine]:
    folder = write_model(tmp_path_factory.mktemp("drift") / "m", 11, head_dim=64)
    ops, config = Reference(), Config.from_folder(folder)
    plain = load(folder, config, ops)
    schemes = [SCHEMES[name] for name in ("bf16", "kivi", "int4")] + [
        Scheme("nothing lost", key_bits=8, value_bits=8, rotate=True, scale=True)
    ]
    return {
        s.name: Engine(config, rotate_values(plain, config, ops) if s.rotate else plain, None, s, ops) for s in schemes
    }


PROMPTS = [np.random.default_rng(n).integers(0, 160, 150).tolist() for n in range(2)]


def test_the_unquantized_run_does_not_differ_from_itself(engines):
    row = drift.drift([engines["bf16"]] * 2, PROMPTS, 40)["results"][1]
    assert row == {"kv": "bf16", "first_difference": [None, None], "same_tokens": 1, "kl": [0] * drift.STRETCHES}


def test_first_difference_is_where_the_schemes_own_continuation_leaves(engines):
    """Found by following the unquantized one; here both are generated and compared."""
    row = drift.drift([engines["bf16"], engines["kivi"]], PROMPTS, 60)["results"][1]
    exact, ours = (engines[kv].generate(PROMPTS, max_tokens=61) for kv in ("bf16", "kivi"))
    for found, a, b in zip(row["first_difference"], exact, ours, strict=True):
        same = np.array(a.token_ids) == np.array(b.token_ids)
        assert found == (None if same.all() else int(same.argmin()))
    assert row["first_difference"] != [None, None] and row["same_tokens"] < 1 and min(row["kl"]) > 0


def test_more_bits_drift_less(engines):
    rows = drift.drift([engines[kv] for kv in ("bf16", "kivi", "int4", "nothing lost")], PROMPTS, 40)["results"]
    kl = [float(np.mean(row["kl"])) for row in rows]
    assert kl[0] == 0 < kl[3] < kl[2] / 20 < kl[2] < kl[1] / 5


def test_table_counts_windows_without_a_difference_as_the_whole_length():
    rows = [{"kv": "a", "first_difference": [None, None], "same_tokens": 1.0, "kl": [0.0] * 8},
            {"kv": "b", "first_difference": [10, None], "same_tokens": 0.9, "kl": [0.5] * 8}]
    lines = drift.table({"tokens": 80, "results": rows}).splitlines()
    assert lines[-2].startswith("| a | none in 80 | 1.000 |") and lines[-1].startswith("| b | 45 | 0.900 | 0.5000 |")
    assert "| KL 70–80 |" in lines[2]
