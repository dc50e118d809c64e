"""Norms of keys by what their tokens are of: text, pictures, videos, sound (`inspect --image F`).

OScaR (arXiv 2605.19660) calls it Token Norm Imbalance that tokens which share a group's step differ in norm. In text a
few sinks are shorter than the rest; of visual tokens it shows outliers among themselves, and another level than that of
the text beside them. As numbers, of one layer:

norm    of a token's key over all kv heads; the medians of two kinds of tokens say how far apart their levels are
spread  of a group: its largest norm over its smallest. Groups of one kind are apart from those where kinds meet
left    the same of one kv head after its keys are divided by those norms: what one norm for all heads leaves of the
        spread, and a norm per kv head would take away. 1 is nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import oscar
from ..config import Config
from ..errors import UserError
from ..tokenizer import Tokenizer
from ..towers.media import Medium, expanded, hidden, media_of, opened, placed

TEXT, MEETING = "text", "where kinds meet"
QUANTILES = 0.05, 0.5, 0.95, 1


def prompt_of(
    config: Config, tokenizer: Tokenizer, media: Sequence[Mapping[str, Any]], text: str, tokens: int
) -> tuple[list[int], tuple[Medium, ...]]:
    """The first ids, and the media, of a text, or of a user's message of these parts with the text behind them. Raises
    UserError where there are not so many, or media are among the others."""
    if media and not tokenizer.has_chat_template:
        raise UserError(f"{tokenizer.folder} has no chat template to put a {media[0]['type']} into; leave it out")
    content = [*media, {"type": "text", "text": text}]
    messages = opened([{"role": "user", "content": content}], config.towers) if media else []
    found = tokenizer.rendered_ids(tokenizer.chat(hidden(messages)), True) if media else tokenizer.encode(text)
    ids = expanded(found, media_of(messages), config.towers) if media else found
    if len(ids) < tokens:
        raise UserError(f"the text has {len(ids)} tokens, but {tokens} are needed; lower --tokens or use a longer text")
    if min(ids[tokens:], default=0) < 0:
        raise UserError(f"the media take more than {tokens} tokens; raise --tokens, or make them smaller")
    return ids[:tokens], media_of(messages)


def kinds_of(ids: Sequence[int], media: Sequence[Medium]) -> list[str]:
    """What each token is of."""
    kinds, inputs = [TEXT] * len(ids), placed([ids], [0], [len(ids)], media)
    for segment in () if inputs is None else inputs.segments:
        kinds[segment.rows] = [segment.medium.kind] * (segment.rows.stop - segment.rows.start)
    return kinds


def runs_of(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Tokens in a row that are of one kind."""
    first = [i for i, kind in enumerate(kinds) if not i or kind != kinds[i - 1]]
    ends = [*first[1:], len(kinds)]
    return [{"kind": kinds[i], "first": i, "count": end - i} for i, end in zip(first, ends, strict=True)]


def texts_of(ids: Sequence[int], kinds: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Each token's text, or of what it is a part."""
    return [tokenizer.decode([i]) if i >= 0 else f"[{kind}]" for i, kind in zip(ids, kinds, strict=True)]


def of_layer(keys: np.ndarray, kinds: Sequence[str], group: int) -> dict[str, dict[str, list[float]]]:
    """keys: float32 [kv_heads, tokens, d], whole groups. kind -> QUANTILES of norm, spread and left (the module's
    docstring), as far as there are tokens, and groups, of it."""
    norms = oscar.token_norms(keys.swapaxes(0, 1))
    shares = np.maximum(np.linalg.norm(keys, axis=-1) / norms, 1e-6)  # [kv_heads, tokens]
    spread, left = spreads(norms, group), spreads(shares, group)  # [groups]; [kv_heads, groups]
    of_groups = [set(kinds[i : i + group]) for i in range(0, len(kinds), group)]
    names = np.array([MEETING if len(of) > 1 else next(iter(of)) for of in of_groups])
    found: dict[str, dict[str, list[float]]] = {}
    for kind in dict.fromkeys([*kinds, *names.tolist()]):
        values = {"norm": norms[np.array(kinds) == kind], "spread": spread[names == kind]}
        values["left"] = left[:, names == kind]
        found[kind] = {name: np.quantile(x, QUANTILES).tolist() for name, x in values.items() if x.size}
    return found


def spreads(x: np.ndarray, group: int) -> np.ndarray:
    """Largest over smallest of each group along the last axis."""
    groups = x.reshape(*x.shape[:-1], -1, group)
    return groups.max(axis=-1) / groups.min(axis=-1)
