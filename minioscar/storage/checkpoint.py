"""The tensors of a model folder: safetensors, one file or shards with an index, every name and shape checked."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from ..errors import UserError
from ..formats.base import Format, Linear, Unfit
from . import foreign
from .identity import Stamp, WeightFiles, stamp
from .strict_json import read_object

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8}
DTYPES = FLOATS | {name: np.dtype(kind) for name, kind in INTEGERS.items()}
DTYPES |= dict.fromkeys(("F8_E4M3", "F8_E8M0"), np.dtype(np.uint8))  # the codes
# of an FP8 cache, by compressed-tensors, AutoFP8 and modelopt
KV_SCALES = re.compile(r"self_attn\.([kv]_scale|kv_scale|[kv]_proj\.(output_scale|[kv]_scale))$")
# what is not used, besides: queries and activations stay in 16 bits, RoPE is computed
IGNORED = re.compile(rf"{KV_SCALES.pattern}|\.(q_scale|input_scale|activation_scale|input_global_scale|inv_freq)$")
# of tensors that must all be known; of LLaVA's vision_tower. the last layers are not used
PLACES = "model.", "lm_head.", "audio_tower.", "multi_modal_projector."
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Tensors' names in files of models with towers -> those of text models. In turn: of Qwen3-Omni, of Qwen3-VL, of LLaVA,
# and of LLaVA as transformers 5 writes it.
SPELLINGS = [
    (re.compile(pattern), plain) for pattern, plain in (
        (r"^thinker\.visual\.", "model.visual."),
        (r"^thinker\.", ""),
        (r"^model\.visual\.merger_list\.", "model.visual.deepstack_merger_list."),
        (r"^(model\.visual\..*merger.*)\.ln_q\.", r"\1.norm."),
        (r"^(model\.visual\..*merger.*)\.mlp\.0\.", r"\1.linear_fc1."),
        (r"^(model\.visual\..*merger.*)\.mlp\.2\.", r"\1.linear_fc2."),
        (r"^model\.language_model\.", "model."),
        (r"^language_model\.(?=model\.|lm_head\.)", ""),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    )
]


@dataclass
class Tensor:
    """A tensor of a safetensors file: mapped into memory, and to be read from the file itself."""

    kind: str  # its dtype, as the file spells it
    shape: tuple[int, ...]
    begin: int  # where its bytes begin in the file
    nbytes: int
    file: BinaryIO
    data: np.ndarray  # the whole file, read-only

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.kind]

    @property
    def size(self) -> int:
        return self.nbytes // self.dtype.itemsize

    @property
    def raw(self) -> Tensor:
        """Its bytes."""
        return replace(self, kind="U8", shape=(self.nbytes,))

    @property
    def array(self) -> np.ndarray:
        """A view of the file."""
        return self.data[self.begin : self.begin + self.nbytes].view(self.dtype).reshape(self.shape)


class Checkpoint:
    """The tensors of a model folder, one safetensors file or shards with an index; nothing but the headers is read
    yet."""

    def __init__(
        self, folder: Path, shapes: dict[str, tuple[int, ...]], tied: bool, stack: ExitStack,
        quantization: Format | None = None,
    ):
        from safetensors import SafetensorError, safe_open

        self.folder, self.tensors = folder, dict[str, Tensor]()
        self.format = quantization
        self.quantized = dict[str, Linear]()  # by the name that the matrix would have in 16 bits
        self.beside = f"; to read {INDEX} and its shards instead, remove {SINGLE}"
        self.beside *= (folder / SINGLE).exists() and (folder / INDEX).exists()
        stamps: dict[Path, Stamp] = {}
        index = _index(folder)
        files = _files(folder, index)
        if gone := [file for file in files if not (folder / file).exists()]:
            why = f"{INDEX} names {len(files)} shards, of which {len(gone)} are not there"
            raise UserError(f"{folder / gone[0]} does not exist: {why}; fetch the model again")
        for file in files:
            path = folder / file
            if not path.is_file():  # opening a FIFO would wait for its writer
                raise UserError(f"{path} is no file; fetch the model again{self.beside}")
            try:
                opened = stack.enter_context(open(path, "rb", buffering=0))
            except OSError as error:
                why = f"cannot be read ({error.strerror or error}); fetch the model again{self.beside}"
                raise UserError(f"{path} {why}") from None
            try:
                with safe_open(path, "np"):
                    stamps[path] = stamp(opened)
                self._add(file, dict(_tensors(opened)), index)
            except (SafetensorError, OSError) as error:
                what = f"({error})" if not (found := foreign.content(path)) else f"but {found}"
                again = "" if found else "; fetch the model again"
                raise UserError(f"{path} is truncated or not a safetensors file {what}{again}{self.beside}") from None
        self._check(shapes)
        if tied and "lm_head.weight" in self.tensors:
            self._check_tied(*(self.tensors[name].array for name in ("model.embed_tokens.weight", "lm_head.weight")))
        self.files = WeightFiles(stamps)

    def _add(self, file: str, tensors: dict[str, Tensor], index: dict[str, str]) -> None:
        """Where two shards have a tensor, the index says which is meant."""
        for given, tensor in tensors.items():
            name = plain(given)
            if name not in self.tensors or index.get(given) == file:
                self.tensors[name] = tensor
            elif given not in index:
                why = f"tensor {name} stands in two shards, and {INDEX} does not say which counts"
                raise UserError(f"{self.folder}: {why}; fetch the model again")

    def _check_tied(self, embed: np.ndarray, head: np.ndarray) -> None:
        """Raises UserError for a head of its own; files that were made from PyTorch's have it a second time."""
        blocks = range(0, len(embed), 1024)
        same = (np.array_equal(embed[i : i + 1024], head[i : i + 1024]) for i in blocks)
        if embed.shape != head.shape or not all(same):
            why = "config.json ties lm_head.weight to the embedding, but the weights have another one"
            raise UserError(f"{self.folder}: {why}; set tie_word_embeddings to false in it")

    def _check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        of_modules = defaultdict[str, dict[str, Tensor]](dict)
        for name, tensor in self.tensors.items():
            module, _, last = name.rpartition(".")
            if last != "bias" and not IGNORED.search(name):
                of_modules[module][last] = tensor
        known = shapes.keys() | {"lm_head.weight"}  # a tied one may be there
        for name, shape in shapes.items():
            found = of_modules[name.removesuffix(".weight")]
            if len(shape) == 2 and (found.keys() != {"weight"} or found["weight"].kind not in FLOATS) and found:
                self._add_quantized(name, Linear(*shape, found))
                known |= {f"{name.removesuffix('weight')}{last}" for last in found}
            else:
                self._check_plain(name, shape)
        for name in self.tensors.keys() - known:
            if name.startswith(PLACES) and not IGNORED.search(name) and not self._is_zero_bias(name):
                raise UserError(
                    f"{self.folder}: tensor {name} has no place in this architecture; it is not implemented"
                )

    def _check_plain(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.tensors:
            why = f"the weights do not belong to this config.json or are incomplete{self.beside}"
            raise UserError(f"{self.folder}: tensor {name} is missing; {why}")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise UserError(
                f"{self.folder}: tensor {name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
            )
        if tensor.kind not in FLOATS:
            raise UserError(
                f"{self.folder}: tensor {name} has dtype {tensor.kind}; only {', '.join(FLOATS)} are supported"
            )

    def _add_quantized(self, name: str, linear: Linear) -> None:
        """A matrix that does not lie there as numbers. Raises UserError where it is not as the format has it."""
        what = f"{self.folder}: the tensors of {name.removesuffix('.weight')}"
        if "embed_tokens" in name and self.format is not None:
            raise UserError(f"{what} are quantized; an embedding must be in 16 or 32 bits: take another file")
        if self.format is None:
            if not linear.tensors.keys() - {"weight"}:
                return self._check_plain(name, linear[:2])
            given = ", ".join(sorted(linear.tensors))
            raise UserError(f"{what} are {given}, but config.json has no quantization_config; fetch config.json again")
        try:
            self.format.check(linear)
        except Unfit as error:
            why = f"{error}; the weights do not belong to this config.json or are damaged"
            raise UserError(f"{what} are not {self.format.name}: {why}") from None
        self.quantized[name] = linear

    def _is_zero_bias(self, name: str) -> bool:
        """AutoGPTQ writes a bias for every layer, zeros for those that have none."""
        return bool(self.quantized) and name.endswith(".bias") and not self.tensors[name].array.any()

    def unused(self) -> Iterator[str]:
        """Says what of the files is not used, for a cache in FP8 or to speak with."""
        if any(KV_SCALES.search(name) for name in self.tensors):
            yield "the scales of an FP8 cache in the files are not used"
        if any(name.startswith("talker.") for name in self.tensors):
            yield "the talker in the files is not used: this model answers in text"

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def _tensors(file: BinaryIO) -> Iterator[tuple[str, Tensor]]:
    """Of a file whose header the safetensors library has found to be sound: its size in 8 bytes, itself as JSON, the
    data (github.com/huggingface/safetensors, Format)."""
    data = np.asarray(np.memmap(file, np.uint8, "r"))
    size = 8 + int(data[:8].view("<u8")[0])
    for name, entry in json.loads(bytes(data[8:size])).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, Tensor(entry["dtype"], tuple(entry["shape"]), size + begin, end - begin, file, data)


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> shard; empty where the weights are one file, which goes before an index, as in transformers."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).exists():
        why = foreign.weights(folder) or "minioscar reads safetensors weights only"
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}; {why}")
    files = read_object(folder / INDEX, "it lists the shards").get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{folder / INDEX} has no weight_map; fetch the model again")
    return {name: str(file) for name, file in files.items()}


def _files(folder: Path, index: dict[str, str] | None = None) -> list[str]:
    """The names of the weight files, by the index of the folder."""
    names = sorted(set((_index(folder) if index is None else index).values())) or [SINGLE]
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors") or not name.isprintable():
            raise UserError(
                f"{folder / INDEX} names {name!r}, which is not a safetensors file of this folder; refusing to open it"
            )
    return names


def weight_files(folder: Path) -> WeightFiles:
    """The files that `load` would read now."""
    return WeightFiles.of([folder / name for name in _files(folder)])


def plain(name: str) -> str:
    """What minioscar calls a tensor that a file calls `name`."""
    for pattern, replacement in SPELLINGS:
        name = pattern.sub(replacement, name)
    return name
