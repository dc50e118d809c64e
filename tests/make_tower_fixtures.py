"""Makes the fixtures of models that see and hear: tiny random checkpoints and what transformers computes with them.

    pip install -e '.[parity]' && python -m tests.make_tower_fixtures [CASE ...]

As make_fixtures.py, whose rules hold: every weight is random, and undoing a feature must move the logits. What is
committed of a case NAME is tests/fixtures/NAME, with reference.npz, all float32 but where said:
  of LLaVA: picture_I uint8 [height, width, 3], tiles_I uint8 [tiles, 3, tile, tile] as its image processor cuts it,
  features_I [tokens, hidden]
  of Omni: mel_SECONDS [frames, bins] and features_SECONDS [tokens, hidden] of `sound(SECONDS)`, speech_mel for 128 bins
  prompt_J int32 [n], logits_J [n, vocab], greedy_J int32 [k], gap_J [k]: of the J-th of PROMPTS
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.make_fixtures import BITES, CLEAR, FIXTURES, ROUTER_GAP, STEPS, save_reference

VOCAB, TEXT = 96, 90  # ids; those of text, the others stand for media
IMAGE = 95
TILE, PATCH = 28, 7
GRIDS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
# height and width: wider, higher, much wider than any grid, smaller than a tile, one where padding is odd
PICTURES = (40, 70), (90, 33), (12, 80), (20, 21), (61, 50)
PROMPTS = (0,), (1,), (2,), (3, 4), (1, 1)  # the pictures of each prompt
BINS = 16  # of the tiny Omni
VISION_START, VISION_END, AUDIO_START, AUDIO_END, AUDIO = 90, 89, 91, 92, 94
OMNI_IDS = {"audio_token_id": AUDIO, "image_token_id": IMAGE, "video_token_id": 93, "audio_start_token_id": AUDIO_START}
OMNI_IDS |= {"position_id_per_seconds": 13}
SECONDS = 0.5, 1.0, 3.77, 20.3
OMNI_PROMPTS = (0.5,), (1.0,), (0,), (4, 1.0), (0.5, 1, 2)  # seconds of sound, and numbers of pictures
OMNI_SIZE = {"shortest_edge": 256, "longest_edge": 1024}  # pixels of its pictures


def picture(number: int) -> np.ndarray:
    """Waves of colour under noise, uint8 [height, width, 3]."""
    height, width = PICTURES[number]
    rng, (y, x) = np.random.default_rng(number), np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(2, 9) + y / rng.uniform(2, 9)) for _ in range(3)]
    return np.clip(128 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)


def sound(seconds: float) -> np.ndarray:
    """A few tones that rise and beat, float32 [samples] at 16 kHz."""
    t = np.arange(round(seconds * 16000)) / 16000
    tones = [np.sin(2 * np.pi * (f * t + 40 * (i + 1) * np.sin(t))) / (i + 1) for i, f in enumerate((180, 710, 2900))]
    return (0.3 * sum(tones) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def text_config(**more: Any) -> dict[str, Any]:
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip
    return shape | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}} | more


# --- from here on with torch and transformers


def randomize(model: Any, seed: int) -> None:
    """Every tensor: matrices around 1/sqrt(fan in), norms' weights in 0.5 ... 1.5, biases around 0.3."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(0, 0.3)
            elif "norm" in name or "ln_" in name:
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim < 2 or "embed" in name and "patch" not in name:
                tensor.normal_(0, 0.3)
            else:
                tensor.normal_(0, 1.2 / tensor[0].numel() ** 0.5)


def logits_of(model: Any, ids: np.ndarray, inputs: dict[str, Any]) -> np.ndarray:
    """ids [n] -> float32 [n, vocab]."""
    return run(model, ids, inputs, use_cache=False).logits[0].numpy()


def run(model: Any, ids: np.ndarray, inputs: dict[str, Any], **how: Any) -> Any:
    """With a mask, without which Qwen3-Omni takes no positions of pictures."""
    import torch

    tokens = torch.from_numpy(ids[None].astype(np.int64))
    with torch.no_grad():
        return model(tokens, attention_mask=torch.ones_like(tokens), **inputs, **how)


def clear_prompt(
    model: Any, rng: np.random.Generator, runs: list[np.ndarray], inputs: dict[str, Any], special: Sequence[int],
    varied: int = STEPS // 2,
) -> dict[str, np.ndarray]:
    """Random text around these runs of placeholders, whose greedy continuation, of 2 * varied tokens, is clear, has so
    many different ones and none of the `special`."""
    steps = 2 * varied
    for _ in range(5000):
        parts = [rng.integers(3, TEXT, rng.integers(4, 12))]
        for run in runs:
            parts += [run, rng.integers(3, TEXT, rng.integers(4, 12))]
        prompt = ids = np.concatenate(parts)
        gaps = []
        for _ in range(steps):
            logits = logits_of(model, ids, inputs)
            low, high = np.sort(logits[-1])[-2:]
            gaps.append(high - low)
            ids = np.append(ids, logits[-1].argmax())
            if gaps[-1] < CLEAR * np.abs(logits).max() or ids[-1] in (2, *special):
                break
        tokens = ids[len(prompt) :]
        good = len(tokens) == steps and len(set(tokens.tolist())) >= varied
        if good and gaps[-1] >= CLEAR * np.abs(logits).max() and router_gap(model, ids, inputs) > ROUTER_GAP:
            first = logits_of(model, prompt, inputs)
            return {
                "prompt": prompt.astype(np.int32), "logits": first, "greedy": tokens.astype(np.int32),
                "gap": np.array(gaps, np.float32),
            }
    raise SystemExit("no prompt has a clear continuation: use another seed")


