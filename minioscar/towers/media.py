"""Pictures, videos and sound in a prompt: their token ids, where they stand, and what the model puts there.

A medium becomes as many tokens as its tower says. Their ids are negative and made from the digest of what the tower
reads, each from the digest and its own index: two lists of ids are equal only where the media are, so that everything
that compares ids (a cache that goes on, a chat, a file, the server's prefixes) can never take one picture for another.
The way of a picture:

  message part {"type": "image", "image": source}  --opened-->  the same part with a `Medium` in it (tower.prepare)
  text of the chat template, with one placeholder token a medium  --expanded-->  ids of the whole prompt
  ids and media of every row of a pass  --placed-->  `Inputs` of its Batch: coordinates, segments, shifts
  Model: embeddings of the text, in which `Encoder.of` overwrites the rows of segments; DeepStack is added behind layers
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from typing import Any, Protocol

import numpy as np

from ..backend import Backend
from ..errors import TooLarge, UserError
from ..tables import size

Array = Any
Message = Mapping[str, Any]
# types of parts of a message that are no text, and the kind of their medium; its source stands under the type's name
PARTS = {
    "image": "image", "image_url": "image", "audio": "audio", "input_audio": "audio", "video": "video",
    "video_url": "video",
}  # fmt: skip
KINDS = tuple(dict.fromkeys(PARTS.values()))
AXES = 3  # of M-RoPE: time, row, column
KEPT_BYTES = 256 << 20  # of features that are kept for another pass; those of the newest medium always are


@dataclass(frozen=True, eq=False)
class Medium:
    """One picture, recording or video, or a part of one, as a tower reads it. data: None where only a prompt cache
    knows of it.

    grid: time, rows and columns of its tokens, for the positions of M-RoPE (Qwen2-VL, arXiv 2409.12191); None: its
    tokens have positions like text. step: positions that pass from one time to the next.
    """

    kind: str
    digest: bytes  # SHA-256, of data too
    tokens: int
    grid: tuple[int, int, int] | None = None
    data: Any = field(default=None, repr=False)
    name: str = ""  # for messages to people
    step: int = 1

    @classmethod
    def of(
        cls, kind: str, data: np.ndarray, tokens: int, grid: tuple[int, int, int] | None = None, name: str = "",
        step: int = 1,
    ) -> Medium:
        head = f"{kind} {tokens} {grid} {data.dtype} {data.shape} {'' if step == 1 else f'{step} '}".encode()
        digest = hashlib.sha256(head + np.ascontiguousarray(data).tobytes()).digest()
        return cls(kind, digest, tokens, grid, data, name, step)

    @cached_property
    def ids(self) -> list[int]:
        """Of its tokens, each below zero: 63 bits of SHAKE-256 of the digest for each index."""
        words = hashlib.shake_256(self.digest).digest(8 * self.tokens)
        return (~(np.frombuffer(words, "<u8") >> np.uint64(1)).astype(np.int64)).tolist()

    @property
    def offsets(self) -> np.ndarray:
        """Coordinates of its tokens behind the position where it begins; int64 [AXES, tokens]."""
        if self.grid is None:
            return np.broadcast_to(np.arange(self.tokens), (AXES, self.tokens))
        return np.indices(self.grid).reshape(AXES, -1) * np.array([[self.step], [1], [1]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Medium) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_json(self) -> dict[str, Any]:
        """What a file says of it: all but the data."""
        grid = None if self.grid is None else list(self.grid)
        found = {"kind": self.kind, "digest": self.digest.hex(), "tokens": self.tokens, "grid": grid}
        return found if self.step == 1 else found | {"step": self.step}

    @classmethod
    def from_json(cls, given: Any) -> Medium:
        """Raises ValueError for what `to_json` does not write."""
        try:
            kind, digest, tokens, grid = (given[name] for name in ("kind", "digest", "tokens", "grid"))
            step = given.get("step", 1)
            medium = cls(kind, bytes.fromhex(digest), tokens, None if grid is None else tuple(grid), step=step)
            sizes = [tokens, step, *(medium.grid or ())]
            good = kind in KINDS and len(medium.digest) == 32 and all(type(n) is int and 0 < n < 2**31 for n in sizes)
        except (KeyError, TypeError, ValueError):
            good = False
        if not good or medium.grid is not None and (len(medium.grid) != AXES or int(np.prod(medium.grid)) != tokens):
            raise ValueError("no medium")
        return medium


class Features:
    """What a tower makes of a medium. embeddings: [tokens, hidden], on the back end in its dtype; deep[j]: the same
    shape, added to the hidden states behind layer j (DeepStack, arXiv 2406.04334)."""

    def __init__(self, embeddings: Array, deep: Iterable[Array] = ()):
        self.embeddings, self.deep = embeddings, tuple(deep)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.embeddings, *self.deep))


class Tower(Protocol):
    """A kind of encoder, made of its config alone (a frozen dataclass)."""

    kind: str  # of KINDS
    token: int  # the placeholder that a chat template writes once for each medium
    weights_of: str  # the kind of the tower whose weights it has
    max_tokens: int  # of a medium

    @property
    def feature_width(self) -> int:
        """Numbers of `Features` a token."""
        ...

    def prepare(self, source: Any, name: str, most: int | None = None) -> Medium | list[Medium | str]:
        """Opens and preprocesses one; of a video, what stands in its place: media, and text between them. Raises
        UserError, in one line, for what cannot be read, and TooLarge for more than `most` tokens in a medium, where its
        head already says so without reading the rest."""
        ...

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Its tensors' names and shapes, as checkpoints have them."""
        ...

    def encode(self, medium: Medium, weights: Mapping[str, Array], ops: Backend) -> Features: ...

    def work_bytes(self, tokens: int, ops: Backend) -> int:
        """Of the arrays of `encode` of a medium of so many tokens, and of its features."""
        ...


