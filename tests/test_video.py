"""Videos through Qwen3-VL and Qwen3-Omni: what transformers computes of frames, of two videos, beside other media.

The references are committed in tests/fixtures; make_video_fixtures.py made them and says what is in them. What users
give and what is refused is in test_video_files.py.
"""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from minioscar.cache import Cache
from minioscar.config import Config
from minioscar.engine import Engine, load
from minioscar.generation import Prompts
from minioscar.ops.reference import Reference
from minioscar.options import Options
from minioscar.towers.media import Medium, expanded, media_of, opened, placed
from minioscar.towers.qwen_video import QwenVideo

from .make_fixtures import FIXTURES
from .make_tower_fixtures import sound
from .make_video_fixtures import CASES, IDS, OMNI, SAID, VL, digest
from .test_cuda_backend import _card, on_each_backend
from .test_pictures import close
from .tiny import relative

TOLERANCE = 4e-5  # of the largest logit, which is 5: 2e-4
FOLDERS = {folder.name: folder for folder in (VL, OMNI)}
ALL = [(folder.name, name) for folder in CASES for name in CASES[folder]]


@cache
def reference(model: str) -> dict[str, np.ndarray]:
    with np.load(FOLDERS[model] / "video.npz") as arrays:
        return dict(arrays)


@cache
def engine(model: str, kv: str = "bf16") -> Engine:
    return load(FOLDERS[model], kv=kv, device="cpu", tokenizer=False)


def of(model: str, name: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(f"{name}_"): x for key, x in reference(model).items() if key.startswith(f"{name}_")}


@cache
def media(model: str, name: str) -> tuple[Medium, ...]:
    """Those of a prompt, in its order."""
    arrays, found = of(model, name), []
    for j in range(len(CASES[FOLDERS[model]][name])):
        if f"video{j}" in arrays:
            source = {"frames": arrays[f"video{j}"], "fps": float(arrays[f"fps{j}"])}
            found.append({"type": "video", "video": source})
        elif f"picture{j}" in arrays:
            found.append({"type": "image", "image": arrays[f"picture{j}"]})
        elif f"sound{j}" in arrays:
            found.append({"type": "audio", "audio": sound(float(arrays[f"sound{j}"]))})
    return media_of(opened([{"role": "user", "content": found}], engine(model).config.towers))


@cache
def prompt(model: str, name: str) -> list[int]:
    """Its ids, those of media in the place of their runs of placeholders."""
    ids: list[int] = []
    placeholders = IDS[FOLDERS[model]][2], IDS[FOLDERS[model]][3], IDS[FOLDERS[model]][6]
    for i in of(model, name)["prompt"].tolist():
        if i not in placeholders or ids[-1:] != [i]:
            ids.append(i)
    return expanded(ids, media(model, name), engine(model).config.towers)


def greedy(model: str, kv: str, names: list[str], device: Engine | None = None, steps: int = 0) -> list[list[int]]:
    """What each prompt goes on with, all in one batch."""
    talker = device or engine(model, kv)
    known = [medium for name in names for medium in media(model, name)]
    steps = steps or len(of(model, names[0])["greedy"])
    run = talker.run(
        Prompts([prompt(model, name) for name in names], media=known), talker.new_cache(len(names), 256),
        Options(max_tokens=steps),
    )  # fmt: skip
    for _ in run:
        pass
    return [result.token_ids for result in run.results]


# --- the processors


@pytest.mark.parametrize("model", FOLDERS)
def test_the_frames_that_are_read_are_those_of_transformers(model: str) -> None:
    """Over lengths around the least and the most frames, and rates that no frame falls on."""
    config = json.loads((FOLDERS[model] / "config.json").read_text())
    config = config.get("thinker_config", config) | {"model_type": config["model_type"]}
    tower = QwenVideo.of(config, {k: v for k, v in SAID[FOLDERS[model]].items() if k != "max_frames"}, "",
                         engine(model).config.vision, 1 << 20)  # fmt: skip
    with open(FIXTURES / "videos.json") as file:
        cases = json.load(file)[model]
    assert len(cases) > 100
    for total, fps, want, taken in cases:
        found = tower.indices(total, fps, want, "a")
        assert (found if isinstance(taken, list) else digest(found)) == taken, (total, fps, want)


