"""Qwen3-VL's vision tower: a picture -> embeddings of the language model, and what DeepStack adds behind its first
layers.

Patches of 16 x 16 pixels, an interpolated table of positions, rotary angles by row and column, blocks of LayerNorm,
full attention and an MLP; four neighbouring patches become one token. Qwen3VLVisionModel and Qwen2VLImageProcessorPil
of transformers 5.24 are what its numbers are those of; the paper is arXiv 2511.21631.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ..backend import Backend
from ..errors import UserError, shown
from ..fields import Fields
from . import pictures
from .layers import Layers, Places, Shape
from .media import Features, Medium, check_tokens

Array = Any
PREFIX = "model.visual."
EPS = 1e-6  # of every LayerNorm
THETA = 10000.0
MAX_ASPECT = 200
DEFAULTS = {  # what a missing key means: transformers 5.24, configuration_qwen3_vl.py
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "num_position_embeddings": 2304,
    "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2, "image_token_id": 151655,
}  # fmt: skip


@dataclass(frozen=True)
class QwenVision:
    """Its shape, as `vision_config` of a config.json and preprocessor_config.json have it."""

    kind: ClassVar[str] = "image"
    weights_of: ClassVar[str] = kind
    token: int  # <|image_pad|>
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    output_size: int  # hidden size of the language model
    side: int  # rows, and columns, of the table of positions
    deepstack: tuple[int, ...]  # blocks behind which features for DeepStack are taken
    patch: int = 16  # pixels
    frames: int = 2  # of a patch; those of a still are equal
    merge: int = 2  # patches along a token
    min_pixels: int = 1 << 16
    max_pixels: int = 1 << 24
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of red, green, blue from 0 to 1
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def of(
        cls, raw: Mapping[str, Any], pictures: Mapping[str, Any], source: str, hidden: int, layers: int
    ) -> QwenVision:
        """By config.json and preprocessor_config.json. hidden, layers: of the language model. Raises UserError for what
        is missing or not implemented."""
        if not isinstance(raw.get("vision_config"), Mapping):
            raise UserError(f"{source}: vision_config must be an object, not {shown(raw.get('vision_config'))}")
        get, top = Fields(raw["vision_config"], f"{source}: vision_config", DEFAULTS), Fields(raw, source, DEFAULTS)
        get.only("hidden_act", "gelu_pytorch_tanh")
        get.only("in_channels", 3)
        get.only("out_hidden_size", hidden)
        size, heads, places = (get.count(name) for name in ("hidden_size", "num_heads", "num_position_embeddings"))
        if size % (4 * heads) or math.isqrt(places) ** 2 != places:
            why = f"hidden_size {size} with num_heads {heads}, or num_position_embeddings {places}, is not supported"
            raise UserError(f"{get.source}: {why}; heads must be multiples of 4 wide, positions a square")
        depth, deep = get.count("depth", most=1024), get.items("deepstack_visual_indexes")
        if len(deep) > layers or len(set(deep)) < len(deep) or not all(type(i) is int and 0 <= i < depth for i in deep):
            raise UserError(f"{get.source}: deepstack_visual_indexes {deep} must be blocks of {depth}, each once")
        patch, frames, merge = map(get.count, ("patch_size", "temporal_patch_size", "spatial_merge_size"))
        inner = get.count("intermediate_size")
        shape = cls(top.count("image_token_id"), depth, size, inner, heads, hidden, math.isqrt(places), tuple(deep),
                    patch, frames, merge)  # fmt: skip
        return replace(shape, **preprocessing(pictures, shape, "preprocessor_config.json"))

    @property
    def max_tokens(self) -> int:
        return self.max_pixels // (self.patch * self.merge) ** 2

    @property
    def feature_width(self) -> int:
        return self.output_size * (1 + len(self.deepstack))

    @property
    def shape(self) -> Shape:
        """Of its blocks."""
        names = "norm1", ("attn.qkv",), "attn.proj", "norm2", "mlp.linear_fc1", "mlp.linear_fc2"
        return Shape(self.hidden_size, self.intermediate_size, self.num_heads, EPS, "gelu_tanh", *names)

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Tensor name, as Hugging Face checkpoints spell it, -> shape."""
        hidden, inner, wide = self.hidden_size, self.intermediate_size, self.hidden_size * self.merge**2
        shapes: dict[str, tuple[int, ...]] = {"pos_embed.weight": (self.side**2, hidden)}

        def add(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

        add("patch_embed.proj", hidden, 3, self.frames, self.patch, self.patch)
        for i in range(self.depth):
            add(f"blocks.{i}.norm1", hidden)
            add(f"blocks.{i}.norm2", hidden)
            add(f"blocks.{i}.attn.qkv", 3 * hidden, hidden)
            add(f"blocks.{i}.attn.proj", hidden, hidden)
            add(f"blocks.{i}.mlp.linear_fc1", inner, hidden)
            add(f"blocks.{i}.mlp.linear_fc2", hidden, inner)
        mergers = {"merger": hidden} | {f"deepstack_merger_list.{j}": wide for j in range(len(self.deepstack))}
        for name, normed in mergers.items():
            add(f"{name}.norm", normed)
            add(f"{name}.linear_fc1", wide, wide)
            add(f"{name}.linear_fc2", self.output_size, wide)
        return {f"{PREFIX}{name}": shape for name, shape in shapes.items()}

    # --- a picture's pixels

    def prepare(self, source: Any, name: str, most: int | None = None) -> Medium:
        """The picture in the size in which the tower reads it, uint8 [height, width, 3]. Raises UserError."""

        def check(width: int, height: int) -> None:  # a turn by EXIF does not change what it says
            what = f"{name} of {width} x {height} pixels"
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise UserError(f"{what} is more than {MAX_ASPECT} times as long as wide; cut it")
            tokens = math.prod(self.resized(height, width)) // (self.patch * self.merge) ** 2
            check_tokens(what, self.kind, tokens, most)

        image = pictures.opened(source, name, check)
        from PIL import Image  # `opened` says where it is missing

        width, height = image.size
        height, width = self.resized(height, width)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        grid = 1, height // (self.patch * self.merge), width // (self.patch * self.merge)
        return Medium.of(self.kind, pixels, math.prod(grid), grid, name)

    def resized(self, height: int, width: int, frames: int = 1, counted: int = 1) -> tuple[int, int]:
        """The nearest size of whole tokens whose area is within the limits (smart_resize). frames: that share them;
        counted: as how many they count at that size."""
        step, area = self.patch * self.merge, frames * height * width
        found = [round(side / step) * step for side in (height, width)]
        if counted * math.prod(found) > self.max_pixels:
            scale = math.sqrt(area / self.max_pixels)
            found = [max(step, math.floor(side / scale / step) * step) for side in (height, width)]
        elif counted * math.prod(found) < self.min_pixels:
            scale = math.sqrt(self.min_pixels / area)
            found = [math.ceil(side * scale / step) * step for side in (height, width)]
        return found[0], found[1]

    def patches(self, pixels: Array, xp: Any = np) -> Array:
        """uint8 [height, width, 3], or as many [frames, height, width, 3], -> float32 [patches, 3 * frames * patch *
        patch], normalized, those of a token together: rows and columns of tokens, then rows and columns in a token."""
        mean, deviation = (xp.asarray(np.array(of, np.float32)) for of in (self.mean, self.deviation))
        x = (pixels.astype(np.float32) / np.float32(255) - mean) / deviation
        rows, columns = (size // (self.patch * self.merge) for size in pixels.shape[-3:-1])
        x = x.reshape(-1, rows, self.merge, self.patch, columns, self.merge, self.patch, 3)
        x = x.transpose(1, 4, 2, 5, 7, 0, 3, 6)  # [rows, columns, merge, merge, 3, frames or 1, patch, patch]
        x = xp.broadcast_to(x, (*x.shape[:5], self.frames, *x.shape[6:]))
        return x.reshape(rows * columns * self.merge**2, -1)

    def places(self, rows: int, columns: int) -> np.ndarray:
        """Row and column of every patch, in the order of `patches`; int64 [patches, 2]. rows, columns: of tokens."""
        found = np.indices((rows, columns, self.merge, self.merge)).reshape(4, -1)
        return np.stack([found[0] * self.merge + found[2], found[1] * self.merge + found[3]], axis=1)

    # --- the tower

    def encode(self, medium: Medium, weights: Mapping[str, Array], ops: Backend) -> Features:
        """embeddings [tokens, output_size] and as many features for DeepStack as `deepstack` has blocks."""
        return self.encoded(medium.data, weights, ops)

    def encoded(self, pixels: np.ndarray, weights: Mapping[str, Array], ops: Backend) -> Features:
        """The same of pixels that `patches` takes."""
        xp, w = ops.xp, {name.removeprefix(PREFIX): array for name, array in weights.items()}
        w["patch_embed.proj.weight"] = w["patch_embed.proj.weight"].reshape(self.hidden_size, -1)
        grid = self.places(*(size // (self.patch * self.merge) for size in pixels.shape[-3:-1]))
        half = self.hidden_size // self.num_heads // 2
        places = Places.of(grid, THETA ** -(np.arange(0, half, 2) / half), xp)
        layers = ops.layers_for(self.shape)(ops, self.shape, len(grid), len(grid), self._wide(len(grid)))
        x = layers.linear(layers.patches(self, pixels), w, "patch_embed.proj")  # [patches, hidden]
        x, deep = layers.placed(x, w["pos_embed.weight"], places, self.side), {}
        for i in range(self.depth):
            x = layers.layer(x, w, f"blocks.{i}.", places)
            if i in self.deepstack:
                j = self.deepstack.index(i)
                deep[j] = self._merged(x, w, f"deepstack_merger_list.{j}", layers)
        return Features(self._merged(x, w, "merger", layers), [deep[j] for j in range(len(self.deepstack))])

    def _merged(self, x: Array, w: Mapping[str, Array], name: str, layers: Layers) -> Array:
        """Four patches -> a token: the norm is over each patch (the last merger), or over the four (DeepStack's)."""
        wide = len(w[f"{name}.linear_fc1.weight"])
        x = layers.norm(x.reshape(-1, len(w[f"{name}.norm.weight"])), w, f"{name}.norm").reshape(-1, wide)
        return layers.mlp(x, w, f"{name}.linear_fc1", f"{name}.linear_fc2")

    def _wide(self, patches: int) -> int:
        """Numbers of all patches before there are layers, or of a merger's middle."""
        return patches * max(3 * self.frames * self.patch**2, self.hidden_size)

    def work_bytes(self, tokens: int, ops: Backend, frames: int = 1) -> int:
        """Of the arrays of `encode`: layers, the features of so many tokens, pixels of so many frames, places of
        patches and tables of angles, which have a row for each patch of the longer side."""
        n, itemsize = tokens * self.merge**2, ops.dtype.itemsize
        kind, angles = ops.layers_for(self.shape), 2 * self.hidden_size // self.num_heads
        sizes = 3 * frames * self.patch**2 * n, 8 * n, n // self.merge * angles
        features = [itemsize * tokens * self.output_size] * (1 + len(self.deepstack))
        return kind.nbytes(self.shape, n, n, ops, self._wide(n)) + kind.array_bytes(*sizes, *features)


def preprocessing(raw: Mapping[str, Any], shape: QwenVision, source: str) -> dict[str, Any]:
    """What a preprocessor_config.json says of sizes and colours. Raises UserError where it contradicts the tower."""
    get = Fields(raw, source, {})
    for name, only in (("patch_size", shape.patch), ("temporal_patch_size", shape.frames), ("merge_size", shape.merge)):
        get.only(name, only)
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        get.only(name, True)
    get.only("resample", 3)  # bicubic
    get.only("rescale_factor", 1 / 255)
    size = raw.get("size") if isinstance(raw.get("size"), Mapping) else {}
    limits = [
        Fields({"pixels": size.get(new, raw.get(old))}, f"{get.source}: size.{new}", {}).count("pixels", usual)
        for new, old, usual in (
            ("shortest_edge", "min_pixels", shape.min_pixels), ("longest_edge", "max_pixels", shape.max_pixels)
        )
    ]
    if limits[0] > limits[1]:
        raise UserError(f"{get.source}: size.shortest_edge {limits[0]} is more than size.longest_edge {limits[1]}")
    colours = {"mean": get.items("image_mean"), "deviation": get.items("image_std")}
    for name, values in colours.items():
        if values and (len(values) != 3 or not all(type(x) in (int, float) and 0 < x < 1e3 for x in values)):
            raise UserError(f"{get.source}: image_{name[:4]} {values} must be three numbers above 0")
    given = {name: tuple(map(float, values)) for name, values in colours.items() if values}
    return {"min_pixels": limits[0], "max_pixels": limits[1], **given}
