"""Makes what tests/test_video.py compares with: what transformers computes of videos, with models that are there.

    pip install -e '.[parity]' torchvision && python -m tests.make_video_fixtures

The weights are those of tests/fixtures/qwen3-vl and qwen3-omni (make_picture_fixtures.py, make_tower_fixtures.py). Into
each of these folders goes video_preprocessor_config.json, and video.npz, float32 but where said. For each of CASES,
names with its name in front:
  videoJ uint8 [n, height, width, 3] and fpsJ, its frames a second; framesJ uint8, those that are read, resized by
  Pillow; filteredJ, those that torchvision resizes, uint8 [n, height, width, 3]; gridJ; pixelsJ, what the video
  processor makes of framesJ; towerJ and deepJ, what the tower makes of that; pictureJ uint8, soundJ seconds
  prompt int32 [n], each medium's place as many of its tokens as it has; positions int32 [3, n]; logits, greedy, gap as
  in make_fixtures.py
tests/fixtures/videos.json: which frames the two video processors take, and the sizes that they resize to.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .make_fixtures import BITES, CLEAR, FIXTURES
from .make_picture_fixtures import picture
from .make_picture_fixtures import processor as picture_processor
from .make_tower_fixtures import omni_processor

STEPS = 8
VL, OMNI = FIXTURES / "qwen3-vl", FIXTURES / "qwen3-omni"
COMMON = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SAID = {  # of the folders: video_preprocessor_config.json
    VL: {"size": {"shortest_edge": 2048, "longest_edge": 6000}, "fps": 2, "min_frames": 4, "max_frames": 9, **COMMON},
    OMNI: {"size": {"shortest_edge": 1024, "longest_edge": 1600}, "fps": 2, "min_frames": 4, "max_frames": 6, **COMMON},
}
IDS = {  # start, end, picture, video, sound's start, end and itself; those of text are below 90
    VL: (124, 125, 122, 123, None, None, None), OMNI: (90, 89, 95, 93, 91, 92, 94),
}  # fmt: skip
# A number is so much text, a tuple (frames, height, width, frames a second) a video, a pair a picture, a float a sound.
CASES: dict[Path, dict[str, tuple[Any, ...]]] = {
    VL: {
        "odd": (7, (11, 21, 40, 4.0), 6),  # five frames are read, the last twice
        "two": (3, (4, 33, 9, 30.0), 4, (61, 24, 24, 12.0), 5),  # four at least; nine at most
        "mixed": (2, (20, 71), 3, (15, 20, 33, 5.0), 4, (33, 33), 3),
    },
    OMNI: {
        "alone": (5, (9, 32, 40, 4.0), 6),
        "two": (3, (30, 20, 60, 10.0), 4, (4, 36, 36, 2.0), 5),
        "mixed": (2, (40, 70), 3, (12, 33, 33, 5.0), 2, 0.5, 4),
    },
}


def clip(frames: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A picture that moves and flickers, uint8 [frames, height, width, 3]."""
    still = picture(height, width, rng)
    moved = np.stack([np.roll(still, (i, 2 * i), (0, 1)) for i in range(frames)]).astype(int)
    return np.clip(moved + rng.integers(-40, 40, (frames, 1, 1, 3)), 0, 255).astype(np.uint8)


def processor(folder: Path) -> Any:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    made = (Qwen3VLVideoProcessor if folder is VL else Qwen2VLVideoProcessor)(**SAID[folder])
    made.cap_pixels_per_frame = False
    return made


def of_video(folder: Path, video: np.ndarray, fps: float) -> dict[str, Any]:
    """What the processor makes of a video, and of its frames as Pillow resizes them."""
    import torch
    from transformers.video_utils import VideoMetadata

    made, about = processor(folder), VideoMetadata(total_num_frames=len(video), fps=fps)
    tensor = torch.from_numpy(video).permute(0, 3, 1, 2)
    how = {"do_sample_frames": True, "video_metadata": [about], "return_tensors": "np"}
    plain = made([tensor], do_normalize=False, do_rescale=False, **how)
    grid = plain["video_grid_thw"][0]
    height, width = (int(side) * COMMON["patch_size"] for side in grid[1:])
    indices = np.asarray(made.sample_frames(about, fps=SAID[folder]["fps"])).tolist()
    frames = np.stack([np.asarray(Image.fromarray(video[i]).resize((width, height), 3)) for i in indices])
    read = torch.from_numpy(frames).permute(0, 3, 1, 2)
    exact = made([read], do_resize=False, do_sample_frames=False, return_tensors="np")
    assert (exact["video_grid_thw"][0] == grid).all()
    return {
        "indices": np.array(indices, np.int32), "frames": frames, "grid": grid.astype(np.int32),
        "filtered": unpatched(np.asarray(plain["pixel_values_videos"]), grid)[: len(frames)],
        "pixels": np.asarray(exact["pixel_values_videos"], np.float32),
    }  # fmt: skip


