"""Which kernels a run will launch, found out without a card: one layer of the model runs over arrays without memory."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..batch import Batch
from ..cache import Cache, LayerCache, NewTokens, of_layer
from ..decoding import Stepper
from ..joining import JoiningBatch
from ..ops.decode import StepBatch, unsupported
from ..ops.launch import Launch
from ..quantized import mapped
from ..sampling import RowSampling
from ..towers.media import Inputs
from ..weights import Weights
from .cubins import Program

Array = Any


def programs(
    paper: Paper, model: Stepper, cache: Cache, passes: Sequence[Batch], rows: Sequence[RowSampling] | None
) -> list[Program]:
    """What these passes and then decode steps of `rows` (none: no steps; None: of rows that join) launch on `paper`.

    One layer of the model is run over arrays that have shapes and no memory. Empty where steps are array code.
    """
    config = model.config
    if unsupported(config, cache.scheme, len(cache.lengths)):
        return []
    blank, config = copy(cache), replace(config, num_layers=1)
    blank.ops, blank.lengths = paper, cache.lengths.copy()
    blank.arrays = {name: paper.blank(array if name == "table" else array[:1]) for name, array in cache.arrays.items()}
    blank.layers = [type(cache.layers[0])(of_layer(blank.arrays, 0), cache.scheme, paper, cache.table)]
    model = copy(model)
    model.config, model.ops, model.weights = config, paper, paper.weights(model.weights)
    model.tables = (np.broadcast_to(np.float32(0), (cache.context, config.head_dim // 2)),) * 2
    # What a tower made is on the card and is not looked at: passes with media have blank ones.
    with_media = [replace(batch, inputs=Inputs.blank(batch.counts)) for batch in passes if config.towers]
    for batch in (*(replace(batch, inputs=None) for batch in passes), *with_media):
        model.forward(np.zeros(sum(batch.counts), np.int32), blank, batch)
    if rows is None or rows:
        kind = JoiningBatch if rows is None else StepBatch
        whole = kind(paper, config, blank, rows, model.weights.key_feedback, model.rotates_values)
        for step in whole.by_rows(paper).values():
            model.step(step.tokens, blank, step, partial(step.draw, ops=paper))
    return list(paper.launched)


class Paper:
    """What a back end of kernels has another way where nothing runs and arrays have no numbers."""

    launched: dict[Program, None]
    dtype: np.dtype

    @staticmethod
    def blank(x: Array) -> Array:
        """An array of the shape and dtype of x, of one number's memory."""
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)

    def weights(self, weights: Weights) -> Weights:
        layer = {name: mapped(x, self.blank) for name, x in vars(weights.layers[0]).items()}
        outer = {name: mapped(getattr(weights, name), self.blank) for name in ("embed", "norm", "head")}
        return replace(weights, layers=(replace(weights.layers[0], **layer),), **outer)

    def run(self, launch: Launch) -> None:
        self.launched[launch.source, launch.defines] = None

    def attention(self, q: Array, new: NewTokens, layer_cache: LayerCache, batch: Batch | StepBatch) -> Array:
        y = layer_cache.attend(q, new, batch)
        if layer_cache.scheme.quantized:  # else appending is array code
            layer_cache.append(new, batch)
        return y

    def product(self, x: Array, weight: Array, float32: bool) -> Array:
        return np.empty((len(x), len(weight)), np.float32 if float32 else self.dtype)

    def add_product(self, y: Array, x: Array, weight: Array) -> None:
        pass

    def numpy(self, x: Array) -> np.ndarray:
        return x