def router_gap(model: Any, ids: np.ndarray, inputs: dict[str, Any]) -> float:
    """As make_fixtures.py has it."""
    import torch

    if not (count := getattr(model.config.text_config, "num_experts_per_tok", 0)):
        return 1.0
    found = run(model, ids, inputs, output_router_logits=True)
    p = torch.cat([logits.softmax(-1) for logits in found.router_logits]).sort(-1, descending=True).values
    return float((p[:, count - 1] - p[:, count]).min())


def saved(folder: Path, model: Any) -> Any:
    """The model as it is read again: weights in BF16, what is computed in float32."""
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return type(model).from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def make_llava(name: str) -> None:
    """LLaVA-NeXT, or LLaVA-1.5 where the name has no `next`."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    is_next, seed = "next" in name, zlib.crc32(name.encode())
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 3, "image_size": TILE, "patch_size": PATCH, "projection_dim": 32,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "llava_next" if is_next else "llava", text_config=text_config(model_type="llama"), vision_config=vision,
        image_token_index=IMAGE, image_seq_length=(TILE // PATCH) ** 2,
        **({"image_grid_pinpoints": GRIDS} if is_next else {}),
    )
    config.text_config.architectures = ["LlamaForCausalLM"]
    model = AutoModelForImageTextToText.from_config(config).eval()
    randomize(model, seed)
    folder = FIXTURES / name
    model = saved(folder, model)
    processor = image_processor(is_next)
    (folder / "preprocessor_config.json").write_text(processor.to_json_string())
    arrays: dict[str, np.ndarray] = {}
    made = []
    for number in range(len(PICTURES)):
        inputs = processor(picture(number), return_tensors="pt")
        inputs = {key: value for key, value in inputs.items() if is_next or key == "pixel_values"}
        with torch.no_grad():
            features = torch.cat(list(model.get_image_features(**inputs).pooler_output)).reshape(-1, 32).numpy()
        made.append((inputs, len(features)))
        pixels = inputs["pixel_values"].numpy().reshape(-1, 3, TILE, TILE)
        of = {"picture": picture(number), "tiles": without_normalization(pixels), "features": features}
        arrays |= {f"{key}_{number}": value for key, value in of.items()}
    rng = np.random.default_rng(seed)
    for number, shown in enumerate(PROMPTS):
        batch = processor([picture(i) for i in shown], return_tensors="pt")
        batch = {key: value for key, value in batch.items() if is_next or key == "pixel_values"}
        found = clear_prompt(model, rng, [np.full(made[i][1], IMAGE) for i in shown], batch, [IMAGE])
        arrays |= {f"{key}_{number}": value for key, value in found.items()}
        check_bites(f"{name} {number}", model, found["prompt"], batch)
    save_reference(folder, **arrays)
    if not is_next:
        renamed(folder, lambda key: key.replace("vision_tower.", "vision_tower.vision_model."))
    report(name, folder)


def without_normalization(pixels: np.ndarray) -> np.ndarray:
    """The uint8 pixels that these were."""
    from minioscar.towers.tiles import DEVIATION, MEAN

    mean, deviation = (np.array(of)[:, None, None] for of in (MEAN, DEVIATION))
    plain = (pixels * deviation + mean) * 255
    assert np.abs(plain - plain.round()).max() < 1e-3
    return plain.round().astype(np.uint8)


def image_processor(is_next: bool) -> Any:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    sizes = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    if not is_next:
        return LlavaImageProcessorPil(**sizes)
    return LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=GRIDS)


def check_bites(name: str, model: Any, prompt: np.ndarray, inputs: dict[str, Any]) -> None:
    """Every tensor of the tower counts: without it the logits move."""
    import torch

    logits = logits_of(model, prompt, inputs)
    for key, tensor in model.named_parameters():
        of_text = ("language_model", "lm_head", "model.layers", "model.norm", "model.embed")
        if any(of in key for of in (*of_text, "post_layernorm", "vision_tower.encoder.layers.2")):
            continue
        if "visual" in key and "pixel_values" not in inputs or "audio" in key and "input_features" not in inputs:
            continue
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.zero_()
            moved = np.abs(logits_of(model, prompt, inputs) - logits).max() / np.abs(logits).max()
            tensor.copy_(kept)
        # what every key has in common, softmax takes away
        assert moved > BITES / 10 or key.endswith("k_proj.bias"), f"{name}: the logits hardly depend on {key}: {moved}"


def make_omni(name: str) -> None:
    """Qwen3-Omni's thinker."""
    import torch
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerForConditionalGeneration

    seed = zlib.crc32(name.encode())
    rope = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = Qwen3OmniMoeThinkerConfig(
        text_config=text_config(
            rope_parameters=rope, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
        ),
        audio_config={
            "num_mel_bins": BINS, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48, "downsample_hidden_size": 8, "output_dim": 32, "n_window": 50, "n_window_infer": 800,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        },
        **OMNI_IDS,
    )
    config.vision_start_token_id = VISION_START
    model = Qwen3OmniMoeThinkerForConditionalGeneration(config).eval()
    randomize(model, seed)
    folder = FIXTURES / name
    model = saved(folder, model)
    arrays: dict[str, np.ndarray] = {"speech_mel": mel_of(0.5, 128)[0]}
    for seconds in SECONDS:
        mel, inputs = mel_of(seconds, BINS)
        with torch.no_grad():
            features = model.get_audio_features(**inputs).pooler_output.numpy()
        arrays |= {f"mel_{seconds}": mel, f"features_{seconds}": features}
    rng = np.random.default_rng(seed)
    for number, shown in enumerate(OMNI_PROMPTS):
        runs, inputs = omni_inputs(model, shown)
        found = clear_prompt(model, rng, runs, inputs, range(VISION_END, VOCAB), 4)
        arrays |= {f"{key}_{number}": value for key, value in found.items()}
        print(f"{name} {number}: {len(found['prompt'])} tokens", flush=True)
        check_bites(f"{name} {number}", model, found["prompt"], inputs)
    save_reference(folder, **arrays)
    as_published(folder)
    report(name, folder)


