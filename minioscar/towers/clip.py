"""LLaVA's tower: tiles of a picture -> embeddings of the language model, by CLIP's vision transformer and a projector.

CLIP (arXiv 2103.00020); LLaVA-1.5 (arXiv 2310.03744) takes one tile; LLaVA-NeXT a whole and a grid of them, each row of
which ends with a learned newline. CLIPVisionModel, LlavaModel and LlavaNextModel of transformers 5.24 are what its
numbers are those of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..backend import Backend
from ..errors import UserError, shown
from ..fields import Fields
from . import pictures, tiles
from .layers import Layers, Shape
from .media import Features, Medium, check_tokens
from .tiles import Size, best_grid, shown_rows

Array = Any
TOWER, PROJECTOR, NEWLINE = "vision_tower.vision_model.", "multi_modal_projector.", "image_newline"
TILES = 4  # that are in the tower at once
DEFAULTS = {"image_token_id": 32000}  # what a missing key means: transformers 5.24, configuration_llava_next.py
GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Clip:
    """Its shape, as `vision_config` and the top of a config.json have it."""

    kind: ClassVar[str] = "image"
    weights_of: ClassVar[str] = kind
    token: int  # <image>
    tile: int  # height and width of a tile, pixels
    patch: int
    hidden_size: int
    depth: int  # layers that are used: what they make are the features
    intermediate_size: int
    num_heads: int
    eps: float
    output_size: int  # hidden size of the language model
    grids: tuple[Size, ...] | None  # in pixels; None: LLaVA-1.5

    @classmethod
    def of(cls, raw: Mapping[str, Any], pictures: Mapping[str, Any], source: str, hidden: int) -> Clip:
        """By config.json and preprocessor_config.json of a model `llava` or `llava_next`. hidden: size of its language
        model. Raises UserError for what is missing or not implemented."""
        if not isinstance(raw.get("vision_config"), Mapping):
            raise UserError(f"{source}: vision_config must be an object, not {shown(raw.get('vision_config'))}")
        get, top = Fields(raw["vision_config"], f"{source}: vision_config", DEFAULTS), Fields(raw, source, DEFAULTS)
        for where, key, *supported in (
            (get, "model_type", "clip_vision_model"), (get, "hidden_act", "quick_gelu"), (get, "num_channels", 3),
            (top, "projector_hidden_act", "gelu"), (top, "multimodal_projector_bias", True),
            (top, "vision_feature_select_strategy", "default"),
        ):  # fmt: skip
            where.only(key, *supported)
        tile, patch, size, heads = map(get.count, ("image_size", "patch_size", "hidden_size", "num_attention_heads"))
        depth, layer = get.count("num_hidden_layers", most=1024), raw.get("vision_feature_layer", -2)
        used = layer if type(layer) is int and layer >= 0 else depth + 1 + layer if type(layer) is int else -1
        if not 0 < used <= depth:
            why = f"is not supported; it must be one of {depth} layers"
            raise UserError(f"{source}: vision_feature_layer {shown(layer)} {why}")
        if size % heads or patch > tile:
            why = f"hidden_size {size} with num_attention_heads {heads}, or patches of {patch} in {tile} pixels"
            raise UserError(f"{get.source}: {why}, is not supported")
        grids = _grids(top, tile) if raw["model_type"] == "llava_next" else None
        _check_preprocessing(pictures, tile, grids)
        token = top.count("image_token_index" if "image_token_index" in raw else "image_token_id")
        return cls(
            token, tile, patch, size, used, get.count("intermediate_size"), heads, get.positive("layer_norm_eps", 1e-5),
            hidden, grids,
        )  # fmt: skip

    @property
    def max_tokens(self) -> int:
        sides = ((height // self.patch, width // self.patch) for height, width in self.grids or ())
        return self.side**2 + max((rows * (columns + 1) for rows, columns in sides), default=0)

    @property
    def feature_width(self) -> int:
        return self.output_size

    @property
    def side(self) -> int:
        """Patches along a tile."""
        return self.tile // self.patch

    @property
    def shape(self) -> Shape:
        """Of its layers."""
        qkv = tuple(f"self_attn.{of}_proj" for of in "qkv")
        names = "layer_norm1", qkv, "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"
        return Shape(self.hidden_size, self.intermediate_size, self.num_heads, self.eps, "quick_gelu", *names)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Tensor name, as Hugging Face checkpoints spell it, -> shape."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            f"{TOWER}embeddings.class_embedding": (hidden,),
            f"{TOWER}embeddings.patch_embedding.weight": (hidden, 3, self.patch, self.patch),
            f"{TOWER}embeddings.position_embedding.weight": (self.side**2 + 1, hidden),
        }
        if self.grids is not None:
            shapes[NEWLINE] = (self.output_size,)

        def add(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

        add(f"{TOWER}pre_layrnorm", hidden)
        for i in range(self.depth):
            layer = f"{TOWER}encoder.layers.{i}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                add(f"{layer}self_attn.{name}", hidden, hidden)
            add(f"{layer}layer_norm1", hidden)
            add(f"{layer}layer_norm2", hidden)
            add(f"{layer}mlp.fc1", inner, hidden)
            add(f"{layer}mlp.fc2", hidden, inner)
        add(f"{PROJECTOR}linear_1", self.output_size, hidden)
        add(f"{PROJECTOR}linear_2", self.output_size, self.output_size)
        return shapes

    # --- a picture's pixels

    def prepare(self, source: Any, name: str, most: int | None = None) -> Medium:
        """Its size, on which depends what of a grid is padding, and its tiles (`tiles.cut`). Raises UserError."""
        picture = np.asarray(pictures.opened(source, name))
        size = picture.shape[:2]
        check_tokens(f"{name} of {size[1]} x {size[0]} pixels", self.kind, self.tokens(size), most)
        cut = tiles.cut(picture, self.tile, self.grids)
        both = np.concatenate([np.array(size, "<u4").view(np.uint8), cut.reshape(-1)])  # for the digest
        return replace(Medium.of(self.kind, both, self.tokens(size), name=name), data=(size, cut))

    def tokens(self, size: Size) -> int:
        """Of a picture (height, width): 576 of the whole and, of a grid, each row with its newline."""
        if self.grids is None:
            return self.side**2
        rows, columns = self._shown(size)
        return self.side**2 + (rows.stop - rows.start) * (columns.stop - columns.start + 1)

    def _shown(self, size: Size) -> tuple[slice, slice]:
        """Which patches of the grid of tiles show a picture of this size."""
        height, width = best_grid(size, self.grids)
        return shown_rows(size, (height // self.patch, width // self.patch))

    # --- the tower

    def encode(self, medium: Medium, weights: Mapping[str, Array], ops: Backend) -> Features:
        """embeddings [tokens, output_size]: of the whole picture, then of its grid, row by row."""
        xp, side, (size, cut) = ops.xp, self.side, medium.data
        w = {name.removeprefix(TOWER).removeprefix(PROJECTOR): array for name, array in weights.items()}
        patches, tokens = side * side, min(len(cut), TILES) * (side * side + 1)
        wide = len(cut) * patches * self.output_size
        layers = ops.layers_for(self.shape)(ops, self.shape, tokens, patches + 1, wide)
        parts = [self._features(cut[i : i + TILES], w, layers, ops) for i in range(0, len(cut), TILES)]
        x = xp.concatenate(parts).reshape(-1, self.hidden_size)
        del parts
        x = layers.mlp(x, w, "linear_1", "linear_2")  # [tiles * patches, output_size]
        if self.grids is None:
            return Features(x)
        out, grid = xp.empty((medium.tokens, self.output_size), x.dtype), x[patches:]
        height, width = (edge // self.tile for edge in best_grid(size, self.grids))
        grid = grid.reshape(height, width, side, side, -1).swapaxes(1, 2)  # [height, side, width, side, output_size]
        rows, columns = self._shown(size)
        lines = out[patches:].reshape(rows.stop - rows.start, -1, self.output_size)
        for row in range(rows.start, rows.stop):
            of_row = grid[row // side, row % side].reshape(width * side, -1)
            lines[row - rows.start, :-1] = of_row[columns]
        out[:patches], lines[:, -1] = x[:patches], w[NEWLINE]
        return Features(out)

    def _features(self, cut: np.ndarray, w: Mapping[str, Array], layers: Layers, ops: Backend) -> Array:
        """What the layers make of the patches of a few tiles, [tiles, patches, hidden], row by row."""
        n, side, patch, pixels = len(cut), self.side, self.patch, tiles.normalized(cut)
        pixels = pixels[..., : side * patch, : side * patch].reshape(n, 3, side, patch, side, patch)
        pixels = pixels.transpose(0, 2, 4, 1, 3, 5).reshape(n, side * side, -1)  # of a patch: colour, row, column
        kernel = w["embeddings.patch_embedding.weight"].reshape(self.hidden_size, -1)
        first, places = w["embeddings.class_embedding"], w["embeddings.position_embedding.weight"]
        x = layers.norm(layers.tiles(ops.array(pixels), kernel, first, places), w, "pre_layrnorm", in_place=True)
        for i in range(self.depth):
            x = layers.layer(x, w, f"encoder.layers.{i}.")
        return x.reshape(n, -1, self.hidden_size)[:, 1:]

    def work_bytes(self, tokens: int, ops: Backend) -> int:
        """Of the arrays of `encode` for the largest of grids: layers and projector, x of all tiles twice, pixels of a
        few, what the projector makes of all, and the features."""
        kind, itemsize, hidden = ops.layers_for(self.shape), ops.dtype.itemsize, self.hidden_size
        count = max((height * width for height, width in self.grids or ()), default=0) // self.tile**2 + 1
        few, patches = min(count, TILES), self.side**2
        layers = kind.nbytes(self.shape, few * (patches + 1), patches + 1, ops, count * patches * self.output_size)
        sizes = [(count - few) * (patches + 1) * hidden, count * patches * hidden, few * patches * 3 * self.patch**2]
        sizes += [count * patches * self.output_size, tokens * self.output_size if self.grids else 0]
        others = kind.array_bytes(*(itemsize * size for size in sizes), 4 * few * (patches + 1))
        return layers + others + (4 * 4 * 3 * self.tile**2 * TILES if kind.on_host else 0)


def _grids(get: Fields, tile: int) -> tuple[Size, ...]:
    """Heights and widths of LLaVA-NeXT's grids. Raises UserError for those that are not of whole tiles."""
    grids = get.items("image_grid_pinpoints") or GRIDS
    for grid in grids:
        pair = isinstance(grid, list) and len(grid) == 2 and all(type(side) is int for side in grid)
        if not pair or not all(0 < side <= 64 * tile and side % tile == 0 for side in grid):
            why = f"image_grid_pinpoints has {shown(grid)}; it must be heights and widths of whole tiles of {tile}"
            raise UserError(f"{get.source}: {why}")
    return tuple((height, width) for height, width in grids)


def _check_preprocessing(raw: Mapping[str, Any], tile: int, grids: tuple[Size, ...] | None) -> None:
    """Raises UserError where preprocessor_config.json asks for other pictures than `tiles` makes."""
    get = Fields(raw, "preprocessor_config.json", {})
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        get.only(name, True)
    get.only("do_pad", grids is not None)  # of LLaVA-1.5: to a square
    get.only("resample", 3)  # bicubic
    get.only("rescale_factor", 1 / 255)
    square = {"height": tile, "width": tile}
    get.only("size", {"shortest_edge": tile}, *([] if grids is None else [square]))
    get.only("crop_size", square)
    get.only("image_mean", list(tiles.MEAN))
    get.only("image_std", list(tiles.DEVIATION))
    get.only("image_grid_pinpoints", None if grids is None else [list(grid) for grid in grids])