def test_the_size_of_frames_is_that_of_transformers_within_the_pixels_of_the_published_files() -> None:
    """Without video_preprocessor_config.json and with a tower of patches of 16 pixels."""
    raw = {"model_type": "qwen3_vl", "video_token_id": 3}
    vision = Config.from_folder(VL).vision
    vision = type(vision)(*(16 if name == "patch" else getattr(vision, name) for name in vars(vision)))
    tower = QwenVideo.of(raw, {}, "", vision, 1 << 20)
    with open(FIXTURES / "videos.json") as file:
        cases = json.load(file)["sizes"]
    assert len(cases) > 40
    for frames, height, width, *size in cases:
        assert list(tower.resized(height, width, frames, "a")) == size, (frames, height, width)


@pytest.mark.parametrize(("model", "name"), ALL)
def test_frames_and_pixels_are_those_of_transformers(model: str, name: str) -> None:
    """Where torchvision resizes instead of Pillow, 97 % of these noisy frames are within a step of 255 (measured)."""
    arrays, tower = of(model, name), engine(model).config.video
    videos = iter([medium for medium in media(model, name) if medium.kind == "video"])
    for j in (key[5:] for key in arrays if key.startswith("video")):
        frames, grid = arrays[f"frames{j}"], tuple(arrays[f"grid{j}"].tolist())
        pairs = [next(videos) for _ in range(grid[0] if model == VL.name else 1)]
        ours = np.concatenate([medium.data for medium in pairs])
        assert np.array_equal(ours[: len(frames)], frames) and len(ours) == 2 * grid[0]
        assert all(np.array_equal(extra, frames[-1]) for extra in ours[len(frames) :])
        patches = [tower.vision.patches(ours[i : i + 2]) for i in range(0, len(ours), 2)]
        assert np.abs(np.concatenate(patches) - arrays[f"pixels{j}"]).max() < 2e-7  # theirs are normalized in one step
        off = np.abs(ours[: len(frames)].astype(int) - arrays[f"filtered{j}"])
        assert (off > 1).mean() < 0.03 and off.max() < 16
        assert sum(medium.tokens for medium in pairs) == np.prod(grid) // 4
    assert next(videos, None) is None


# --- the model


@pytest.mark.parametrize(("model", "name"), ALL)
def test_tower_and_deepstack_are_those_of_transformers_pair_by_pair(model: str, name: str) -> None:
    arrays, talker = of(model, name), engine(model)
    weights, made = talker.model.weights.towers["image"], iter(media(model, name))
    for j in (key[5:] for key in arrays if key.startswith("tower")):
        features = []
        while sum(len(of.embeddings) for of in features) < len(arrays[f"tower{j}"]):
            if (medium := next(made)).kind == "video":
                features.append(talker.config.video.encode(medium, weights, Reference()))
        assert close(np.concatenate([of.embeddings for of in features]), arrays[f"tower{j}"], 1e-5)
        assert close(np.concatenate([np.stack(of.deep) for of in features], axis=1), arrays[f"deep{j}"], 1e-5)


@pytest.mark.parametrize(("model", "name"), ALL)
def test_positions_are_those_of_transformers(model: str, name: str) -> None:
    ids = prompt(model, name)
    inputs = placed([ids], [0], [len(ids)], media(model, name))
    assert np.array_equal(inputs.coordinates, of(model, name)["positions"])
    assert inputs.shifts == (int(inputs.coordinates.max()) + 1 - len(ids),) and inputs.shifts[0] <= 0


@pytest.mark.parametrize("kv", ["bf16", "int2"])
@pytest.mark.parametrize(("model", "name"), ALL)
def test_logits_are_those_of_transformers(model: str, name: str, kv: str) -> None:
    talker, ids = engine(model, kv), prompt(model, name)
    kept = Cache(talker.config, talker.scheme, 1, len(ids), talker.ops)
    batch = kept.batch_for([0], [len(ids)]).reading([ids], media(model, name))
    assert close(talker.model.forward(np.array(ids), kept, batch, every=True), of(model, name)["logits"], TOLERANCE)


