"""Models that read pictures, sound and videos over several cards: the first card's tower, all cards' language model."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from minioscar.app import cli
from minioscar.engine import Engine, load
from minioscar.errors import Failure, UserError
from minioscar.parallel import loading
from minioscar.parallel.ranks import Ranks
from minioscar.serve import server
from minioscar.storage import hub
from minioscar.towers.media import bytes_of_media, check_room

from . import test_llava_and_omni as others
from . import test_pictures as pictures
from . import test_video as videos
from .test_parallel_kernels import SIMULATED, TWO, _cards, _on_one_card, _simulated, split_engine
from .test_pictures import close, greedy, logits, prompt
from .tiny import relative


@cache
def on_two(folder, kv: str) -> Engine:
    return load(folder, kv=kv, device="cpu", tokenizer=False, gpus=2)


@pytest.mark.parametrize("kv", ["bf16", "int2"])
def test_pictures_are_read_over_two_cards_as_transformers_read_them(kv):
    """DeepStack behind the first layers, M-RoPE, the shift of what follows; a ragged batch."""
    model, names, want = on_two(pictures.FOLDER, kv), list(pictures.CASES), pictures.reference()
    for name in names:
        assert close(logits(model, *prompt(name)), want[f"{name}_logits"])
    assert greedy(model, names) == [want[f"{name}_greedy"].tolist() for name in names]


@pytest.mark.parametrize(("case", "number"), [("llava-next", 1), ("llava", 0), ("qwen3-omni", 2), ("qwen3-omni", 4)])
def test_tiles_and_sound_are_read_as_on_one_card(case, number):
    model, one = on_two(others.FIXTURES / case, "int2"), others.engine(case, "int2")
    ids, media = others.encoded(one, case, number)
    assert relative(logits(model, ids, media), logits(one, ids, media)) < 1e-5


@pytest.mark.parametrize("model", videos.FOLDERS)
def test_videos_go_on_as_those_of_transformers(model):
    name = next(iter(videos.CASES[videos.FOLDERS[model]]))
    found = videos.greedy(model, "bf16", [name], on_two(videos.FOLDERS[model], "bf16"))
    assert found == [videos.of(model, name)["greedy"].tolist()]


def test_the_first_card_alone_has_the_tower_and_all_have_what_it_made():
    model = load(pictures.FOLDER, kv="bf16", device="cpu", tokenizer=False, gpus=2)
    parts = loading.load_parts(pictures.FOLDER, model.config, model.ops)
    assert parts[0].towers["image"].keys() == model.config.vision.expected().keys() and not parts[1].towers
    logits(model, *prompt("two"))
    for features in model.model.encoder.kept.values():
        for made in (features.embeddings, *features.deep):
            assert isinstance(made, Ranks) and made.values[0] is not made.values[1]
            np.testing.assert_array_equal(*made.values)


def test_debug_looks_into_the_tower_of_the_first_card():
    model = load(pictures.FOLDER, kv="bf16", device="cpu", tokenizer=False, gpus=2, debug=True)
    logits(model, *prompt("one"))
    model.model.encoder.kept.clear()
    name = "model.visual.blocks.1.mlp.linear_fc1"
    model.model.weights.towers["image"][f"{name}.bias"][3] = np.nan
    with pytest.raises(Failure, match=f"image tower, {name}.weight: .* its bias is not finite"):
        logits(model, *prompt("one"))


def test_room_for_a_tower_is_left_on_each_card(monkeypatch):
    """Its arrays are on the first, and free memory is counted as if all had what the fullest has."""
    model, (_, media) = load(pictures.FOLDER, kv="int2", device="cpu", tokenizer=False, gpus=2), prompt("one")
    need = model.config.vision.work_bytes(media[0].tokens, model.ops)
    held = model.ops.cache_bytes(model.config, model.scheme, 1, 256)
    for free, fits in ((2 * need + held, True), (2 * need + held - 2, False)):
        monkeypatch.setattr(type(model.ops), "free_bytes", lambda self, free=free: free)
        if fits:
            check_room(media, model.config.towers, model.ops, held)
        else:
            with pytest.raises(UserError, match="becomes .* tokens and needs"):
                check_room(media, model.config.towers, model.ops, held)
    plan = server.Plan(1, 256, 128, None, "m", media_tokens=64)
    one = bytes_of_media(model.config.towers, model.ops, 64, 128)
    assert server.media_bytes(model, plan, 256) == 2 * one


def test_a_page_is_read_over_two_cards(capsys):
    """The model that really reads, by the command line."""
    page = hub.resolve("reader") / "page.png"
    asked = "generate", "reader", "A9?", "--image", str(page), "--device", "cpu", "--gpus", "2"
    assert cli.main([*asked]) == 0
    assert capsys.readouterr().out == "X6BN\n"


def test_pages_are_asked_about_over_two_cards(capsys):
    asked = "eval", "reader", "--images", "300", "--pages", "1", "--kv", "int2", "--device", "cpu", "--json"
    found = []
    for gpus in ((), ("--gpus", "2")):
        assert cli.main([*asked, *gpus]) == 0
        found.append(json.loads(capsys.readouterr().out)["images"])
    assert [row["kv"] for row in found[1]["results"]] == ["bf16", "int2"]
    for one, two in zip(*(each["results"] for each in found), strict=True):
        assert abs(one["symbols"] - two["symbols"]) < 0.1  # a symbol of 64 is 0.016


@pytest.mark.long
@pytest.mark.parametrize(
    "make", [pytest.param(_simulated, id="simt", marks=SIMULATED),
             pytest.param(_on_one_card, id="on-one-card", marks=pytest.mark.gpu),
             pytest.param(_cards, id="cuda", marks=TWO)],
)  # fmt: skip
def test_two_cards_by_kernels_read_pictures_and_go_on(make):
    """As test_pictures.py has it of one card: in a wrong shift of a recorded step's rows all that follows is other."""
    model, names, want = split_engine(make, 2, pictures.FOLDER, "int2"), ["row", "first"], pictures.reference()
    assert relative(np.array(logits(model, *prompt("row"), every=False)[0]), want["row_logits"][-1]) < 0.03
    assert greedy(model, names, 3) == [want[f"{name}_greedy"].tolist()[:3] for name in names]