def omni_inputs(model: Any, shown: tuple[float | int, ...]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The runs of placeholders of sounds and pictures, and what the model is given of them."""
    import torch

    pictures = [picture(one) for one in shown if isinstance(one, int)]
    processor, runs, inputs = omni_processor(), [], {}
    if pictures:
        made = processor(pictures, input_data_format="channels_last", return_tensors="pt")
        inputs |= {key: made[key] for key in ("pixel_values", "image_grid_thw")}
    grids = iter(inputs.get("image_grid_thw", ()))
    for one in shown:
        if isinstance(one, int):
            runs.append(np.array([VISION_START, *[IMAGE] * (int(next(grids).prod()) // 4), VISION_END]))
            continue
        mel, of_sound = mel_of(one, BINS)
        inputs |= of_sound
        with torch.no_grad():
            count = len(model.get_audio_features(**of_sound).pooler_output)
        runs.append(np.array([AUDIO_START, *[AUDIO] * count, AUDIO_END]))
    return runs, inputs


def omni_processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    half = [0.5] * 3
    return Qwen2VLImageProcessorPil(size=OMNI_SIZE, patch_size=4, image_mean=half, image_std=half)


def as_published(folder: Path) -> None:
    """The thinker's files as they are part of Qwen3-Omni's, with a tensor of the talker's beside them."""
    import torch

    renamed(folder, "thinker.{}".format, {"talker.model.norm.weight": torch.ones(4)})
    thinker = json.loads((folder / "config.json").read_text())
    config = {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe",
        "enable_audio_output": True, "thinker_config": thinker, "talker_config": {}, "code2wav_config": {},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    said = json.loads(omni_processor().to_json_string())
    said |= {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": BINS, "hop_length": 160, "n_fft": 400}
    (folder / "preprocessor_config.json").write_text(json.dumps(said, indent=1) + "\n")


def mel_of(seconds: float, bins: int) -> tuple[np.ndarray, dict[str, Any]]:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=bins)
    made = extractor(
        sound(seconds), sampling_rate=16000, padding=True, truncation=False, return_attention_mask=True,
        return_tensors="pt",
    )
    inputs = {"input_features": made.input_features, "feature_attention_mask": made.attention_mask}
    return made.input_features[0].numpy().T[: int(made.attention_mask.sum())], inputs


def renamed(folder: Path, name: Callable[[str], str], more: dict[str, Any] | None = None) -> None:
    """The weights' file with its tensors called as published files have them, and more tensors."""
    from safetensors.torch import load_file, save_file

    tensors = {name(key): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | (more or {}), folder / "model.safetensors", {"format": "pt"})


def report(name: str, folder: Path) -> None:
    print(f"{name:16} {sum(f.stat().st_size for f in folder.iterdir()) / 1000:.0f} kB")


CASES: dict[str, Callable[[str], None]] = {"llava-next": make_llava, "llava": make_llava, "qwen3-omni": make_omni}


def main(names: list[str]) -> Iterator[str]:
    for name in names or CASES:
        CASES[name](name)
        yield name


if __name__ == "__main__":
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(json.dumps({"transformers": transformers.__version__, "made": list(main(sys.argv[1:]))}))
