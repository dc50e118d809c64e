"""Files of other formats, and files that are not what their name says: what lies there and the way out, in few
words."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

TRANSFORMERS = "with transformers: {0}.from_pretrained('{1}').save_pretrained('{1}')"
OURS = "model.safetensors", "model.safetensors.index.json"
GONE = "is a link to a file that is gone; fetch the model again"
WEIGHTS = (  # patterns of names, what it is, the way out
    (("adapter_model.*", "adapter_config.json"), "a LoRA adapter, no model", "merge it into its base model (peft)"),
    (("pytorch_model*.bin", "*.pth", "*.pt"), "pickled weights, which may run code", "convert it {0}"),
    (("*.gguf",), "GGUF weights", "take the model in safetensors format"),
    (("consolidated*", "params.json"), "weights by Mistral's own names", "take the model in transformers' format"),
    (("model-*-of-*.safetensors",), "a shard without its index", "fetch model.safetensors.index.json, too"),
    (("*.safetensors", "*.h5", "*.msgpack", "*.onnx"), "of another form", "take the model in transformers' format"),
)
TOKENIZERS = (
    (("tokenizer.model*", "spiece.model", "*.spm"), "SentencePiece's form"),
    (("tekken.json",), "Mistral's own form"),
    (("*.tiktoken",), "tiktoken's form"),
    (("vocab.json", "merges.txt", "vocab.txt"), "the form of slow tokenizers"),
)


def weights(folder: Path) -> str | None:
    """What is there in place of model.safetensors or its index, and what to do; None for nothing that is known."""
    if any((folder / name).exists() for name in OURS):
        return None
    if gone := next((name for name in OURS if (folder / name).is_symlink()), None):
        return f"{gone} {GONE}"
    for patterns, what, way_out in WEIGHTS:
        if name := _first(folder, patterns):
            way_out = way_out.format(TRANSFORMERS.format("AutoModelForCausalLM", folder))
            return f"{name} is there ({what}), which is not read; {way_out}"
    return None


def tokenizer(folder: Path) -> str | None:
    """The same of tokenizer.json."""
    if (folder / "tokenizer.json").is_symlink():
        return f"tokenizer.json {GONE}"
    for patterns, what in TOKENIZERS:
        if name := _first(folder, patterns):
            convert = TRANSFORMERS.format("AutoTokenizer", folder)
            return f"there is {name} ({what}), but no tokenizer.json, the only one that is read; make it {convert}"
    return None


def content(path: Path) -> str | None:
    """What a file is that cannot be read as what its name says, and what to do; None where it may be damaged only."""
    try:
        with open(path, "rb") as file:
            head = file.read(200).lstrip().lower()
    except OSError:
        return None
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; run in its folder: git lfs pull"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page; fetch the file again"
    return "empty; fetch it again" if not head else None


def _first(folder: Path, patterns: Iterable[str]) -> str | None:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None
    return next((name for pattern in patterns for name in names if fnmatch(name, pattern)), None)
