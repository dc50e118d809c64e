"""config.json of a model with towers: the language model's part, as that of its family, and the towers'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..storage import strict_json as json
from .audio import AudioTower
from .clip import Clip
from .media import Tower
from .qwen_video import FILE as VIDEO_FILE
from .qwen_video import QwenVideo
from .qwen_vision import QwenVision

VIDEOS = "video_processor"
LLAVA, M_ROPE = ("llava", "llava_next"), ("qwen3_vl", "qwen3_omni_moe")
WITH_TOWERS = *M_ROPE, *LLAVA
THETAS = {"qwen3_vl": 500000.0, "qwen3_moe": 1000000.0}  # of a config.json with towers that does not say it


def parts_of(raw: Mapping[str, Any], source: str) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Of a config.json with towers: what the towers stand in, and the language model's part, as the config.json of the
    family that it is of. What stands for both counts for both."""
    model_type, found = raw["model_type"], {}
    whole = raw
    if model_type == "qwen3_omni_moe":
        whole = {**_object(raw, "thinker_config", source), "model_type": model_type}
    text = _object(whole, "text_config", source)
    kind = {"qwen3_vl": "qwen3_vl", "qwen3_omni_moe": "qwen3_moe"}.get(model_type) or text.get("model_type", "llama")
    if model_type in LLAVA and kind not in ("llama", "mistral"):
        raise UserError(f"{source}: {model_type} around a {kind!r} is not supported; only llama and mistral are")
    if model_type == "qwen3_omni_moe":
        found["norm_topk_prob"] = True  # what its class has where nothing is said, unlike Qwen3-MoE
    shared = ("architectures", "tie_word_embeddings", "quantization_config", "compression_config", "quantization")
    found |= {**text, "architectures": None, "model_type": kind, **{name: raw[name] for name in shared if name in raw}}
    ropes = [text, *(of for name in ("rope_parameters", "rope_scaling") if isinstance(of := text.get(name), Mapping))]
    if kind in THETAS and all(of.get("rope_theta") is None for of in ropes):
        found["rope_theta"] = THETAS[kind]
    return whole, found


def preprocessors(folder: Path) -> dict[str, Any]:
    """What the files of a folder say of pictures and sound, and under `video_processor` of videos. Raises UserError."""
    files = folder / "preprocessor_config.json", folder / VIDEO_FILE
    found, videos = (json.read_object(at, "it says how media are read") if at.is_file() else {} for at in files)
    return found | {VIDEOS: videos} if videos else found


def towers_of(
    raw: Mapping[str, Any], preprocessor: Mapping[str, Any], source: str, text: tuple[int, int, int]
) -> dict[str, Tower]:
    """By the names of Config's fields; raw: what they stand in (`parts_of`). preprocessor: as `preprocessors` has it.
    text: hidden size, layers and positions of the language model."""
    kind, (hidden, layers, positions) = raw["model_type"], text
    if kind in LLAVA:
        return {"vision": Clip.of(raw, preprocessor, source, hidden)}
    if kind not in M_ROPE:
        return {}
    vision = QwenVision.of(raw, preprocessor, source, hidden, layers)
    of_videos = preprocessor.get(VIDEOS) or {}
    found = {"vision": vision, "video": QwenVideo.of(raw, of_videos, source, vision, positions)}
    if kind == "qwen3_omni_moe":
        found["audio"] = AudioTower.of(raw, preprocessor, source, hidden, positions)
    return found


def _object(raw: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    if not isinstance(raw.get(key), Mapping):
        raise UserError(f"{source}: {key} must be an object, not {raw.get(key)!r}")
    return raw[key]
