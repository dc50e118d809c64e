"""Mutated model folders, prompt caches and prompts, each made from (seed, number) alone; `tests/fuzz.py` runs them."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minioscar.prompt_cache import digest

from .tiny import talker, write_talker

NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 64, 127, 4096, 2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**63, 10**30]
NUMBERS += [0.0, -0.5, 1e-30, 1e30, 1e308, float("inf"), float("nan")]
WORDS = [
    "", "a", "\0", "..", "../decoy/model.safetensors", "DECOY/model.safetensors", "DECOY", "default", "yarn", "llama3",
    "silu", "true"
]
WORDS += ["x" * 5000, "\ud800", "é\n"]  # DECOY: the absolute path of a folder that nothing may open
TEMPLATES = [
    "{% for", "{{ messages }}", "{{ ''.__class__ }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**6 }}",
    ""
]
TEMPLATES += ["{{ messages[0].content }}", "{% include 'DECOY/tokenizer.json' %}", "{{ messages.append(1) }}"]
SNIPPETS = ["the ", "cat", "\n", "é", "日", "\0", "\ud8ff", "<|end|>", "<|user|>", "{{ x }}"]
OPTIONS: dict[str, list[Any]] = {
    "--max-tokens": [1, 2, 0, -5, "x"],
    "--temperature": [0, 1, 1e-320, 1e300, -1, "nan", "inf"],
    "--top-p": [1, 0.5, 0, 1e-9, 2, "nan"],
    "--top-k": [0, 1, 5, 10**12, -1],
    "--min-p": [0, 0.5, 1, 2, "nan"],
    "--seed": [0, 2**64 - 1, 2**64, -1],
    "--ctx": [0, 1, 64, 127, 128, 1024, 1025, 10**18, -3],
    "--kv": ["bf16", "quarot", "oscar", "int2-compact", "int4", "int9", ""],
    "--stop": ["", "a", " ", "\n", "é", "the"],
    "--n": [1, 2, 3, 0],
    "--logprobs": [0, 1, 5],
}


def make_originals(folder: Path) -> None:
    """The good model and the good prompt caches that the cases are mutations of."""
    write_talker(folder / "model", 5, head_dim=32, num_hidden_layers=2, max_position_embeddings=1024)
    engine = talker(folder / "model")
    engine.prefill("the dog saw that the cat sat there. " * 9).save(folder / "document.safetensors")
    engine.prefill("the cat", chat=False).save(folder / "raw.safetensors")
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat " * 60}]
    engine.prefill(talk).save(folder / "talk.safetensors")


# --- mutations


def strange(rng: random.Random, depth: int = 2) -> Any:
    """A JSON value that nobody expects."""
    choice = rng.randrange(8 if depth else 5)
    if choice < 2:
        return rng.choice(NUMBERS)
    if choice < 4:
        return rng.choice(WORDS)
    if choice == 4:
        return rng.choice([None, True, False, [], {}])
    if choice == 5:
        return [strange(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(WORDS): strange(rng, depth - 1) for _ in range(rng.randrange(4))}


def mutated_json(rng: random.Random, value: Any, share: float = 0.1) -> Any:
    """The same tree, in which some places hold something else, are gone, or have another name."""
    if isinstance(value, dict | list) and rng.random() < share / 4:
        return strange(rng)
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if rng.random() > share / 4}
        found = {
            key if rng.random() > share / 10 else rng.choice(WORDS): mutated_json(rng, item, share)
            for key, item in kept.items()
        }
        return found | ({rng.choice([*value, *WORDS]): strange(rng)} if rng.random() < share else {})
    if isinstance(value, list):
        return [mutated_json(rng, item, share) for item in value if rng.random() > share / 4]
    if rng.random() > share:
        return value
    if isinstance(value, int | float) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 2, value / 2])
    return strange(rng)


def mutated_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Flipped, cut, repeated or overwritten, mostly near the beginning, where headers are."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5, 50])):
        if not data:
            break
        at = min(int(rng.expovariate(1 / 300)) if rng.random() < 0.7 else rng.randrange(len(data)), len(data) - 1)
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + rng.choice([1, 8, 1000])]
            case 3:
                data[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
            case 4:
                data[at : at + 8] = rng.choice(
                    [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, (2**40).to_bytes(8, "little")]
                )
            case 5:
                data = data[:at]
    return bytes(data)


def dump(rng: random.Random, value: Any, decoy: Path) -> bytes:
    """JSON, with half surrogate pairs as they are or escaped."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).replace("DECOY", str(decoy))
    return text.encode("utf-8", rng.choice(["surrogatepass", "replace"]))


# --- cases


