"""LLaVA's tower and Qwen3-Omni's for sound compute what transformers computes, and refuse in one line what they cannot
read. make_tower_fixtures.py made the references and says what is in them."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.ops.cuda import Cuda
from minioscar.ops.reference import Reference
from minioscar.towers import sound, tiles
from minioscar.towers.audio import AudioTower
from minioscar.towers.clip import Clip
from minioscar.towers.media import Medium
from minioscar.weights import load

from .make_fixtures import FIXTURES
from .make_tower_fixtures import BINS, PICTURES, SECONDS
from .make_tower_fixtures import sound as tones
from .simt.backend import Simt

# Both sides are float32: 5e-7 of the largest number where both read the same mel, 1.2e-6 from samples on (measured)
TOLERANCE = 2e-5
LLAVAS = "llava-next", "llava"


def reference(case: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / case / "reference.npz") as arrays:
        return dict(arrays)


def loaded(case: str, kind: str) -> tuple[Clip | AudioTower, dict[str, np.ndarray]]:
    config = Config.from_folder(FIXTURES / case)
    return config.towers[kind], load(FIXTURES / case, config, Reference()).towers[kind]


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()


# --- pictures


@pytest.mark.parametrize("case", LLAVAS)
def test_a_picture_becomes_the_tiles_and_the_features_of_transformers(case: str) -> None:
    expected, (tower, weights) = reference(case), loaded(case, "image")
    for i in range(len(PICTURES)):
        picture = expected[f"picture_{i}"]
        cut = tiles.cut(picture, tower.tile, tower.grids)
        assert np.array_equal(cut.transpose(0, 3, 1, 2), expected[f"tiles_{i}"])
        medium = tower.prepare(picture, "picture")
        features = tower.encode(medium, weights, Reference())
        assert medium.tokens == len(features.embeddings) and not features.deep
        assert_close(features.embeddings, expected[f"features_{i}"])


def test_pictures_of_one_tile_s_pixels_and_two_sizes_are_two_media() -> None:
    """What LLaVA-NeXT leaves out as padding depends on the size, so that the id does, too."""
    tower, _ = loaded("llava-next", "image")
    flat = [tower.prepare(np.full((*size, 3), 7, np.uint8), "picture") for size in ((40, 70), (80, 140))]
    assert flat[0].tokens == flat[1].tokens and flat[0] != flat[1] and flat[0].ids != flat[1].ids


@pytest.mark.parametrize(("size", "grid", "tokens"), [
    ((672, 672), (672, 672), 2928),  # of the paper: 576 + 48 rows of 48 patches and a newline
    ((480, 640), (672, 672), 576 + 36 * 49),
    ((336, 1500), (336, 1008), 576 + 16 * 73),
])  # fmt: skip
def test_a_picture_takes_the_grid_that_shows_most_of_it(size: tuple[int, int], grid: tuple[int, int], tokens: int):
    grids = (336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)
    tower = Clip(32000, 336, 14, 1024, 23, 4096, 16, 1e-5, 4096, grids)
    assert tiles.best_grid(size, grids) == grid and tower.tokens(size) == tokens


# --- sound


@pytest.mark.parametrize("seconds", SECONDS)
def test_a_sound_becomes_the_mel_and_the_features_of_transformers(seconds: float) -> None:
    expected, (tower, weights) = reference("qwen3-omni"), loaded("qwen3-omni", "audio")
    mel = sound.log_mel(tones(seconds), BINS)
    # theirs is float32: 4e-5 in bands that are 1e-7 of the loudest
    assert mel.dtype == np.float32 and np.abs(mel - expected[f"mel_{seconds}"]).max() < 1e-4
    medium = tower.prepare(tones(seconds), "sound")
    features = tower.encode(medium, weights, Reference()).embeddings
    assert medium.tokens == len(features) and medium.grid is None
    assert_close(features, expected[f"features_{seconds}"])


def test_the_mel_of_128_bins_is_that_of_transformers() -> None:
    assert np.abs(sound.log_mel(tones(0.5), 128) - reference("qwen3-omni")["speech_mel"]).max() < 1e-4


def test_a_second_is_13_tokens_and_an_hour_46800() -> None:
    tower, _ = loaded("qwen3-omni", "audio")
    assert [tower.tokens(frames) for frames in (1, 50, 100, 101, 377, 2030, 360000)] == [1, 7, 13, 14, 49, 264, 46800]


def test_silence_is_a_sound_like_any_other() -> None:
    tower, weights = loaded("qwen3-omni", "audio")
    medium = tower.prepare(np.zeros(16000, np.float32), "silence")
    assert np.isfinite(tower.encode(medium, weights, Reference()).embeddings).all()


@pytest.mark.parametrize(("rate", "channels", "name"), [(8000, 1, "a.wav"), (16000, 6, "b.wav"), (44100, 2, "c.flac")])
def test_another_rate_and_more_channels_are_the_same_sound(tmp_path: Path, rate: int, channels: int, name: str) -> None:
    t = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * t).astype(np.float32)
    parts = np.stack([tone * (i + 1) for i in range(channels)], axis=1) * 2 / (channels * (channels + 1))
    soundfile.write(tmp_path / name, parts, rate, subtype="PCM_24")
    found = sound.opened(str(tmp_path / name), name, 10)
    assert found.dtype == np.float32 and found.shape == (16000,)
    wanted = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / channels
    assert np.abs(found - wanted)[800:-800].max() < 1e-3
    assert np.array_equal(sound.opened((tmp_path / name).read_bytes(), name, 10), found)


def test_what_is_no_sound_is_refused_in_one_line(tmp_path: Path) -> None:
    files = {"text.wav": b"no sound at all\n" * 100, "empty.wav": b"", "short.mp3": b"ID3\4\0\0\0\0\0\0"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    soundfile.write(tmp_path / "brief.wav", np.zeros(300, np.float32), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "long.wav", np.zeros(3000 * 100, np.int16), 100)
    sources = {
        "text.wav": "cannot be read as sound", "empty.wav": "cannot be read", "short.mp3": "cannot be read",
        "brief.wav": "19 ms long", "nan.wav": "no numbers", "long.wav": "3000 s long, but this model's context holds",
        "gone.wav": "is no file", "": "is no file",
    }  # fmt: skip
    tower, _ = loaded("qwen3-omni", "audio")
    for name, why in sources.items():
        with pytest.raises(UserError, match=why) as found:
            tower.prepare(str(tmp_path / name), f"audio {name}")
        assert "\n" not in str(found.value) and "object at" not in str(found.value)
    for source in (7, None, np.zeros(16000), np.zeros((16000, 2), np.float32), "a\0b"):
        with pytest.raises(UserError, match="must be a file's name"):
            tower.prepare(source, "audio")


def test_one_sample_that_changed_is_another_sound() -> None:
    tower, _ = loaded("qwen3-omni", "audio")
    samples = tones(0.5)
    other = samples.copy()
    other[4000] += 1e-4
    both = tower.prepare(samples, "sound"), tower.prepare(other, "sound")
    assert not set(both[0].ids) & set(both[1].ids)
    assert Medium.from_json(json.loads(json.dumps(both[0].to_json()))) == both[0]


# --- on kernels


@pytest.mark.parametrize("back_end", ["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("case", "kind"), [("llava", "image"), ("qwen3-omni", "audio")])
def test_towers_run_on_kernels_in_bfloat16(case: str, kind: str, back_end: str) -> None:
    """0.8 % of the largest number on the simulator, for BF16's rounding of 0.4 % in every layer (measured)."""
    tower, weights = loaded(case, kind)
    medium = tower.prepare(reference(case)["picture_3"] if kind == "image" else tones(0.5), kind)
    ops = Simt() if back_end == "simt" else Cuda()
    found = tower.encode(medium, {name: ops.array(x) for name, x in weights.items()}, ops).embeddings
    expected = tower.encode(medium, weights, Reference()).embeddings
    assert found.dtype == ops.dtype and found.shape == expected.shape
    assert np.abs(ops.numpy(found).astype(np.float32) - expected).max() < 0.02 * np.abs(expected).max()


