"""The weights of several cards: each reads its share of the files, all at the same time, and prepares it.

Rows of a matrix are one stretch of a file. Of columns each row has a piece, too small to be read by itself: such a
matrix is read whole, one at a time, and the card keeps its columns. What is quantized is cut in its plain form, after
it was unpacked or rounded as on one card (staging.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ..config import Config
from ..key_shaping import Shaping, key_statistics, scale_keys, shaping
from ..ops.reference import Reference
from ..oscar import Scheme
from ..staging import Group, Staging
from ..storage.checkpoint import Checkpoint
from ..weights import Weights, expected, fold_values, matrices, opened, read_layer, rotate_values
from .backend import Split
from .shares import Slices, first_key, joined, local

Array = Any


def load(folder: Path, config: Config, ops: Split, scheme: Scheme, progress: bool = False) -> Weights:
    """What `weights.load` and then `key_shaping.prepared` give, each array the `Ranks` of the cards'. Raises UserError
    as `load_parts`."""
    return prepared(load_parts(folder, config, ops, scheme.rotate, progress), config, ops, scheme, progress)


def load_for_each(
    folder: Path, config: Config, ops: Split, schemes: Sequence[Scheme], progress: bool = False
) -> list[Weights]:
    """The same for several schemes, which share what is the same for them."""
    parts, made = dict[bool, list[Weights]](), dict[tuple[bool, ...], Weights]()
    wanted = [(scheme.rotate, scheme.shaped, scheme.pair_scaled) for scheme in schemes]
    for switches, scheme in zip(wanted, schemes, strict=True):
        fold = scheme.rotate and config.weights is not None
        if fold not in parts:
            parts[fold] = load_parts(folder, config, ops, fold, progress)
        if switches not in made:
            made[switches] = prepared(parts[fold], config, ops, scheme, progress, in_place=False)
    return [made[switches] for switches in wanted]


def load_parts(folder: Path, config: Config, ops: Split, fold: bool = False, progress: bool = False) -> list[Weights]:
    """What each card has of the files. fold: as `weights.load` has it. Raises UserError as that."""
    from tqdm import tqdm

    lock, bar = Lock(), tqdm(total=0, desc="load", unit="B", unit_scale=True, leave=False, disable=not progress or None)
    with bar, ExitStack() as stack:
        tensors = opened(folder, config, ops, stack, ops.cards)

        def advance(count: int, total: int = 0) -> None:
            with lock:
                bar.total += total
                bar.update(count)

        def read(rank: int) -> Weights:
            with ops.on(rank):
                return _of_card(tensors, config, ops, rank, fold, advance)

        with ThreadPoolExecutor(ops.cards) as threads:
            parts = list(threads.map(read, range(ops.cards)))
        tensors.files.check()
        return parts


def _of_card(
    tensors: Checkpoint, config: Config, split: Split, rank: int, fold: bool, advance: Callable[..., object]
) -> Weights:
    """advance: of bytes that are read, and of such as are to be."""
    ops, share = split.ranks[rank], Slices(config, split.cards, rank)
    own, by_columns = local(config, split.cards, first_key(config, split.cards, rank)), list[tuple[list[str], Array]]()
    staging = Staging(tensors, own, ops, matrices(config), share)
    of_others = [] if rank == 0 else [name for tower in config.towers.values() for name in tower.expected()]
    numbers = [name for name in expected(config) if name not in {*staging.names, *of_others}]
    kept = [share.rows(name, tensors[name]) for name in numbers if share.columns(name) is None]
    whole = [tensors[name] for name in numbers if share.columns(name) is not None]
    advance(0, sum(tensor.nbytes for tensor in (*kept, *whole)) + staging.nbytes)
    with ops.loading(advance, kept) as put:

        def get(*names: str) -> Array | Group:
            columns = share.columns(names[0])
            if names[0] in staging.names:
                return Group(names)
            if columns is None:
                return put([share.rows(name, tensors[name]) for name in names])
            rows = sum(tensors[name].shape[0] for name in names)
            out = ops.xp.zeros((rows, columns.stop - columns.start), ops.dtype)
            by_columns.append((list(names), out))
            return out

        embed, layers = get("model.embed_tokens.weight"), range(config.num_layers)
        layers = tuple(read_layer(get, f"model.layers.{i}.", own) for i in layers)
        head = embed[share.of["vocab"]] if config.tie_embeddings else get("lm_head.weight")
        towers = {kind: {name: get(name) for name in of.expected()} for kind, of in config.towers.items() if rank == 0}
        weights = Weights(embed, layers, get("model.norm.weight"), head, files=tensors.files, towers=towers)
    for names, out in by_columns:
        of_names = [tensors[name] for name in names]
        with ops.loading(advance, of_names) as put:
            matrix = put(of_names)
        out[...] = matrix[:, share.columns(names[0])]
    if staging.names:
        by_fold = partial(fold_values, config=own, ops=ops) if fold else None
        weights = staging.filled(weights, advance, by_fold)
        staging.check(says=rank == 0)
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
