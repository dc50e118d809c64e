"""Makes tests/fixtures/qwen3-vl: a tiny random Qwen3-VL as transformers saves it, and what transformers computes with
it.

    pip install -e '.[parity]' pillow && python -m tests.make_picture_fixtures

The folder holds config.json, preprocessor_config.json, the weights in BF16, and reference.npz (float32 arithmetic on
the rounded weights). For each of CASES, names with its name in front: pictureJ uint8 [height, width, 3]; pixelsJ, what
transformers' image processor makes of it, float32 [patches, 96]; towerJ and deepJ, what its tower makes of that;
prompt int32 [n], a picture's place as many image tokens as it has; positions int32 [3, n]; logits, greedy, gap as in
make_fixtures.py. As there, undoing any feature must move the logits.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .make_fixtures import BITES, CLEAR, FIXTURES, save_reference

FOLDER = FIXTURES / "qwen3-vl"
IMAGE, VOCAB, STEPS = 122, 128, 10
PATCH, SIZE = 4, {"shortest_edge": 256, "longest_edge": 4096}
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512, "rms_norm_eps": 1e-3, "eos_token_id": 2,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True
    },
}  # fmt: skip
VISION = {
    "depth": 4, "hidden_size": 48, "intermediate_size": 72, "num_heads": 2, "patch_size": PATCH, "out_hidden_size": 64,
    "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 3],
}
CASES = {  # a number is so much text, a pair the height and width of a picture
    "one": (9, (40, 24), 12),
    "two": (3, (20, 71), 5, (49, 33), 8),  # the first is resized to 24 x 72: other than both of its sizes
    "row": (4, (8, 64), 7),  # one row of merged patches
    "first": ((33, 33), 6),
    "text": (40,),
}


def build() -> Any:
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(3)
    ids = {"image_token_id": IMAGE, "video_token_id": 123, "vision_start_token_id": 124, "vision_end_token_id": 125}
    config = Qwen3VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False, **ids)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                tensor.normal_(0, 0.5)
            elif "embed_tokens" in name or "pos_embed" in name:
                tensor.normal_(0, 0.3)
            else:
                tensor.normal_(0, 1.5 / np.prod(tensor.shape[1:]) ** 0.5)
    return model.to(torch.bfloat16).eval()


def load(folder: Path = FOLDER, change: dict[str, Any] | None = None) -> Any:
    """change: of config.json, by its part."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    with tempfile.TemporaryDirectory() as scratch:
        if change:
            shutil.copytree(folder, scratch, dirs_exist_ok=True)
            config = json.loads((folder / "config.json").read_text())
            for part, values in change.items():
                config[part] |= values
            (Path(scratch) / "config.json").write_text(json.dumps(config))
            folder = Path(scratch)
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return model.eval()


def processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    half = [0.5] * 3
    return Qwen2VLImageProcessorPil(size=SIZE, patch_size=PATCH, image_mean=half, image_std=half)