# --- config.json

CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
LLAVA = {  # as published: the language model's part says only what is not Llama's default
    "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "image_token_index": 32000,
    "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "text_config": {
        "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama",
        "rms_norm_eps": 1e-05, "vocab_size": 32064,
    },
    "vision_config": CLIP,
}  # fmt: skip
OMNI_TEXT = {
    "hidden_size": 2048, "intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "max_position_embeddings": 65536, "rope_theta": 1000000.0, "mlp_only_layers": [],
    "shared_expert_intermediate_size": 0, "rope_scaling": {
        "interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default", "type": "default"
    },
}  # fmt: skip
OMNI = {
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe", "talker_config": {},
    "thinker_config": {
        "audio_token_id": 151675, "image_token_id": 151655, "text_config": OMNI_TEXT,
        "audio_config": {"output_dim": 2048}, "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}  # fmt: skip


def changed(raw: dict, change: dict) -> dict:
    """raw with `change` in it, objects within objects."""
    return {
        **raw, **{key: changed(raw[key], new) if isinstance(new, dict) and key in raw else new
                  for key, new in change.items()}
    }  # fmt: skip


def weights_of(tower: Clip | AudioTower) -> int:
    return sum(int(np.prod(shape)) for shape in tower.expected().values())


def test_llava_s_published_config_is_read() -> None:
    c = Config.from_dict(LLAVA)
    shape = c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size
    assert shape == (4096, 11008, 32, 32, 32, 128, 32064) and c.max_positions == 4096 and c.audio is None
    assert (c.vision.depth, c.vision.side, c.vision.token, len(c.vision.grids)) == (23, 24, 32000, 5)
    assert 300e6 < weights_of(c.vision) < 320e6
    assert Config.from_dict(changed(LLAVA, {"text_config": {"model_type": "mistral"}})).num_kv_heads == 8
    assert Config.from_dict(changed(LLAVA, {"model_type": "llava"})).vision.grids is None


def test_qwen3_omni_s_published_config_is_read() -> None:
    c = Config.from_dict(OMNI)
    assert c.experts.count == 128 and c.experts.normalized and c.qk_norm and not c.tie_embeddings
    assert c.rope.axes[:4] == (0, 1, 2, 0) and c.rope.theta == 1e6 and c.max_positions == 65536
    assert (c.audio.mel_bins, c.audio.chunk, c.audio.chunks_per_window, c.audio.token) == (128, 100, 8, 151675)
    assert 640e6 < weights_of(c.audio) < 650e6 and 530e6 < weights_of(c.vision) < 545e6
    assert not Config.from_dict(changed(OMNI, {"thinker_config": {"text_config": {"norm_topk_prob": False}}})
                                ).experts.normalized  # fmt: skip


@pytest.mark.parametrize(("raw", "change", "why"), [
    (LLAVA, {"text_config": {"model_type": "qwen2"}}, "llava_next around a 'qwen2' is not supported"),
    (LLAVA, {"text_config": None}, "text_config must be an object"),
    (LLAVA, {"vision_config": {"model_type": "siglip_vision_model"}}, "model_type 'siglip_vision_model'"),
    (LLAVA, {"vision_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported"),
    (LLAVA, {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\] is not supported"),
    (LLAVA, {"vision_feature_layer": -30}, "must be one of 24 layers"),
    (LLAVA, {"vision_feature_select_strategy": "full"}, "only 'default' is"),
    (LLAVA, {"image_grid_pinpoints": [[336, 500]]}, "whole tiles of 336"),
    (LLAVA, {"model_type": "llava_onevision"}, "model_type 'llava_onevision' is not supported"),
    (OMNI, {"thinker_config": None}, "thinker_config must be an object"),
    (OMNI, {"thinker_config": {"audio_config": {"output_dim": 3584}}}, "output_dim 3584 is not supported"),
    (OMNI, {"thinker_config": {"audio_config": {"activation_function": "relu"}}}, "activation_function 'relu'"),
    (OMNI, {"thinker_config": {"audio_config": {"encoder_attention_heads": 7}}}, "encoder_attention_heads 7"),
])  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(raw: dict, change: dict, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Config.from_dict(changed(raw, change))


@pytest.mark.parametrize(("raw", "said", "why"), [
    (LLAVA, {"image_mean": [0.5, 0.5, 0.5]}, "image_mean"), (LLAVA, {"do_center_crop": False}, "do_center_crop"),
    (LLAVA, {"size": {"shortest_edge": 224}}, "size"), (LLAVA, {"image_grid_pinpoints": [[336, 672]]}, "pinpoints"),
    (OMNI, {"feature_size": 80}, "feature_size 80"), (OMNI, {"sampling_rate": 8000}, "sampling_rate 8000"),
])  # fmt: skip
def test_other_preprocessing_is_refused_by_name(raw: dict, said: dict, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Config.from_dict(raw, pictures=said)


@pytest.mark.parametrize(("case", "name", "said"), [
    ("qwen3-omni", "thinker.audio_tower.layers.0.gate.weight", "audio_tower.layers.0.gate.weight"),
    ("llava", "multi_modal_projector.linear_3.weight", "multi_modal_projector.linear_3.weight"),
])  # fmt: skip
def test_a_tensor_without_a_place_is_refused_and_one_that_is_missing(
    case: str, name: str, said: str, tmp_path: Path
) -> None:
    shutil.copytree(FIXTURES / case, tmp_path, dirs_exist_ok=True)
    config, file = Config.from_folder(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: np.zeros((4, 4), np.float32)}, file)
    with pytest.raises(UserError, match=f"tensor {said} has no place in this architecture"):
        load(tmp_path, config, Reference())
    gone = next(key for key in tensors if key.endswith("v_proj.bias"))
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, file)
    with pytest.raises(UserError, match="v_proj.bias is missing"):
        load(tmp_path, config, Reference())


@pytest.mark.parametrize(("case", "kind"), [("llava-next", "image"), ("llava", "image"), ("qwen3-omni", "audio")])
def test_a_tower_takes_no_more_memory_than_it_says(case: str, kind: str) -> None:
    tower, weights = loaded(case, kind)
    if kind == "image":
        medium = tower.prepare(np.zeros((60, 60, 3), np.uint8), "picture")
    else:
        medium = tower.prepare(tones(20.3), "sound")
    assert_memory(tower, medium, weights)


@pytest.mark.parametrize(("widths", "seconds"), [((96, 32, 32), 3), ((8, 32, 512), 9), ((8, 256, 64), 9)])
def test_a_wide_tower_takes_no_more_memory_than_it_says(widths: tuple[int, int, int], seconds: int) -> None:
    """Wide in its convolutions, in its MLP and in attention."""
    channels, hidden, inner = widths
    tower, rng = AudioTower(1, 32, hidden, 1, 4, inner, channels, 32, 100, 8, 1000), np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in tower.expected().items()}
    assert_memory(tower, tower.prepare(tones(seconds), "sound"), weights)


def assert_memory(tower: Clip | AudioTower, medium: Medium, weights: dict[str, np.ndarray]) -> None:
    tracemalloc.start()
    tower.encode(medium, weights, Reference())
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = tower.work_bytes(medium.tokens, Reference())
    assert taken < said < 8 * taken, (taken, said)