# --- messages and ids


def opened(messages: Sequence[Message], towers: Mapping[str, Tower], most: int | None = None) -> list[Message]:
    """The messages with a `Medium` in the place of each source; those that have one keep it. most: tokens of each.

    Raises UserError for a kind that the model does not read, and as `Tower.prepare` does.
    """

    def parts(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        kind = PARTS.get(given.get("type"))
        if kind is None:
            return [given]
        if kind not in towers:
            raise UserError(f"this model reads no {kind}s; send it text alone")
        source = given[given["type"]]
        if isinstance(source, Medium):
            return [{"type": kind, kind: source}]
        given = source if kind != "video" else {"video": source, "fps": given.get("fps")}
        made = towers[kind].prepare(given, _named(kind, source), most)
        found = made if isinstance(made, list) else [made]
        return [{"type": "text", "text": of} if isinstance(of, str) else {"type": kind, kind: of} for of in found]

    return _each_part(messages, parts)


def hidden(messages: Sequence[Message], form: Callable[[Any], Any] = lambda medium: True) -> list[Message]:
    """Messages with something plain in the place of media: for a template, which is a program, or for a file."""

    def parts(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        kind = given["type"]
        return [{"type": kind, kind: form(given[kind])} if kind in KINDS else given]

    return _each_part(messages, parts)


def restored(messages: Sequence[Message]) -> list[Message]:
    """The inverse of `hidden` with `Medium.to_json`. Raises ValueError."""
    return hidden(messages, Medium.from_json)


def _each_part(
    messages: Sequence[Message], parts: Callable[[Mapping[str, Any]], list[Mapping[str, Any]]]
) -> list[Message]:
    """The messages with what stands in the place of each part."""
    return [
        {**message, "content": [part for one in message["content"] for part in parts(one)]}
        if isinstance(message.get("content"), list | tuple) else message for message in messages
    ]


def _named(kind: str, source: Any) -> str:
    is_file = isinstance(source, str | PathLike) and not str(source).startswith("data:")
    return str(source) if is_file else f"the {kind}"


def media_of(messages: Sequence[Message]) -> tuple[Medium, ...]:
    """The media of messages that `opened` returned, in their order."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list | tuple) for part in content)
    return tuple(part[part["type"]] for part in parts if part.get("type") in KINDS)


def expanded(ids: Sequence[int], media: Sequence[Medium], towers: Mapping[str, Tower]) -> list[int]:
    """The ids of a prompt, each placeholder replaced by the ids of its medium, in their order.

    Raises UserError where there are not as many placeholders as media: a template that shows none of them, or shows
    videos as pictures, or a text that holds a placeholder's name.
    """
    waiting = {kind: [medium for medium in media if medium.kind == kind] for kind in towers}
    kind_of = {tower.token: kind for kind, tower in towers.items()}
    counts = [(sum(i == token for i in ids), len(waiting[kind]), kind) for token, kind in kind_of.items()]
    for places, given, kind in sorted(counts, key=lambda count: count[0] - count[1]):  # what a template lacks first
        if places != given:
            way_out = "leave the placeholder out of the text" if places > given else "the chat template shows fewer"
            raise UserError(f"the prompt has {places} places for {given} {kind}s; {way_out}")
    each = {kind: iter(queue) for kind, queue in waiting.items()}
    return [i for token in ids for i in (next(each[kind_of[token]]).ids if token in kind_of else (token,))]


def check_tokens(what: str, kind: str, tokens: int, most: int | None) -> None:
    """what: a medium, with its size. Raises TooLarge for more tokens than `most`."""
    if most is not None and tokens > most:
        raise TooLarge(f"{what} becomes {tokens} tokens, but at most {most} are accepted; make it smaller", kind)


def words(ids: Sequence[int]) -> Sequence[int]:
    """The ids that are of the vocabulary."""
    return ids if not ids or min(ids) >= 0 else [i for i in ids if i >= 0]


# --- rows of a pass


@dataclass(frozen=True)
class Segment:
    """Tokens of a medium in one pass: `rows` of the pass are its tokens `part`."""

    rows: slice
    medium: Medium
    part: slice


@dataclass(frozen=True)
class Inputs:
    """What a `Batch` with media has beside its ids. coordinates: int64 [AXES, tokens], by which M-RoPE turns each token
    of the pass; shifts[i]: position minus place of what follows sequence i."""

    coordinates: np.ndarray
    shifts: tuple[int, ...]
    segments: tuple[Segment, ...]

    @classmethod
    def blank(cls, counts: Sequence[int]) -> Inputs:
        """Of a pass of the same shape over text."""
        return cls(np.zeros((AXES, sum(counts)), np.int64), (0,) * len(counts), ())


def placed(
    rows: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int], media: Sequence[Medium]
) -> Inputs | None:
    """rows[i]: the ids of row i from its beginning on, of which counts[i] from starts[i] on are in this pass. None: no
    row holds a medium.

    Raises ValueError for an id of no medium.
    """
    known = {medium.ids[0]: medium for medium in media}
    if not known or not any(i < 0 for row, s, n in zip(rows, starts, counts, strict=True) for i in row[: s + n]):
        return None
    coordinates, shifts, segments, first = [], [], [], 0
    for row, start, count in zip(rows, starts, counts, strict=True):
        of_row, position, found = _walk(row[: start + count], known)
        coordinates.append(of_row[:, start:])
        shifts.append(position - start - count)
        for at, medium, tokens in found:
            low, high = max(at, start), at + tokens
            if low < high:
                here = slice(first + low - start, first + high - start)
                segments.append(Segment(here, medium, slice(low - at, high - at)))
        first += count
    return Inputs(np.concatenate(coordinates, axis=1), tuple(shifts), tuple(segments))


def shift_of(ids: Sequence[int], media: Sequence[Medium]) -> int:
    """Position minus place of what follows a row of these ids."""
    found = placed([ids], [0], [len(ids)], media)
    return 0 if found is None else found.shifts[0]


def _walk(
    ids: Sequence[int], known: Mapping[int, Medium]
) -> tuple[np.ndarray, int, list[tuple[int, Medium, int]]]:
    """Coordinates of a row, the position of what follows it, and its media: (where, which, how many of its tokens)."""
    coordinates, found, at, position = np.empty((AXES, len(ids)), np.int64), [], 0, 0
    negative = np.flatnonzero(np.asarray(ids, np.int64) < 0)
    while at < len(ids):
        if ids[at] >= 0:
            following = int(np.searchsorted(negative, at))
            end = int(negative[following]) if following < len(negative) else len(ids)
            coordinates[:, at:end] = np.arange(position, position + end - at)
            position += end - at
        else:
            medium = known.get(ids[at])
            end = at if medium is None else min(at + medium.tokens, len(ids))
            if medium is None or list(ids[at:end]) != medium.ids[: end - at]:
                raise ValueError(f"id {ids[at]} at {at} begins no medium of this prompt")
            offsets = medium.offsets
            coordinates[:, at:end] = position + offsets[:, : end - at]
            position += int(offsets.max()) + 1
            found.append((at, medium, end - at))
        at = end
    return coordinates, position, found


# --- in the model


class Encoder:
    """The towers of a model with their weights; features are kept as long as there is room for them.

    weights: of each kind, by the names of `Tower.expected`.
    """

    def __init__(self, towers: Mapping[str, Tower], weights: Mapping[str, Mapping[str, Array]], ops: Backend):
        self.towers, self.weights, self.ops = towers, weights, ops
        self.kept: OrderedDict[Medium, Features] = OrderedDict()

    def of(self, inputs: Inputs | None) -> list[tuple[slice, Array, list[Array]]]:
        """Each segment's rows, its embeddings and its DeepStack. Raises UserError for a medium without its data."""
        found = []
        for segment in () if inputs is None else inputs.segments:
            features = self._features(segment.medium)
            deep = [array[segment.part] for array in features.deep]
            found.append((segment.rows, features.embeddings[segment.part], deep))
        return found

    def _features(self, medium: Medium) -> Features:
        if medium not in self.kept:
            if medium.data is None:
                why = f"a part of it is read again, but the prompt cache does not hold the {medium.kind} itself"
                raise UserError(f"the {medium.kind} of {medium.tokens} tokens is not there: {why}; give it again")
            tower = self.towers[medium.kind]
            made = tower.encode(medium, self.weights[tower.weights_of], self.ops.first)
            self.kept[medium] = Features(self.ops.spread(made.embeddings), map(self.ops.spread, made.deep))
        self.kept.move_to_end(medium)
        most = KEPT_BYTES * self.ops.cards
        while len(self.kept) > 1 and sum(features.nbytes for features in self.kept.values()) > most:
            self.kept.popitem(last=False)
        return self.kept[medium]


def bytes_of_media(towers: Mapping[str, Tower], ops: Backend, most: int, chunk: int) -> int:
    """What pictures and sounds of at most `most` tokens each take beside passes of `chunk` tokens: the largest in its
    tower, and the features that are kept and those that a pass reads, which may end and begin within a medium."""

    def of(tower: Tower) -> int:
        tokens = min(most, tower.max_tokens)
        read = ops.dtype.itemsize * tower.feature_width * (chunk + 2 * tokens)
        return tower.work_bytes(tokens, ops) + KEPT_BYTES + read

    return max(map(of, towers.values()), default=0)


def check_room(media: Sequence[Medium], towers: Mapping[str, Tower], ops: Backend, cache: int) -> None:
    """Raises UserError where the tower has no room for the largest of these beside so many bytes of cache."""
    sizes = [(towers[medium.kind].work_bytes(medium.tokens, ops), medium) for medium in media]
    need, medium = max(sizes, key=lambda of: of[0], default=(0, None))
    if need and need + (cache := cache // ops.cards) > (free := ops.free_bytes() // ops.cards):
        what = f"{medium.name or medium.kind} becomes {medium.tokens} tokens and needs {size(need)}"
        beside = f"beside a cache of {size(cache)}, but {size(free)} of {ops.name} memory are free"
        raise UserError(f"{what} {beside}; make it smaller")
