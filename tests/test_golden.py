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
NAMES = "greedy", "drawn"


def tokens(loaded: engine.Engine, name: str) -> list[list[int]]:
    """Of two prompts of unequal lengths, over the end of a block of 128."""
    ids = loaded.encode(default_text()[:1500], chat=False)
    sampling = DRAWN if name == "drawn" else Sampling()
    return [result.token_ids for result in loaded.generate([ids[:245], ids[100:120]], max_tokens=12, sampling=sampling)]


def tokens_of(kv: str) -> dict[str, list[list[int]]]:
    loaded = engine.load("smollm2-135m", kv, "cpu")
    return {f"{kv} {name}": tokens(loaded, name) for name in NAMES}


@pytest.mark.parametrize("kv", KVS)
def test_tokens_are_what_they_were(kv, windows):
    expected = json.loads(FILE.read_text())
    for name, found in tokens_of(kv).items():
        assert found == expected[name], name


def main() -> None:
    SCHEMES.update(WINDOWS)
    FILE.write_text(json.dumps({name: found for kv in KVS for name, found in tokens_of(kv).items()}) + "\n")


if __name__ == "__main__":
    main()
