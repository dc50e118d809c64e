"""The same prompts, seeds and schemes give the tokens that they gave before the house was put in order:
fixtures/golden/tokens.json.

`python -m tests.test_golden` writes the file anew: only where a change of tokens is meant, and then it says so in its
commit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minioscar import Sampling, engine
from minioscar.evaluation.fidelity import default_text
from minioscar.oscar import SCHEMES

from .tiny import WINDOWS

FILE = Path(__file__).parent / "fixtures" / "golden" / "tokens.json"
DRAWN = Sampling(0.9, top_k=40, top_p=0.95, min_p=0.02, seed=7)
KVS = "bf16", "oscar", "plain", "shaped", "int2", "kivi", "ott"
CASES = [(kv, name) for kv in KVS for name in ("greedy", "drawn")]


def tokens(loaded: engine.Engine, name: str) -> list[list[int]]:
    """Of two prompts of unequal lengths, over the end of a block of 128."""
    ids = loaded.encode(default_text()[:1500], chat=False)
    sampling = DRAWN if name == "drawn" else Sampling()
    return [result.token_ids for result in loaded.generate([ids[:245], ids[100:120]], max_tokens=12, sampling=sampling)]


@pytest.mark.parametrize(("kv", "name"), CASES)
def test_tokens_are_what_they_were(kv, name, windows):
    assert tokens(engine.load("smollm2-135m", kv, "cpu"), name) == json.loads(FILE.read_text())[f"{kv} {name}"]


def main() -> None:
    SCHEMES.update(WINDOWS)
    found = {f"{kv} {name}": tokens(engine.load("smollm2-135m", kv, "cpu"), name) for kv, name in CASES}
    FILE.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