class Case:
    """argv and stdin of one run of the command line; `home` is its own folder, `writes` what it may leave there."""

    KINDS = ("folder", "cache", "prompt")

    def __init__(self, seed: int, number: int, home: Path, originals: Path, decoy: Path):
        self.rng, self.home, self.originals, self.decoy = random.Random(f"{seed}:{number}"), home, originals, decoy
        self.model, self.stdin, self.writes, self.argv = home / "model", b"", set[str](), list[str]()
        self.kind = self.KINDS[number % 3]
        shutil.copytree(originals / "model", self.model)
        {"folder": self._folder, "cache": self._cache, "prompt": self._prompt}[self.kind]()

    def _options(self, wild: bool) -> list[str]:
        rng = self.rng
        found: dict[str, Any] = {"--device": "cpu", "--max-tokens": rng.choice([1, 2, 3])}
        for name in rng.sample(list(OPTIONS), rng.choice([0, 1, 1, 2, 4]) if wild else 0):
            found[name] = rng.choice(OPTIONS[name])
        modes = rng.choice([[], ["--json"], ["--raw"], ["--raw", "--json"]])
        return [str(word) for option in found.items() for word in option] + modes

    def _mutate_file(self, path: Path) -> None:
        rng, draw = self.rng, self.rng.random()
        raw = path.read_bytes()
        if draw < 0.05:
            path.unlink()
        elif draw < 0.08:
            path.unlink()
            path.mkdir()
        elif path.suffix == ".json" and draw < 0.8:
            path.write_bytes(dump(rng, mutated_json(rng, json.loads(raw), rng.choice([0.02, 0.1, 0.4])), self.decoy))
        elif path.suffix == ".json" and draw < 0.84:
            texts = ["", "[]", "null", "{", "[" * 100_000, '{"a":' * 50_000, "1" * 10_000, json.dumps(strange(rng))]
            path.write_text(rng.choice(texts))
        elif path.suffix == ".safetensors" and draw < 0.9:
            self._mutate_tensors(path)
        else:
            path.write_bytes(mutated_bytes(rng, raw))

    def _mutate_tensors(self, path: Path) -> None:
        """Whole tensors of the model: other numbers, shapes, types, names."""
        rng, tensors = self.rng, load_file(path)
        name = rng.choice(sorted(tensors))
        array = tensors.pop(name)
        match rng.randrange(5):
            case 0:
                tensors[rng.choice(["extra", "model.layers.9.x", name + "s"])] = array
            case 1:
                tensors[name] = array.reshape(-1)[: rng.randrange(array.size)]
            case 2:
                tensors[name] = array.astype(rng.choice([np.float16, np.float64, np.int8]))
            case 3:
                tensors[name] = array * np.float32(rng.choice([np.nan, np.inf, 1e30, 0]))
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)

    def _folder(self) -> None:
        rng, model = self.rng, self.model
        if rng.random() < 0.3:  # shards
            tensors = load_file(model / "model.safetensors")
            split = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
            for file in set(split.values()):
                save_file({n: t for n, t in tensors.items() if split[n] == file}, model / file)
            (model / "model.safetensors").unlink()
            (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": split}))
        if rng.random() < 0.2:
            (model / "chat_template.jinja").write_text(rng.choice(TEMPLATES).replace("DECOY", str(self.decoy)))
        if rng.random() < 0.3:
            (model / "generation_config.json").write_bytes(
                dump(rng, {"eos_token_id": rng.choice([2, [2, 3], strange(rng)])}, self.decoy)
            )
        names = sorted(path.name for path in model.iterdir())
        for name in rng.sample(names, min(rng.choice([1, 1, 1, 2, 9]), len(names))):
            self._mutate_file(model / name)
        match rng.randrange(8):
            case 0:
                more = rng.choice([[], ["--json"], ["--ctx", "64"], ["--batch", str(10**12)]])
                self.argv = ["info", str(model), "--device", "cpu", *more]
            case 1:
                (self.home / "doc.txt").write_text("the cat sat " * 30)
                out = self.home / "out.kv.safetensors"
                self.argv = [
                    "cache", str(model), "--prompt-file", str(self.home / "doc.txt"), "--out", str(out), "--device",
                    "cpu"
                ]
                self.writes = {out.name}
            case 2:
                self.argv, self.stdin = ["chat", str(model), "--device", "cpu", "--max-tokens", "2"], b"the cat\nand?\n"
            case _:
                self.argv = [
                    "generate", str(model), rng.choice(["the cat", "the cat sat " * 30]),
                    *self._options(rng.random() < 0.3)
                ]

    def _cache(self) -> None:
        rng, file = self.rng, self.home / "c.kv.safetensors"
        shutil.copy(self.originals / rng.choice(["document.safetensors", "raw.safetensors", "talk.safetensors"]), file)
        if rng.random() < 0.4:
            file.write_bytes(mutated_bytes(rng, file.read_bytes()))
        else:
            self._rewrite(file)
        if rng.random() < 0.1:
            self._mutate_file(rng.choice(sorted(self.model.iterdir())))
        cached = ["--cache", str(file), "--device", "cpu", "--max-tokens", "3"]
        if rng.random() < 0.3:
            self.argv, self.stdin = ["chat", str(self.model), *cached], b"the cat\nand?\n"
        else:
            self.argv = [
                "generate", str(self.model), rng.choice(["the cat", "", "x" * 3000]), *cached,
                *rng.choice([[], ["--json"]])
            ]

    def _rewrite(self, file: Path) -> None:
        """Other content with a digest that is right: what somebody makes who knows the format."""
        rng = self.rng
        with safe_open(file, "np") as handle:
            metadata = dict(handle.metadata())
        tensors = load_file(file)
        for _ in range(rng.choice([1, 1, 2, 3])):
            name = rng.choice(sorted(tensors))
            array = tensors[name]
            match rng.randrange(9):
                case 0:
                    del tensors[name]
                case 1:
                    tensors[rng.choice(["", "a", "layers.9.norms", "logits"])] = array
                case 2:
                    codes = np.frombuffer(rng.randbytes(array.nbytes), np.uint8)
                    other = codes.reshape(array.shape) if array.dtype == np.uint8 else array * 3 + 1
                    tensors[name] = other.astype(array.dtype)
                case 3:
                    tensors[name] = array[..., : rng.randrange(array.shape[-1] + 1)]
                case 4:
                    tensors[name] = array.astype(
                        rng.choice([np.int8, np.float64, np.uint8, np.int64, np.bool_, np.float16])
                    )
                case 5:
                    key = rng.choice(["config", "scheme"])
                    with contextlib.suppress(ValueError, KeyError):
                        metadata[key] = json.dumps(mutated_json(rng, json.loads(metadata[key])))
                case 6:
                    metadata[rng.choice(["format", "version", "config", "scheme", "weights"])] = rng.choice(
                        ["", "a", "1", "[]", "{}"]
                    )
                case 7:
                    metadata.pop(rng.choice(sorted(metadata)), None)
                case 8:
                    messages = [{"role": "user", "content": "the cat"}]
                    prompt = rng.choice([{"messages": None, "text": "the cat"}, {"messages": messages, "text": None}])
                    tensors["prompt"] = np.frombuffer(dump(rng, mutated_json(rng, prompt, 0.4), self.decoy), np.uint8)
        if rng.random() < 0.8 and "contents" in metadata:
            metadata["contents"] = digest(tensors)
        save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file, metadata or None)

    def _prompt(self) -> None:
        rng, file = self.rng, self.home / "p.txt"
        pieces = [rng.choice([*SNIPPETS, chr(rng.randrange(0x3000))]) for _ in range(rng.choice([0, 1, 5, 50]))]
        text, self.argv = "".join(pieces), ["generate", str(self.model), *self._options(True)]
        match rng.randrange(6):
            case 0:
                self.argv.append(text.replace("\0", ""))  # no command line holds one
            case 1:
                file.write_bytes(mutated_bytes(rng, text.encode("utf-8", "surrogatepass")))
                self.argv += ["--prompt-file", str(file)]
            case 2:
                self.argv.append("-")
                self.stdin = mutated_bytes(rng, text.encode("utf-8", "replace"))
            case 3 | 4:
                good = [
                    {"prompt": text, "id": strange(rng)}, {"messages": [{"role": "user", "content": "a"}]}, "the cat"
                ]
                values = [
                    rng.choice([*good, strange(rng), mutated_json(rng, rng.choice(good), 0.5)])
                    for _ in range(rng.randrange(8))
                ]
                raw = b"\n".join(dump(rng, value, self.decoy) for value in values)
                file.write_bytes(raw if rng.random() < 0.7 else mutated_bytes(rng, raw))
                self.argv += ["--prompts-file", str(file), "--batch", str(rng.choice([1, 3, 8]))]
            case 5:
                more = rng.choice([[], ["--system", text.replace("\0", "")], ["--ctx", "128"]])
                self.argv = ["chat", str(self.model), "--device", "cpu", "--max-tokens", "3", *more]
                self.stdin = mutated_bytes(rng, f'{text}\nthe cat\n"""{text}\nb"""\nand\\\n'.encode("utf-8", "replace"))
