"""Pictures through Qwen3-VL: what transformers computes, and that no cache takes one picture for another.

The reference is committed in tests/fixtures/qwen3-vl; make_picture_fixtures.py made it and says what is in it.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from minioscar.cache import Cache
from minioscar.engine import Engine, load
from minioscar.generation import Prompts
from minioscar.ops.reference import Reference
from minioscar.options import Options
from minioscar.oscar import SCHEMES
from minioscar.towers.media import Medium, expanded, placed

from .make_picture_fixtures import CASES, FOLDER, STEPS
from .test_cuda_backend import _card, on_each_backend
from .tiny import relative

PICTURES = [name for name in CASES if name != "text"]
TOLERANCE = 4e-5  # of the largest logit, which is 5: 2e-4


@cache
def reference() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "reference.npz") as arrays:
        return dict(arrays)


@cache
def engine(kv: str = "bf16") -> Engine:
    return load(FOLDER, kv=kv, device="cpu", tokenizer=False)


@cache
def prompt(name: str) -> tuple[list[int], tuple[Medium, ...]]:
    """Its ids and media."""
    vision, arrays = engine().config.vision, reference()
    pictures = [arrays[key] for key in (f"{name}_picture0", f"{name}_picture1") if key in arrays]
    media = [vision.prepare(picture, "picture") for picture in pictures]
    ids: list[int] = []
    for i in arrays[f"{name}_prompt"].tolist():  # one placeholder for each, as a chat template writes it
        if i != vision.token or ids[-1:] != [i]:
            ids.append(i)
    return expanded(ids, media, engine().config.towers), tuple(media)


def logits(model: Engine, ids: Sequence[int], media: Sequence[Medium], every: bool = True) -> np.ndarray:
    kept = Cache(model.config, model.scheme, 1, len(ids), model.ops)
    batch = kept.batch_for([0], [len(ids)]).reading([ids], media)
    return model.model.forward(np.array(ids), kept, batch, every=every)


def greedy(model: Engine, names: Sequence[str], steps: int = STEPS) -> list[list[int]]:
    """What each prompt goes on with, all in one batch."""
    rows = [prompt(name) for name in names]
    run = model.run(
        Prompts([ids for ids, _ in rows], media=[medium for _, media in rows for medium in media]),
        model.new_cache(len(rows), 512), Options(max_tokens=steps),
    )  # fmt: skip
    for _ in run:
        pass
    return [result.token_ids for result in run.results]


def close(ours: np.ndarray, theirs: np.ndarray, bound: float = TOLERANCE) -> bool:
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() < bound * np.abs(theirs).max())


# --- as transformers


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_tower_and_deepstack_are_those_of_transformers(name: str) -> None:
    vision, arrays, model = engine().config.vision, reference(), engine().model
    for j, medium in enumerate(prompt(name)[1]):
        assert np.array_equal(vision.patches(medium.data), arrays[f"{name}_pixels{j}"])
        features = vision.encode(medium, model.weights.towers["image"], Reference())
        assert close(features.embeddings, arrays[f"{name}_tower{j}"], 1e-5)
        assert close(np.stack(features.deep), arrays[f"{name}_deep{j}"], 1e-5)


@pytest.mark.parametrize("name", PICTURES)
def test_positions_are_those_of_transformers(name: str) -> None:
    ids, media = prompt(name)
    inputs = placed([ids], [0], [len(ids)], media)
    assert np.array_equal(inputs.coordinates, reference()[f"{name}_positions"])
    assert inputs.shifts == (int(inputs.coordinates.max()) + 1 - len(ids),)


def test_tables_of_rope_lie_row_by_row() -> None:
    """CuPy's asarray keeps NumPy's order, and a kernel takes a token's angles for neighbours."""
    ids, media = prompt("row")
    coordinates = placed([ids], [0], [len(ids)], media).coordinates
    assert all(table.flags.c_contiguous for table in engine().config.rope.tables_at(coordinates))


@pytest.mark.parametrize(
    ("name", "kv"),
    [*((name, "bf16") for name in CASES), *(("two", kv) for kv, scheme in SCHEMES.items() if not scheme.calibrated)]
)
def test_logits_are_those_of_transformers_whatever_the_cache_is(name: str, kv: str) -> None:
    assert close(logits(engine(kv), *prompt(name)), reference()[f"{name}_logits"])


@pytest.mark.parametrize("kv", ["bf16", "int2", "oscar", "kivi"])
def test_greedy_continuations_are_those_of_transformers_alone_and_in_a_ragged_batch(kv: str) -> None:
    expected = [reference()[f"{name}_greedy"].tolist() for name in CASES]
    assert greedy(engine(kv), list(CASES)) == expected
    assert [greedy(engine(kv), [name])[0] for name in CASES] == expected


# --- on a card


@on_each_backend
def test_a_card_reads_pictures_and_goes_on_as_the_reference_does(make, monkeypatch) -> None:
    """BF16 against float32; greedy tokens are clear in both (make_picture_fixtures.py). The steps are recorded ones,
    whose rows have shifts of their own: in a wrong one all that follows would be other."""
    monkeypatch.setenv("MINIOSCAR_BACKEND", "" if make is _card else "tests.simt.backend:Simt")
    model, names = load(FOLDER, kv="int2", device="auto", tokenizer=False), ["row", "first"]
    assert model.ops.name == ("cuda" if make is _card else "simt")
    ours, theirs = logits(model, *prompt("row"), every=False)[0], reference()["row_logits"][-1]
    assert relative(ours, theirs) < 0.03
    assert greedy(model, names, 3) == [reference()[f"{name}_greedy"].tolist()[:3] for name in names]


def test_what_a_tower_takes_is_predicted_within_a_third() -> None:
    model = engine()
    vision = replace(model.config.vision, max_pixels=1 << 20)
    medium = vision.prepare(np.random.default_rng(0).integers(0, 256, (112, 176, 3), np.uint8), "picture")
    tracemalloc.start()
    vision.encode(medium, model.model.weights.towers["image"], model.ops)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert medium.tokens == 308 and peak <= 1.1 * vision.work_bytes(308, model.ops) <= 4 / 3 * peak