@pytest.mark.parametrize("kv", ["bf16", "int2", "oscar"])
@pytest.mark.parametrize("model", FOLDERS)
def test_greedy_continuations_are_those_of_transformers_alone_and_in_a_ragged_batch(model: str, kv: str) -> None:
    names = list(CASES[FOLDERS[model]])
    expected = [of(model, name)["greedy"].tolist() for name in names]
    assert [greedy(model, kv, [name])[0] for name in names] == expected
    assert greedy(model, kv, names) == expected


@on_each_backend
def test_a_card_reads_a_video_and_goes_on_as_the_reference_does(make, monkeypatch) -> None:
    """BF16 against float32."""
    monkeypatch.setenv("MINIOSCAR_BACKEND", "" if make is _card else "tests.simt.backend:Simt")
    talker, model, ids = load(VL, kv="int2", device="auto", tokenizer=False), VL.name, prompt(VL.name, "odd")
    kept = Cache(talker.config, talker.scheme, 1, len(ids), talker.ops)
    batch = kept.batch_for([0], [len(ids)]).reading([ids], media(model, "odd"))
    ours = talker.model.forward(np.array(ids), kept, batch)[0]
    assert relative(ours, of(model, "odd")["logits"][-1]) < 0.03
    assert greedy(model, "int2", ["odd"], talker, 2)[0] == of(model, "odd")["greedy"].tolist()[:2]


# --- no video is taken for another


def test_a_changed_frame_and_another_pace_are_other_ids() -> None:
    frames = of(VL.name, "odd")["video1"]
    other = frames.copy()
    other[5, 3, 3, 1] ^= 64  # in a frame that is read: of eleven at four a second 0, 2, 5, 8 and 10 are
    tower = engine(VL.name).config.video
    first, second = (tower.prepare({"frames": x, "fps": 4.0}, "a") for x in (frames, other))
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, True, True, False, True, True]
    assert not set(first[3].ids) & set(second[3].ids) and first[1].ids != first[5].ids
    omni, arrays = engine(OMNI.name).config.video, of(OMNI.name, "alone")
    fast, slow = (omni.media(arrays["frames1"], [], (2, 4, 5), step, "a")[0] for step in (13, 26))
    assert np.array_equal(fast.data, slow.data) and not set(fast.ids) & set(slow.ids)
    assert Medium.from_json(slow.to_json()) == slow != fast and slow.to_json()["step"] == 26


def test_the_time_of_a_pair_is_the_mean_of_its_frames() -> None:
    made = engine(VL.name).config.video.prepare({"frames": of(VL.name, "odd")["video1"], "fps": 4.0}, "a")
    # frames 0, 2 | 5, 8 | 10 and again 10, at four a second
    assert [text for text in made if isinstance(text, str)] == ["<0.2 seconds>", "<1.6 seconds>", "<2.5 seconds>"]
    assert [medium.grid[0] for medium in made[1::2]] == [1, 1, 1]


def test_what_a_video_takes_in_the_tower_is_what_two_frames_take_and_its_features() -> None:
    """Of Omni, whose videos are one medium: peak and prediction are within a third."""
    talker, frames = engine(OMNI.name), np.random.default_rng(0).integers(0, 256, (8, 128, 160, 3), np.uint8)
    tower = talker.config.video
    tower = replace(tower, max_frames=16, positions=1 << 16, vision=replace(tower.vision, max_pixels=128 * 160))
    [medium] = tower.prepare({"frames": frames, "fps": 2}, "a")
    assert medium.grid == (4, 16, 20)
    tracemalloc.start()
    tower.encode(medium, talker.model.weights.towers["image"], talker.ops)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    predicted = tower.work_bytes(medium.tokens, talker.ops)
    assert peak <= 1.1 * predicted <= 4 / 3 * peak, (peak, predicted)
    assert predicted < tower.work_bytes(medium.tokens // 4, talker.ops) + 9 * medium.tokens * 4 * tower.feature_width
