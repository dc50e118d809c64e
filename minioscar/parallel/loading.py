"""The weights of several cards: each reads its share of the files, all at the same time, and prepares it.

Rows of a matrix are one stretch of a file. Of columns each row has a piece, too small to be read by itself: such a
matrix is read whole, a layer at a time, and the card keeps its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ..config import Config
from ..errors import UserError
from ..key_shaping import Shaping, key_statistics, shaping
from ..ops.reference import Reference
from ..oscar import Scheme
from ..storage.checkpoint import Checkpoint
from ..weights import Weights, expected, read_layer, rotate_values, scale_keys
from .backend import Split
from .shares import Slices, first_key, joined, local

Array = Any


def load(folder: Path, config: Config, ops: Split, scheme: Scheme, progress: bool = False) -> Weights:
    """What `weights.load` and then `key_shaping.prepared` give, each array the `Ranks` of the cards'. Raises UserError
    as `load_parts`."""
    return prepared(load_parts(folder, config, ops, progress), config, ops, scheme, progress)


def load_for_each(
    folder: Path, config: Config, ops: Split, schemes: Sequence[Scheme], progress: bool = False
) -> list[Weights]:
    """The same for several schemes, which share what is the same for them."""
    parts, made = load_parts(folder, config, ops, progress), dict[tuple[bool, ...], Weights]()
    wanted = [(scheme.rotate, scheme.shaped, scheme.pair_scaled) for scheme in schemes]
    for switches, scheme in zip(wanted, schemes, strict=True):
        if switches not in made:
            made[switches] = prepared(parts, config, ops, scheme, progress, in_place=False)
    return [made[switches] for switches in wanted]


def load_parts(folder: Path, config: Config, ops: Split, progress: bool = False) -> list[Weights]:
    """What each card has of the files. Raises UserError where memory has no room, and for what `Checkpoint` refuses."""
    from tqdm import tqdm

    need, free = ops.weight_bytes(config), ops.free_bytes()
    if need > free:
        each = f"{need / ops.cards / 1e9:.1f} GB on each of {ops.cards} cards"
        raise UserError(f"{folder}: the weights take {each}, but only {free / ops.cards / 1e9:.1f} GB are free")
    lock = Lock()
    with tqdm(
        total=need, desc="load", unit="B", unit_scale=True, leave=False, disable=None if progress else True
    ) as bar:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        def read(rank: int) -> Weights:
            with ops.on(rank):
                return _of_card(folder, config, ops, rank, advance)

        with ThreadPoolExecutor(ops.cards) as threads:
            return list(threads.map(read, range(ops.cards)))


def _of_card(folder: Path, config: Config, split: Split, rank: int, advance: Callable[[int], object]) -> Weights:
    ops, slices = split.ranks[rank], Slices(config, split.cards, rank)
    own, by_columns = local(config, split.cards, first_key(config, split.cards, rank)), list[tuple[list[str], Array]]()
    with ExitStack() as stack:
        tensors = Checkpoint(folder, expected(config), config.tie_embeddings, stack, None)
        by_rows = [slices.rows(name, tensors[name]) for name in expected(config) if slices.columns(name) is None]
        with ops.loading(advance, by_rows) as put:

            def get(*names: str) -> Array:
                columns = slices.columns(names[0])
                if columns is None:
                    return put([slices.rows(name, tensors[name]) for name in names])
                rows = sum(tensors[name].shape[0] for name in names)
                out = ops.xp.zeros((rows, columns.stop - columns.start), ops.dtype)
                by_columns.append((list(names), out))
                return out

            embed, layers = get("model.embed_tokens.weight"), range(config.num_layers)
            layers = tuple(read_layer(get, f"model.layers.{i}.", own) for i in layers)
            head = embed[slices.of["vocab"]] if config.tie_embeddings else get("lm_head.weight")
            weights = Weights(embed, layers, get("model.norm.weight"), head, files=tensors.files)
        for names, out in by_columns:
            whole = [tensors[name] for name in names]
            with ops.loading(advance, whole) as put:
                matrix = put(whole)
            out[...] = matrix[:, slices.columns(names[0])]
        tensors.files.check()
    return weights


def prepared(
    parts: Sequence[Weights], config: Config, ops: Split, scheme: Scheme, progress: bool = False, in_place: bool = True
) -> Weights:
    """The weights of the cards as a scheme wants them; then as one. in_place: in the arrays of `parts`, else what
    changes is copied."""
    own = [local(config, ops.cards, first_key(config, ops.cards, rank)) for rank in range(ops.cards)]
    rotated = []
    for rank, part in enumerate(parts):
        with ops.on(rank):
            one = ops.ranks[rank]
            rotated.append(rotate_values(part, own[rank], one, in_place) if scheme.rotate else part)
    together = joined(rotated)
    if not (scheme.shaped or scheme.pair_scaled):
        return together
    found = shaping(key_statistics(together, config, ops, progress), scheme, config)
    shaped = []
    for rank, part in enumerate(rotated):
        with ops.on(rank):
            shaped.append(_shaped(part, own[rank], ops.ranks[rank], found, in_place))
    return joined(shaped)


def _shaped(part: Weights, own: Config, ops: Reference, found: Shaping, in_place: bool) -> Weights:
    """`key_shaping.shape_keys` of one card's share."""
    if found.scales is not None:
        part = scale_keys(part, own, found.scales, ops, in_place)
    if found.feedback is None:
        return part
    first = own.key_heads[1]
    kept = np.ascontiguousarray(found.feedback[:, first : first + own.num_kv_heads])
    feedback = ops.xp.asarray(kept)
    layers = tuple(replace(layer, key_feedback=of) for layer, of in zip(part.layers, feedback, strict=True))
    return replace(part, layers=layers, key_feedback=feedback)
