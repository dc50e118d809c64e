"""Qwen3-VL in torch, for training a small one: a batch of pages of one size, each before the same number of tokens.

The names of its parameters, and so its checkpoint, are those of transformers' Qwen3VLForConditionalGeneration, and so
are its numbers (`python -m tools.train_reader --compare FOLDER` says by how much they differ). What is other: a page is
one shade a pixel, its three colours and two frames being equal, and all pages of a batch are one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB = 104
END, START, STOP, IMAGE, VIDEO, FIRST = 1, 2, 3, 4, 5, 8  # ids; FIRST: of the printable characters of ASCII, in order
HEAD = 64
PATCH, MERGE = 16, 2
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": HEAD, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "eos_token_id": END, "bos_token_id": None, "pad_token_id": 0, "model_type": "qwen3_vl_text", "hidden_act": "silu",
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True
    },
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "patch_size": PATCH, "in_channels": 3,
    "out_hidden_size": 128, "num_position_embeddings": 256, "deepstack_visual_indexes": [1], "temporal_patch_size": 2,
    "spatial_merge_size": MERGE, "model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.02,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "dtype": "bfloat16",
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": STOP,
    "tie_word_embeddings": True, "text_config": TEXT, "vision_config": VISION,
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What depends on the size of the pages and the number of tokens alone. rows, columns: of tokens."""

    rows: int
    columns: int
    places: Tensor  # int64 [4, patches]: rows of the table of positions
    shares: Tensor  # float32 [4, patches]: their weights
    vision: tuple[Tensor, Tensor]  # cos, sin [patches, HEAD]
    text: tuple[Tensor, Tensor]  # [tokens, HEAD]

    @classmethod
    def of(cls, rows: int, columns: int, after: int, device: Any) -> Grid:
        """after: tokens of text behind the page's."""
        spot = np.indices((rows, columns, MERGE, MERGE)).reshape(4, -1)
        spot = np.stack([spot[0] * MERGE + spot[2], spot[1] * MERGE + spot[3]], axis=1)  # [patches, 2]
        side = math.isqrt(VISION["num_position_embeddings"])
        exact = spot * ((side - 1) / np.maximum(spot.max(axis=0), 1))
        low = np.floor(exact).astype(np.int64)
        part, high = exact - low, np.minimum(low + 1, side - 1)
        corners = [(a, b) for a in ((low[:, 0], 1 - part[:, 0]), (high[:, 0], part[:, 0]))
                   for b in ((low[:, 1], 1 - part[:, 1]), (high[:, 1], part[:, 1]))]  # fmt: skip
        frequencies = 10000.0 ** -(np.arange(0, HEAD // 2, 2) / (HEAD // 2))
        vision = (spot[:, :, None] * frequencies).reshape(len(spot), -1)
        image = np.indices((1, rows, columns)).reshape(3, -1) + 1
        behind = 1 + max(rows, columns) + np.arange(after + 1)  # the end of the picture, and what follows
        where = np.concatenate([np.zeros((3, 1)), image, np.broadcast_to(behind, (3, after + 1))], axis=1)
        axes, section = np.zeros(HEAD // 2, np.int64), TEXT["rope_parameters"]["mrope_section"]
        for axis in (1, 2):
            axes[axis : 3 * section[axis] : 3] = axis
        theta = TEXT["rope_parameters"]["rope_theta"]
        text = where[axes].T * theta ** -(np.arange(0, HEAD, 2) / HEAD)

        def tensor(x: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        def turned(angles: np.ndarray) -> tuple[Tensor, Tensor]:
            both = np.concatenate([angles, angles], axis=1)
            return tensor(np.cos(both).astype(np.float32)), tensor(np.sin(both).astype(np.float32))

        places = tensor(np.stack([a[0] * side + b[0] for a, b in corners]))
        shares = tensor(np.stack([a[1] * b[1] for a, b in corners]).astype(np.float32))
        return cls(rows, columns, places, shares, turned(vision), turned(text))


def rope(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x: [batch, heads, tokens, HEAD]."""
    a, b = x.chunk(2, dim=-1)
    return (x * tables[0] + torch.cat([-b, a], dim=-1) * tables[1]).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, TEXT["rms_norm_eps"]).to(x.dtype)


def linear(size: int, out: int, bias: bool = False) -> nn.Linear:
    layer = nn.Linear(size, out, bias=bias)
    nn.init.normal_(layer.weight, std=size**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def quiet(layer: nn.Linear) -> nn.Linear:
    """The last product of a branch, small at first."""
    with torch.no_grad():
        layer.weight *= 0.3
    return layer


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden, self.heads, self.kv = (TEXT[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        self.q_proj, self.k_proj = linear(hidden, self.heads * HEAD), linear(hidden, self.kv * HEAD)
        self.v_proj, self.o_proj = linear(hidden, self.kv * HEAD), quiet(linear(self.heads * HEAD, hidden))
        self.q_norm, self.k_norm = Norm(HEAD), Norm(HEAD)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, tokens, self.heads, HEAD)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, tokens, self.kv, HEAD)).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.kv, HEAD).transpose(1, 2)
        k, v = (y.repeat_interleave(self.heads // self.kv, dim=1) for y in (rope(k, tables), v))
        y = F.scaled_dot_product_attention(rope(q, tables), k, v.to(q.dtype), is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
        self.gate_proj, self.up_proj = linear(hidden, inner), linear(hidden, inner)
        self.down_proj = quiet(linear(inner, hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm, self.post_attention_layernorm = (Norm(TEXT["hidden_size"]) for _ in range(2))

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), tables)
        return x + self.mlp(self.post_attention_layernorm(x))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, TEXT["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=TEXT["hidden_size"] ** -0.5)
        self.layers = nn.ModuleList(Layer() for _ in range(TEXT["num_hidden_layers"]))
        self.norm = Norm(TEXT["hidden_size"])


class Look(nn.Module):
    """Attention within a page."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = linear(VISION["hidden_size"], 3 * VISION["hidden_size"], bias=True)
        self.proj = quiet(linear(VISION["hidden_size"], VISION["hidden_size"], bias=True))

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        batch, patches, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, patches, 3, -1, HEAD).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rope(q, tables), rope(k, tables), v)
        return self.proj(y.transpose(1, 2).reshape(batch, patches, hidden))


class VisionMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1 = linear(VISION["hidden_size"], VISION["intermediate_size"], bias=True)
        self.linear_fc2 = quiet(linear(VISION["intermediate_size"], VISION["hidden_size"], bias=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(VISION["hidden_size"], eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Look(), VisionMlp()

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), tables)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four patches -> a token. wide: they are normed together (DeepStack), else each."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        size = VISION["hidden_size"] * MERGE**2
        self.wide, self.norm = wide, nn.LayerNorm(size if wide else VISION["hidden_size"], eps=1e-6)
        self.linear_fc1, self.linear_fc2 = linear(size, size, True), linear(size, VISION["out_hidden_size"], True)

    def forward(self, x: Tensor) -> Tensor:
        batch, size = len(x), VISION["hidden_size"] * MERGE**2
        x = self.norm(x.view(batch, -1, size)) if self.wide else self.norm(x).view(batch, -1, size)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = VISION["hidden_size"]
        shape = (PATCH, PATCH)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv3d(3, hidden, (2, *shape), stride=(2, *shape))
        # of six equal inputs
        nn.init.normal_(self.patch_embed.proj.weight, std=(6 * PATCH) ** -1)
        nn.init.zeros_(self.patch_embed.proj.bias)
        self.pos_embed = nn.Embedding(VISION["num_position_embeddings"], hidden)
        nn.init.normal_(self.pos_embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(VISION["depth"]))
        self.merger = Merger(wide=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(wide=True) for _ in VISION["deepstack_visual_indexes"])

    def forward(self, pages: Tensor, grid: Grid) -> tuple[Tensor, list[Tensor]]:
        """pages: float32 [batch, height, width] from -1 to 1. Tokens [batch, rows * columns, hidden] and those of
        DeepStack."""
        x = pages.view(len(pages), grid.rows, MERGE, PATCH, grid.columns, MERGE, PATCH)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(len(pages), -1, PATCH * PATCH)
        proj = self.patch_embed.proj
        x = F.linear(x, proj.weight.sum(dim=(1, 2)).flatten(1), proj.bias)
        x = x + (self.pos_embed(grid.places) * grid.shares[..., None]).sum(dim=0)
        deep = []
        for i, block in enumerate(self.blocks):
            x = block(x, grid.vision)
            if i in VISION["deepstack_visual_indexes"]:
                deep.append(self.deepstack_merger_list[len(deep)](x))
        return self.merger(x), deep


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.language_model, self.model.visual = Language(), Visual()

    def forward(self, pages: Tensor, ids: Tensor, grid: Grid) -> tuple[Tensor, Tensor, list[Tensor]]:
        """ids: [batch, tokens] of the text behind the page. Logits [batch, tokens, VOCAB], the page's embeddings and
        what DeepStack adds."""
        language = self.model.language_model
        seen, deep = self.model.visual(pages, grid)
        first, last = (language.embed_tokens(ids.new_full((len(ids), 1), i)) for i in (START, STOP))
        x = torch.cat([first, seen.float(), last, language.embed_tokens(ids)], dim=1)
        tokens = grid.rows * grid.columns
        for i, layer in enumerate(language.layers):
            x = layer(x, grid.text)
            if i < len(deep):
                x = x + F.pad(deep[i].to(x.dtype), (0, 0, 1, x.shape[1] - tokens - 1))
        x = language.norm(x[:, tokens + 2 :])
        return F.linear(x, language.embed_tokens.weight), seen, deep
