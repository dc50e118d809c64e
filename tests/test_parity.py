"""minioscar computes what transformers computes: tiny random models of every family, and the real SmolLM2-135M.

The references are committed in tests/fixtures; make_fixtures.py made them and says what is in them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from minioscar.config import Config
from minioscar.engine import Engine, load
from minioscar.model_files.config import MODEL_TYPES
from minioscar.model_files.rope import ROPE_TYPES
from minioscar.oscar import SCHEMES
from minioscar.storage.checkpoint import FLOATS
from minioscar.towers.files import WITH_TOWERS

from .make_fixtures import CASES, CLEAR, FIXTURES, STEPS, spellings
from .pairwise import pairwise

# Both sides are float32 and differ in the order of their sums alone: measured 2e-6 to 5e-6 of the largest logit, on the
# tiny models as on SmolLM2, and transformers itself is up to 3e-6 away from its own float64. So 1e-4 leaves a factor of
# 20 for another BLAS, while every mistake that make_fixtures.py tries (a norm, a bias, eps or a RoPE option ignored)
# moves them by 1e-2 or more.
TOLERANCE = 1e-4


def stages(kv: str) -> list[tuple]:
    """Of a scheme, what may change what a model computes while all is in the window."""
    scheme = SCHEMES[kv]
    return [("kind", type(scheme)), ("stages", scheme.rotate, scheme.scale, scheme.shaped, scheme.quantized)]


CALIBRATED = "llama3", "qwen2", "llama-head-dim-96", "qwen3-moe"  # with oscar-cov, whose samples take a second


def is_paired(case: str, kv: str) -> bool:
    return kv == "bf16" or case != "llama-head-dim-20" and (kv != "oscar-cov" or case in CALIBRATED)  # no groups of 20


# Every case with every stage, and every scheme with some case
PAIRS = pairwise([list(CASES), list(SCHEMES)], [None, stages], is_paired)


def assert_same_logits(ours: np.ndarray, theirs: np.ndarray, what: str = "") -> None:
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert difference < TOLERANCE, f"{what}: {difference:.1e} of the largest logit"  # NaN fails too


def tiny(folder: Path, kv: str = "bf16") -> Engine:
    return load(folder, kv=kv, device="cpu", tokenizer=False)


def reference(case: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / case / "reference.npz") as arrays:
        return dict(arrays)


# --- tiny models of every family


def test_every_supported_architecture_rope_type_and_dtype_has_a_reference() -> None:
    from safetensors import safe_open

    configs = {case: Config.from_folder(FIXTURES / case) for case in CASES}
    assert {config.model_type for config in configs.values()} == set(MODEL_TYPES) - set(WITH_TOWERS)  # test_pictures.py
    assert {config.rope.type for config in configs.values()} == set(ROPE_TYPES)
    assert {config.tie_embeddings for config in configs.values()} == {True, False}
    dtypes = set()
    for path in FIXTURES.glob("*/*.safetensors"):
        with safe_open(path, "np") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}
    assert dtypes == set(FLOATS)
    assert len(list((FIXTURES / "llama3-untied-sharded").glob("model-*.safetensors"))) > 1
    for case, config in configs.items():  # else the prompt would not tell scaled positions from unscaled ones
        assert config.rope.type in ("default", "linear") or len(reference(case)["prompt"]) > config.rope.original


@pytest.mark.parametrize(("case", "kv"), PAIRS)
def test_prefill_logits_are_those_of_transformers_whatever_the_cache_is(case: str, kv: str) -> None:
    """No scheme quantizes what a prefill attends to, and the rotations of q, k and (in the weights) v cancel."""
    expected = reference(case)
    assert_same_logits(tiny(FIXTURES / case, kv).logits(expected["prompt"]), expected["logits"])


@pytest.mark.parametrize(("case", "kv"), PAIRS)
def test_greedy_continuation_within_the_window_is_that_of_transformers(case: str, kv: str) -> None:
    """Up to 128 tokens every scheme keeps keys and values in BF16, which moves the gap between two logits by 0.015 of
    the largest at most.

    That is measured; the prompts were chosen so that the two best tokens are twice as far apart at every step.
    """
    expected = reference(case)
    assert len(expected["greedy"]) == STEPS and expected["gap"].min() > CLEAR * np.abs(expected["logits"]).max()
    generated = tiny(FIXTURES / case, kv).generate(expected["prompt"].tolist(), max_tokens=STEPS)
    assert generated.token_ids == expected["greedy"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_old_and_new_spelling_of_config_json_mean_the_same_model(case: str, tmp_path: Path) -> None:
    expected = reference(case)
    config = json.loads((FIXTURES / case / "config.json").read_text())
    assert "rope_parameters" in config
    shutil.copytree(FIXTURES / case, tmp_path, dirs_exist_ok=True)
    for spelling, other in spellings(case, config).items():
        assert "rope_scaling" in other or spelling == "nothing but shapes"
        (tmp_path / "config.json").write_text(json.dumps(other))
        engine = tiny(tmp_path)
        assert_same_logits(engine.logits(expected["prompt"]), expected["logits"], spelling)
        assert engine.generate(
            expected["prompt"].tolist(), max_tokens=STEPS
        ).token_ids == expected["greedy"].tolist(), spelling


def test_a_sliding_window_limits_the_context_so_that_attention_within_it_is_full() -> None:
    plain, sliding = (Config.from_folder(FIXTURES / name) for name in ("mistral", "mistral-sliding-window"))
    assert (plain.max_context, plain.max_positions, plain.window) == (256, 256, None)
    assert (sliding.max_context, sliding.max_positions, sliding.window) == (128, 256, 128)


# --- SmolLM2-135M, the real one


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Engine]:
    yield load("smollm2-135m", kv="bf16", device="cpu")


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return reference("smollm2-135m")


def test_smollm2_tokens_are_those_of_transformers(smollm2: Engine, expected: dict[str, np.ndarray]) -> None:
    assert smollm2.tokenizer.encode(str(expected["text"])) == expected["text_ids"].tolist()
    assert smollm2.encode("The capital of France is", chat=False) == expected["short_prompt"].tolist()


def test_smollm2_first_token_logits_are_those_of_transformers(smollm2: Engine, expected: dict[str, np.ndarray]) -> None:
    assert_same_logits(smollm2.logits(expected["short_prompt"])[-1], expected["short_logits"])


def test_smollm2_first_token_logits_do_not_depend_on_the_cache(expected: dict[str, np.ndarray]) -> None:
    assert_same_logits(
        load("smollm2-135m", kv="int2", device="cpu").logits(expected["short_prompt"])[-1], expected["short_logits"]
    )


def test_smollm2_logits_of_300_tokens_are_those_of_transformers(
    smollm2: Engine, expected: dict[str, np.ndarray]
) -> None:
    last = smollm2.logits(expected["long_prompt"])[-1]
    assert_same_logits(last[expected["long_top"]], expected["long_top_logits"])
    others = np.delete(last, expected["long_top"])
    assert others.max() <= expected["long_top_logits"].min() + TOLERANCE * np.abs(last).max()


@pytest.mark.parametrize("prompt", ["short", "long"])
def test_smollm2_continues_greedily_as_transformers_for_32_tokens(
    smollm2: Engine, expected: dict[str, np.ndarray], prompt: str
) -> None:
    """transformers keeps keys and values in float32, we in BF16, which moves the gap between the two best tokens by
    0.08 at most.

    The long prompt leaves 0.3 at every step; the short one 0.04 at one, where BF16 happens to move it by 0.004
    (measured).
    """
    # without a tokenizer nothing ends early
    engine = Engine(smollm2.config, smollm2.model.weights, None, smollm2.scheme, smollm2.ops)
    generated = engine.generate(expected[f"{prompt}_prompt"].tolist(), max_tokens=32)
    assert generated.token_ids == expected[f"{prompt}_greedy"].tolist(), f"gaps {expected[f'{prompt}_gap']}"


def test_smollm2_stops_at_its_end_token(smollm2: Engine, expected: dict[str, np.ndarray]) -> None:
    (end,) = smollm2.tokenizer.eos_ids
    tokens = expected["short_greedy"].tolist()
    generated = smollm2.generate("The capital of France is", max_tokens=32, chat=False)
    assert generated.finish_reason == "stop" and generated.token_ids == tokens[: tokens.index(end)]
    assert generated.text.startswith(" Paris.")
