"""A prompt that a model has read once and need not read again: its tokens, its row of the cache, on the host or in a
file.

A file is safetensors: `ids`, `prompt` (JSON in UTF-8), `logits`, and per layer the arrays of `rows.row_layout`, which
do not depend on the back end. With media it is version 2: ids are int64, and `prompt` names the media, not their data.
Its metadata binds it to format, config, scheme and weights; `contents` is a digest of
the tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .cache import Cache
from .chat_template import Message, as_parts, flat, malformed
from .checks import as_path
from .config import Config
from .errors import Failure, UserError, one_line, shown
from .oscar import SCHEMES, Scheme
from .rows import row_layout
from .storage import strict_json as json
from .storage.files import check_seekable, reason, replacing
from .towers.media import Medium, hidden, restored, shift_of

FORMAT, VERSION, WITH_MEDIA = "minioscar-prompt-cache", "1", "2"


class Source(Protocol):
    """The loaded model that a prompt cache is of: an Engine."""

    config: Config
    scheme: Scheme

    @property
    def weights_sha256(self) -> str: ...

    @property
    def model_files(self) -> list[Path]: ...


@dataclass(frozen=True)
class PromptCache:
    """What `Engine.prefill` returns. messages or text say what the tokens are, so that a prompt can go on from there;
    neither: ids only.

    rows: per layer, the arrays of `rows.row_layout`. logits: float32 [vocab], what the model says after the last
    token, if known.
    """

    engine: Source
    ids: list[int]
    rows: list[dict[str, np.ndarray]]
    messages: list[Message] | None = None
    text: str | None = None
    logits: np.ndarray | None = None
    media: tuple[Medium, ...] = ()

    @classmethod
    def of(cls, engine: Source, cache: Cache, ids: Sequence[int], **known: Any) -> PromptCache:
        """A copy of row 0 of a cache that holds exactly these tokens."""
        if cache.lengths[0] != len(ids):
            raise ValueError(f"the cache holds {cache.lengths[0]} tokens, not {len(ids)}")
        return cls(engine, list(ids), cache.export_row(0), **known)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for row in self.rows for array in row.values())

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def chat(self) -> bool | None:
        """Whether it goes on as a chat, or else as plain text; None: as token ids."""
        return None if self.messages is self.text is None else self.messages is not None

    def begins(self, messages: Sequence[Message], ids: Sequence[int]) -> bool:
        """Whether this chat, of these ids, begins with what is held: its messages, of which the last may go on, or its
        tokens."""
        if self.messages is None:
            return common(ids, self.ids) == len(self)
        both = messages, self.messages
        theirs, ours = ([{**message, "content": flat(message.get("content"))} for message in chat] for chat in both)
        *before, last = ours
        if theirs[: len(before)] != before or len(theirs) < len(ours) or theirs[len(before)]["role"] != last["role"]:
            return False
        return _goes_on(theirs[len(before)]["content"], last["content"])

    def followed_by(self, prompt: str) -> str | list[Message]:
        """The whole prompt that `prompt` makes of this one: what a cached text goes on with, or the next message of a
        chat."""
        if not isinstance(prompt, str):
            raise UserError(f"what follows a prompt cache must be text, not {shown(prompt)}")
        if self.messages is not None:
            return continued(self.messages, prompt)
        if self.text is not None:
            return self.text + prompt
        raise UserError("this prompt cache holds token ids without their text; give token ids too")

    def fill(self, cache: Cache, slot: int, tokens: int) -> None:
        """Puts the first `tokens` tokens, or what can be had of them, into an empty row of a cache of the same
        model."""
        cache.import_row(slot, self.rows, len(self), min(tokens, len(self)))
        cache.shifts[slot] = shift_of(self.ids[: int(cache.lengths[slot])], self.media)

    # --- files

    def save(self, path: str | Path) -> None:
        """Writes a file that `Engine.load_cache` reads. Raises UserError or Failure where it cannot be written."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        path = as_path("the file of a prompt cache", path)
        check_storable(self.engine.scheme)
        try:
            messages = None if self.messages is None else hidden(self.messages, Medium.to_json)
            prompt = {"messages": messages, "text": self.text}
            if self.media:
                prompt["media"] = [medium.to_json() for medium in self.media]
            prompt = json.dumps(prompt, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            why = f"the messages cannot be written as JSON ({one_line(error)}); use text, lists and dicts"
            raise UserError(f"{path}: {why}") from None
        dtype, version = (np.int64, WITH_MEDIA) if self.media else (np.int32, VERSION)
        tensors = {"ids": np.array(self.ids, dtype), "prompt": np.frombuffer(prompt, np.uint8)}
        if self.logits is not None:
            tensors["logits"] = self.logits
        tensors |= {f"layers.{i}.{name}": array for i, row in enumerate(self.rows) for name, array in row.items()}
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        made_with = {"weights": self.engine.weights_sha256, "contents": digest(tensors)}
        metadata = binding(self.engine.config, self.engine.scheme) | {"version": version} | made_with
        with replacing(path, inputs=self.engine.model_files) as partial:
            try:
                save_file(tensors, partial, metadata)
            except SafetensorError as error:  # a full disk
                raise Failure(f"{path}: cannot be written: {reason(error)}") from None

    @classmethod
    def load(cls, path: str | Path, engine: Source) -> PromptCache:
        """Raises UserError for a file that is damaged or not made with this model, weights and scheme."""
        with File(path) as file:
            file.check(engine.config, engine.scheme, engine.weights_sha256)
            return cls(engine, **file.read(engine.config, engine.scheme))


def _goes_on(content: Any, held: Any) -> bool:
    """Whether a message's content begins with `held`, which may end within a text."""
    if isinstance(content, list) and isinstance(held, list) and len(content) >= len(held) > 0:
        *before, last = held
        one = content[len(before)]
        are_texts = one["type"] == last["type"] == "text"
        goes_on = one["text"].startswith(last["text"]) if are_texts else one == last
        return content[: len(before)] == before and goes_on
    return content == held or isinstance(content, str) and isinstance(held, str) and content.startswith(held)


def check_owner(cache: Any, engine: Source) -> None:
    """Raises UserError for what is no prompt cache, or one of another engine."""
    if not isinstance(cache, PromptCache):
        raise UserError(f"cache {shown(cache)} must be what prefill or load_cache returned, which reads a file")
    if cache.engine is not engine:
        raise UserError("this prompt cache belongs to another loaded model; save it and load it with this one")


def check_storable(scheme: Scheme) -> None:
    """Raises UserError where what a row holds means nothing to another run."""
    if scheme.calibrated:
        why = "its rotations follow samples drawn while the model is loaded, elsewhere a little otherwise"
        raise UserError(f"a cache of --kv {scheme.name} cannot be written to a file: {why}; use another --kv")


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences of ids share at their beginning."""
    n = min(len(a), len(b))
    for start in range(0, n, 512):
        one, other = (list(ids[start : min(start + 512, n)]) for ids in (a, b))
        if one != other:
            return start + next(i for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y)
    return n


def continued(messages: Sequence[Message], said: str | list[dict[str, Any]]) -> list[Message]:
    """The chat after one more message of the user, text or parts. An open message of the user's (a document) goes on
    with it, after a blank line."""
    if messages and messages[-1]["role"] == "user":
        *before, last = messages
        content = last["content"]
        if isinstance(content, str) and isinstance(said, str):
            more = f"{content}\n\n{said}"
        else:
            more = [part for half in (content, said) for part in (as_parts(half) if half else ())]
        return [*before, {**last, "content": more if said else content}]
    return [*messages, {"role": "user", "content": said}]


def binding(config: Config, scheme: Scheme) -> dict[str, str]:
    """What a file must agree with, but for the weights."""
    fields = asdict(scheme)
    fields["window"] = fields.pop("flush")  # its name in files
    made_with = {"config": asdict(config), "scheme": fields}
    return {"format": FORMAT, "version": VERSION} | {what: json.dumps(fields) for what, fields in made_with.items()}


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all tensors, hex."""

    def one(name: str) -> bytes:
        array = np.ascontiguousarray(tensors[name])
        head = f"{name} {array.dtype} {array.shape}".encode()
        return hashlib.sha256(head + hashlib.sha256(array.reshape(-1).view(np.uint8)).digest()).digest()

    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        return hashlib.sha256(b"".join(threads.map(one, sorted(tensors)))).hexdigest()


class File:
    """A prompt cache's file, opened: first its metadata, at no cost, then `check`, then `read`."""

    def __init__(self, path: str | Path):
        from safetensors import SafetensorError, safe_open

        self.path, self.stack = check_seekable(path), ExitStack()
        try:
            self.handle = self.stack.enter_context(safe_open(self.path, "np"))
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist; make it with: python -m minioscar cache MODEL --prompt-file F --out {path}"
            ) from None
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated or not a safetensors file ({one_line(error)}); make it again"
            ) from None
        self.metadata = self.handle.metadata() or {}
        if self.metadata.get("format") != FORMAT:
            raise UserError(
                f"{path} is a safetensors file, but not a prompt cache of minioscar; make one with: python -m "
                "minioscar cache"
            )
        if self.metadata.get("version") not in (VERSION, WITH_MEDIA):
            found = self.metadata.get("version")
            ours = f"this minioscar reads {VERSION!r} and {WITH_MEDIA!r}"
            raise UserError(f"{path} has version {found!r} of the format, {ours}; make it again")

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def scheme(self) -> str:
        """The scheme's name. Raises UserError if it is none."""
        name = self._json("scheme").get("name")
        if not isinstance(name, str) or name not in SCHEMES:
            raise UserError(
                f"{self.path} was made with --kv {name!r}, which this minioscar does not have; make it again"
            )
        return name

    def check(self, config: Config, scheme: Scheme, weights: str) -> None:
        """Raises UserError, by name, where the file was not made with this config, scheme and weights."""
        if self.scheme != scheme.name:
            raise UserError(
                f"{self.path} was made with --kv {self.scheme}, not {scheme.name}; use --kv {self.scheme} or make it "
                "again"
            )
        theirs = self._json("config")
        if "window" not in theirs:  # as versions before 0.2 had a sliding window
            config = replace(config, max_positions=config.max_context, window=None)
        for what, ours in binding(config, scheme).items():
            if what in ("config", "scheme"):
                self._same(what, self._fields(what), json.loads(ours))
        if self.metadata.get("weights") != weights:
            found = "".join(str(self.metadata.get("weights")).split())[:12]
            raise UserError(
                f"{self.path} was made with other weights (SHA-256 {found}..., here {weights[:12]}...); make it again"
            )

    def _same(self, what: str, theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> None:
        """A field that another version does not have counts where it changes something."""
        for name in dict.fromkeys([*ours, *theirs]):
            a, b = (fields.get(name, "nothing") for fields in (theirs, ours))
            if isinstance(a, dict) and isinstance(b, dict):
                self._same(what, a, b, f"{prefix}{name}.")
            elif a != b and not ((name in theirs) != (name in ours) and _is_neutral(theirs.get(name, ours.get(name)))):
                difference = f"{prefix}{name} {_short(a)} there, {_short(b)} here"
                raise UserError(f"{self.path} was made with another {what}: {difference}; make it again")

    def _fields(self, what: str) -> dict[str, Any]:
        """The metadata of this name; a scheme of before key_bits and value_bits had one number for both."""
        fields = self._json(what)
        bits = fields.pop("bits", None)
        return fields if bits is None else {"key_bits": bits, "value_bits": bits} | fields

    def _json(self, key: str) -> dict[str, Any]:
        try:
            value = json.loads(self.metadata[key])
        except (KeyError, ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{self.path} does not say which {key} it was made with; it is damaged: make it again")
        return value

    def read(self, config: Config, scheme: Scheme) -> dict[str, Any]:
        """The fields of a PromptCache, every tensor checked. Raises UserError for a damaged file."""
        names = set(self.handle.keys())
        length, prompt = (self._length(name) if name in names else 0 for name in ("ids", "prompt"))
        if not 0 < length <= config.max_context:
            raise self._damaged(f"it holds {length} tokens")
        layer = row_layout(config, scheme, length)
        expected = {f"layers.{i}.{name}": of for i in range(config.num_layers) for name, of in layer.items()}
        of_ids = np.dtype(np.int64 if self.metadata["version"] == WITH_MEDIA else np.int32)
        expected |= {"ids": ((length,), of_ids), "prompt": ((prompt,), np.dtype(np.uint8))}
        if "logits" in names:
            expected["logits"] = ((config.vocab_size,), np.dtype(np.float32))
        if names != set(expected):
            raise self._damaged(f"tensor {sorted(names ^ set(expected))[0]} is missing or has no place")
        for name, (shape, _) in expected.items():
            if self._shape(name) != shape:
                raise self._damaged(f"tensor {name} has shape {list(self._shape(name))}, not {list(shape)}")
        tensors = {name: self._tensor(name) for name in expected}
        for name, (_, dtype) in expected.items():
            if tensors[name].dtype != dtype:
                raise self._damaged(f"tensor {name} is {tensors[name].dtype}, not {dtype}")
        if digest(tensors) != self.metadata.get("contents"):
            raise self._damaged("the digest of its tensors is not the one it was written with")
        for name, array in tensors.items():
            if array.dtype.kind not in "iu" and not np.isfinite(array).all():
                raise self._damaged(f"tensor {name} holds a NaN or an infinity")
        ids, prompt = tensors["ids"].tolist(), self._prompt(tensors["prompt"])
        try:
            shift_of(ids, prompt["media"])
            known = not ids or prompt["media"] or min(ids) >= 0
        except ValueError:
            known = False
        if not known or max(ids) >= config.vocab_size:
            raise self._damaged(f"it has token ids outside 0 ... {config.vocab_size - 1}")
        rows = [{name: tensors[f"layers.{i}.{name}"] for name in layer} for i in range(config.num_layers)]
        return {"ids": ids, "rows": rows, "logits": tensors.get("logits"), **prompt}

    def _prompt(self, raw: np.ndarray) -> dict[str, Any]:
        """messages, text and media of a PromptCache."""
        try:
            prompt = json.loads(raw.tobytes())
            messages, text = prompt["messages"], prompt["text"]
            media = tuple(map(Medium.from_json, prompt.get("media", ())))
            if messages is not None and malformed(messages) or not (text is None or isinstance(text, str)):
                raise ValueError("no prompt")
            if messages is not None:
                messages = [*restored(messages)]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged("its prompt is not readable") from None
        return {"messages": messages, "text": text, "media": media}

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.handle.get_slice(name).get_shape())

    def _length(self, name: str) -> int:
        return next(iter(self._shape(name)), 0)

    def _tensor(self, name: str) -> np.ndarray:
        from safetensors import SafetensorError

        try:
            return self.handle.get_tensor(name)
        except (SafetensorError, TypeError, ValueError, AttributeError, OSError) as error:  # a dtype that NumPy has not
            raise self._damaged(f"tensor {name} cannot be read: {one_line(error)}") from None

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.path} is damaged ({reason}); make it again")


def _is_neutral(value: Any) -> bool:
    """Of a field of Config or Scheme: off, none, or a factor of 1.0."""
    number = type(value) in (int, float) and value == 0 or type(value) is float and value == 1.0
    return value is None or value is False or number


def _short(value: Any) -> str:
    return json.dumps(value)[:60]
