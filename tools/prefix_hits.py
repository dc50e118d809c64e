"""What an answer loses whose prompt was cached in blocks: `python -m tools.prefix_hits MODEL > docs/results/....json`.

Behind blocks of the pool the window is not there. The server feeds its tokens again, over the packed past; the other
way would be to keep the window of every chain of blocks, 9 to 19 MB each for an 8B, whose answers would be those of
the conversation that goes on: here those of a prompt that is read whole. Both are decoded teacher-forced and held
against the unquantized run, each window with a prompt of another length.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

import numpy as np

from minioscar.arguments import scheme_named
from minioscar.cache import Cache
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.evaluation.fidelity import BASELINE, compare, default_text, engines_for, standard_error
from minioscar.evaluation.teacher_forcing import followed, log_softmax
from minioscar.layer_cache import BLOCK_TOKENS
from minioscar.ops import backend
from minioscar.storage import hub
from minioscar.tokenizer import Tokenizer
from minioscar.weights import load

LONGER = 37  # tokens by which each prompt is longer than the one before: their windows are of all lengths


def decoded(engine: Engine, ids: Sequence[int], prompt: int, is_hit: bool) -> Iterator[np.ndarray]:
    """As `teacher_forced`; is_hit: what is not in whole packed blocks of the prompt is fed again."""
    cache = Cache(engine.config, engine.scheme, 1, len(ids) - 1, engine.ops)
    engine.model.forward(np.array(ids[:prompt]), cache, cache.batch_for([0], [prompt]))
    if is_hit:
        known = engine.scheme.packed_tokens(prompt - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        cache.lengths[0] = cache.cuts[0] = known  # as `PooledCache.begin_with`
        engine.model.forward(np.array(ids[known:prompt]), cache, cache.batch_for([0], [prompt - known]))
    yield from followed(engine, ids, cache)


def measured(engines: Sequence[Engine], ids: Sequence[int], prompt: int, decode: int, windows: int) -> list[dict]:
    """engines[0] is the baseline."""
    scores: list[list[tuple[float, float]]] = [[] for _ in engines[1:]]
    for window in range(windows):
        length = prompt + window * LONGER
        part = ids[window * (len(ids) // windows) :][: length + decode + 1]
        truth = np.concatenate([*map(log_softmax, decoded(engines[0], part, length, False))])
        for engine, found in zip(engines[1:], scores, strict=True):
            ways = (map(log_softmax, decoded(engine, part, length, is_hit)) for is_hit in (False, True))
            found.append(tuple(compare(way, truth, np.array(part[length + 1 :]))[1] for way in ways))
    rows = []
    for engine, found in zip(engines[1:], scores, strict=True):
        kept, again = np.array(found).T
        row = {"kv": engine.scheme.name}
        for name, of_windows in (("kept", kept), ("again", again), ("more", again - kept)):
            row |= {name: float(of_windows.mean()), f"{name}_se": standard_error(of_windows)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kv", default="int2,int2-compact,k4v2")
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    ops, folder = backend(args.device), hub.resolve(args.model)
    config, words = Config.from_folder(folder), Tokenizer(folder)
    schemes = [scheme_named(name) for name in (BASELINE, *args.kv.split(","))]
    engines = engines_for(schemes, load(folder, config, ops), [config], words, ops)
    rows = measured(engines, words.encode(default_text()), args.prompt, args.decode, args.windows)
    how = {"model": args.model, "device": ops.name, "prompt": args.prompt, "decode": args.decode}
    print(json.dumps(how | {"windows": args.windows, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
