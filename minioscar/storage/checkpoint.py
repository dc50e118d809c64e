"""The tensors of a model folder: safetensors, one file or shards with an index, every name and shape checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from ..errors import UserError
from . import foreign
from .identity import Stamp, WeightFiles, stamp
from .strict_json import read_object

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


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
    def array(self) -> np.ndarray:
        """A view of the file."""
        return self.data[self.begin : self.begin + self.nbytes].view(self.dtype).reshape(self.shape)


class Checkpoint:
    """The tensors of a model folder, one safetensors file or shards with an index; nothing but the headers is read
    yet."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]], tied: bool, stack: ExitStack):
        from safetensors import SafetensorError, safe_open

        self.folder, self.tensors = folder, {}
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
        for name, tensor in tensors.items():
            if name not in self.tensors or index.get(name) == file:
                self.tensors[name] = tensor
            elif name not in index:
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
        for name, shape in shapes.items():
            if name not in self.tensors:
                why = f"the weights do not belong to this config.json or are incomplete{self.beside}"
                raise UserError(f"{self.folder}: tensor {name} is missing; {why}")
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise UserError(
                    f"{self.folder}: tensor {name} has shape {list(tensor.shape)}, but config.json asks for "
                    f"{list(shape)}"
                )
            if tensor.kind not in DTYPES:
                raise UserError(
                    f"{self.folder}: tensor {name} has dtype {tensor.kind}; only {', '.join(DTYPES)} are supported"
                )
        for name in self.tensors.keys() - shapes.keys() - {"lm_head.weight"}:  # a tied one may be there
            if name.startswith(("model.", "lm_head.")) and not name.endswith("rotary_emb.inv_freq"):
                raise UserError(
                    f"{self.folder}: tensor {name} has no place in this architecture; it is not implemented"
                )

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