def unpatched(pixels: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The frames that these patches are of, uint8 [n, height, width, 3]."""
    (time, rows, columns), patch = (int(n) for n in grid), COMMON["patch_size"]
    x = pixels.reshape(time, rows // 2, columns // 2, 2, 2, 3, 2, patch, patch)
    x = x.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * time, rows * patch, columns * patch, 3)
    return x.round().clip(0, 255).astype(np.uint8)


def load(folder: Path) -> Any:
    import torch
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerForConditionalGeneration

    if folder is VL:
        return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:  # the thinker alone, as it is named there
        config = json.loads((folder / "config.json").read_text())["thinker_config"]
        (Path(scratch) / "config.json").write_text(json.dumps(config | {"vision_start_token_id": IDS[OMNI][0]}))
        tensors = load_file(folder / "model.safetensors")
        named = {name.removeprefix("thinker."): x for name, x in tensors.items() if name.startswith("thinker.")}
        save_file(named, Path(scratch) / "model.safetensors", {"format": "pt"})
        model = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
            scratch, dtype=torch.float32, experts_implementation="eager"
        )
    model.config.vision_start_token_id = IDS[OMNI][0]
    return model.eval()


def inputs_of(folder: Path, case: tuple[Any, ...], rng: np.random.Generator) -> tuple[list[int], dict, dict]:
    """The ids of a prompt, what the model is given beside them, and what is committed of its media."""
    import torch

    start, end, image, video, sound_start, sound_end, audio = IDS[folder]
    ids: list[int] = []
    given: dict[str, list[Any]] = {}
    kept: dict[str, Any] = {}
    for j, part in enumerate(case):
        if isinstance(part, int):
            ids += rng.integers(3, 88, part).tolist()
        elif isinstance(part, float):
            from .make_tower_fixtures import AUDIO, mel_of

            _, of_sound = mel_of(part, 16)
            given |= of_sound
            ids += [sound_start, *[AUDIO] * 7, sound_end]
            kept[f"sound{j}"] = np.array(part)
        elif len(part) == 2:
            pixels = picture(*part, rng)
            made = (picture_processor if folder is VL else omni_processor)()(pixels, input_data_format="channels_last")
            ids += [start, *[image] * int(np.prod(made["image_grid_thw"][0]) // 4), end]
            given.setdefault("pixel_values", []).append(np.asarray(made["pixel_values"]))
            given.setdefault("image_grid_thw", []).append(np.asarray(made["image_grid_thw"]))
            kept[f"picture{j}"] = pixels
        else:
            frames, height, width, fps = part
            source = clip(frames, height, width, rng)
            made = of_video(folder, source, fps)
            time, each = int(made["grid"][0]), int(np.prod(made["grid"][1:]) // 4)
            runs = [each] * time if folder is VL else [each * time]
            for run in runs:
                ids += [*(rng.integers(3, 88, 3).tolist() if folder is VL else ()), start, *[video] * run, end]
            given.setdefault("pixel_values_videos", []).append(made["pixels"])
            given.setdefault("video_grid_thw", []).append(made["grid"][None].astype(np.int64))
            given.setdefault("video_second_per_grid", []).append(np.array([2 / SAID[folder]["fps"]], np.float32))
            kept |= {f"{name}{j}": array for name, array in made.items()}
            kept |= {f"video{j}": source, f"fps{j}": np.array(fps)}
    tensors = {
        name: torch.from_numpy(np.concatenate(arrays)) if isinstance(arrays, list) else arrays
        for name, arrays in given.items()
    }
    if folder is VL:
        tensors.pop("video_second_per_grid", None)
    return ids, tensors, kept


def run(folder: Path, model: Any, ids: list[int], given: dict, new: list[int] = ()) -> np.ndarray:
    """Logits [n, vocab] by one pass without a cache."""
    import torch

    tokens, how = torch.tensor([[*ids, *new]]), {}
    if folder is VL:
        how["mm_token_type_ids"] = (tokens == IDS[VL][2]).int() + 2 * (tokens == IDS[VL][3]).int()
    with torch.no_grad():
        found = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **how, **given)
    return found.logits[0].numpy()


def case_of(folder: Path, name: str, model: Any) -> dict[str, np.ndarray]:
    """The first prompt whose greedy continuation is nowhere close, nor monotonous."""
    import torch

    for seed in range(5000):
        rng = np.random.default_rng([seed, len(name), ord(name[0])])
        ids, given, kept = inputs_of(folder, CASES[folder][name], rng)
        new, gaps = [], []
        for _ in range(STEPS):
            last = run(folder, model, ids, given, new)[-1]
            top = np.sort(last)
            gaps.append(top[-1] - top[-2])
            if not 3 <= last.argmax() < 88 or gaps[-1] < 1.5 * CLEAR * np.abs(last).max():
                break
            new.append(int(last.argmax()))
        if len(new) == STEPS and len(set(new)) >= 3:
            break
    else:
        raise SystemExit(f"{name}: every continuation is ambiguous")
    logits = run(folder, model, ids, given)
    kept |= {"prompt": np.array(ids, np.int32), "logits": logits, "greedy": np.array(new, np.int32)}
    kept |= {"gap": np.array(gaps, np.float32), "positions": positions(folder, model, ids, given)}
    [visual] = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "visual"]
    for j in (int(key[5:]) for key in list(kept) if key.startswith("video")):
        with torch.no_grad():
            made = visual(torch.from_numpy(kept[f"pixels{j}"]), grid_thw=torch.tensor(kept[f"grid{j}"])[None].long())
        kept[f"tower{j}"] = made.pooler_output.numpy()
        kept[f"deep{j}"] = np.stack([deep.numpy() for deep in made.deepstack_features])
    moved = undone(folder, model, ids, given, logits)
    print(f"{folder.name} {name:6} {len(ids):4} tokens, seed {seed}, least gap {min(gaps) / np.abs(logits).max():.3f}",
          moved, flush=True)  # fmt: skip
    return {f"{name}_{key}": np.asarray(array) for key, array in kept.items()}


def positions(folder: Path, model: Any, ids: list[int], given: dict) -> np.ndarray:
    """int32 [3, n]."""
    import torch

    tokens = torch.tensor([ids])
    grids = {name: given.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    if folder is VL:
        kinds = (tokens == IDS[VL][2]).int() + 2 * (tokens == IDS[VL][3]).int()
        found, _ = model.model.get_rope_index(tokens, kinds, **grids)
    else:
        mask = given.get("feature_attention_mask")
        found, _ = model.get_rope_index(
            tokens, **grids, attention_mask=torch.ones_like(tokens), second_per_grids=given["video_second_per_grid"],
            audio_seqlens=None if mask is None else mask.sum(-1),
        )  # fmt: skip
    exact = found[:, 0].numpy()
    assert (exact == exact.round()).all()
    return exact.astype(np.int32)


def undone(folder: Path, model: Any, ids: list[int], given: dict, logits: np.ndarray) -> dict[str, float]:
    """The logits depend on the second frame of a pair, on the order of pairs, and on how fast time passes."""
    import torch

    pixels, others = given["pixel_values_videos"], {}
    x = pixels.reshape(len(pixels), 3, 2, -1)
    others["frames of a pair equal"] = {"pixel_values_videos": x[:, :, :1].expand(x.shape).reshape(pixels.shape)}
    others["time reversed"] = {"pixel_values_videos": torch.flip(pixels, (0,))}
    if folder is OMNI:
        others["time twice as fast"] = {"video_second_per_grid": given["video_second_per_grid"] / 2}
    moved = {
        what: float(np.abs(run(folder, model, ids, given | of) - logits).max() / np.abs(logits).max())
        for what, of in others.items()
    }
    assert min(moved.values()) > BITES, moved
    return {what: round(move, 3) for what, move in moved.items()}


def choices() -> dict[str, Any]:
    """Which frames are read, and sizes, by the processors with their own numbers."""
    import torch
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize
    from transformers.video_utils import VideoMetadata

    rng, found = np.random.default_rng(0), {"qwen3-vl": [], "qwen3-omni": [], "sizes": []}
    lengths = [*range(2, 20), 100, 767, 768, 769, 1537, 9000, *rng.integers(20, 4000, 30).tolist()]
    for total in lengths:
        for fps in rng.choice([1.0, 5.0, 10.0, 12.5, 23.976, 25.0, 29.97, 30.0, 60.0], 3, replace=False).tolist():
            about, want = VideoMetadata(total_num_frames=total, fps=fps), float(rng.choice([0.5, 1.0, 2.0]))
            taken = np.asarray(Qwen3VLVideoProcessor().sample_frames(about, fps=want)).tolist()
            found["qwen3-vl"].append([total, fps, want, taken if total < 200 else digest(taken)])
            if total / fps * want <= 768:
                made = Qwen2VLVideoProcessor(min_frames=4, max_frames=768)
                taken = np.asarray(made.sample_frames(about, fps=want)).tolist()
                found["qwen3-omni"].append([total, fps, want, taken if total < 200 else digest(taken)])
    for _ in range(60):
        frames, height, width = (int(rng.integers(2, 769)), *np.exp(rng.uniform(2.5, 8.4, 2)).astype(int).tolist())
        if max(height, width) < 150 * min(height, width):
            size = smart_resize(frames, height, width, 2, 32, 4096, 25_165_824)
            found["sizes"].append([frames, height, width, *size])
    assert torch.__version__
    return found


def digest(taken: list[int]) -> dict[str, int]:
    """Of a long list: its length, its sum, and the sum of its products with their places."""
    return {"count": len(taken), "sum": sum(taken), "moment": sum(i * n for i, n in enumerate(taken))}


def main() -> None:
    (FIXTURES / "videos.json").write_text(json.dumps(choices()) + "\n")
    for folder, cases in CASES.items():
        (folder / "video_preprocessor_config.json").write_text(json.dumps(SAID[folder], indent=1) + "\n")
        model, arrays = load(folder), {}
        for name in cases:
            arrays |= case_of(folder, name, model)
        np.savez_compressed(folder / "video.npz", **arrays)
        print(folder.name, (folder / "video.npz").stat().st_size)


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