def picture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Coarse and fine structure, so that both the filter of the resize and the place of a patch matter."""
    coarse = rng.integers(0, 256, (3, 3, 3)).repeat(-(-height // 3), 0).repeat(-(-width // 3), 1)[:height, :width]
    return np.clip(coarse + rng.integers(-60, 60, (height, width, 3)), 0, 255).astype(np.uint8)


def inputs_of(case: tuple[Any, ...], rng: np.random.Generator) -> tuple[list[int], list[np.ndarray], Any]:
    """The ids of a prompt, its pictures, and what the processor makes of these."""
    ids: list[int] = []
    pictures = []
    for part in case:
        if isinstance(part, int):
            ids += rng.integers(3, 120, part).tolist()
            continue
        pictures.append(picture(*part, rng))
        grid = processor()(pictures[-1], input_data_format="channels_last")["image_grid_thw"][0]
        ids += [124, *[IMAGE] * int(np.prod(grid) // 4), 125]
    return ids, pictures, processor()(pictures, input_data_format="channels_last") if pictures else None


def run(model: Any, ids: list[int], pixels: Any, new: list[int] = ()) -> np.ndarray:
    """Logits [n, vocab] by one pass without a cache."""
    import torch

    tokens = torch.tensor([[*ids, *new]])
    how = {} if pixels is None else {
        "pixel_values": torch.from_numpy(np.asarray(pixels["pixel_values"])),
        "image_grid_thw": torch.from_numpy(np.asarray(pixels["image_grid_thw"])),
    }  # fmt: skip
    with torch.no_grad():
        return model(tokens, mm_token_type_ids=(tokens == IMAGE).int(), use_cache=False, **how).logits[0].numpy()


def case_of(name: str, model: Any) -> dict[str, np.ndarray]:
    """The first prompt whose greedy continuation is nowhere close, nor monotonous."""
    import torch

    for seed in range(5000):
        ids, pictures, pixels = inputs_of(CASES[name], np.random.default_rng([seed, len(name), ord(name[0])]))
        logits, new, gaps = run(model, ids, pixels), [], []
        for _ in range(STEPS):
            last = run(model, ids, pixels, new)[-1]
            top = np.sort(last)
            gaps.append(top[-1] - top[-2])
            if not 3 <= last.argmax() < 120 or gaps[-1] < CLEAR * np.abs(logits).max():
                break
            new.append(int(last.argmax()))
        if len(new) == STEPS and len(set(new)) >= 4:
            break
    else:
        raise SystemExit(f"{name}: every continuation is ambiguous")
    tokens = torch.tensor([ids])
    found = {"prompt": np.array(ids, np.int32), "logits": logits, "greedy": np.array(new, np.int32),
             "gap": np.array(gaps, np.float32)}  # fmt: skip
    if pixels is not None:
        grids = torch.from_numpy(np.asarray(pixels["image_grid_thw"]))
        positions, _ = model.model.get_rope_index(tokens, (tokens == IMAGE).int(), image_grid_thw=grids)
        found["positions"] = positions[:, 0].numpy().astype(np.int32)
        first = 0
        for j, (image, grid) in enumerate(zip(pictures, grids, strict=True)):
            patches = torch.from_numpy(np.asarray(pixels["pixel_values"])[first : first + int(grid.prod())])
            with torch.no_grad():
                tower = model.model.visual(patches, grid_thw=grid[None])
            found |= {f"picture{j}": image, f"pixels{j}": patches.numpy(), f"tower{j}": tower.pooler_output.numpy(),
                      f"deep{j}": np.stack([deep.numpy() for deep in tower.deepstack_features])}  # fmt: skip
            first += int(grid.prod())
    print(f"{name:6} {len(ids):4} tokens, seed {seed}, least gap {min(gaps) / np.abs(logits).max():.3f}")
    return {f"{name}_{key}": array for key, array in found.items()}


def check_bites(arrays: dict[str, np.ndarray]) -> None:
    """Undoing any one feature moves the logits of the case "two"."""
    import torch

    ids, logits = arrays["two_prompt"].tolist(), arrays["two_logits"]
    pictures = [arrays["two_picture0"], arrays["two_picture1"]]
    pixels = processor()(pictures, input_data_format="channels_last")
    rope = TEXT["rope_parameters"]
    others = {
        "sections": load(change={"text_config": {"rope_parameters": {**rope, "mrope_section": [32, 0, 0]}}}),
        "theta": load(change={"text_config": {"rope_parameters": {**rope, "rope_theta": 1000.0}}}),
        "deepstack": load(change={"vision_config": {"deepstack_visual_indexes": [0, 2, 3]}}),
    }
    for kind in ("pos_embed.weight", "attn.qkv.bias", "norm1.bias", "merger.norm.weight", "linear_fc2.bias"):
        others[kind] = load()
        with torch.no_grad():
            for name, tensor in others[kind].named_parameters():
                if "visual" in name and name.endswith(kind):
                    tensor.fill_(1.0 if kind.endswith("norm.weight") else 0.0)
    moved = {what: np.abs(run(other, ids, pixels) - logits).max() / np.abs(logits).max() for what, other in
             others.items()}  # fmt: skip
    assert min(moved.values()) > BITES, moved
    print({what: round(float(move), 3) for what, move in moved.items()})


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    build().save_pretrained(FOLDER)
    for name in ("generation_config.json",):
        (FOLDER / name).unlink(missing_ok=True)
    said = {"size": SIZE, "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3, "image_processor_type": "Qwen2VLImageProcessorFast"}  # fmt: skip
    (FOLDER / "preprocessor_config.json").write_text(json.dumps(said, indent=1) + "\n")
    model = load()
    arrays: dict[str, np.ndarray] = {}
    for name in CASES:
        arrays |= case_of(name, model)
    check_bites(arrays)
    save_reference(FOLDER, **arrays)
    print({path.name: path.stat().st_size for path in FOLDER.iterdir()})


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
