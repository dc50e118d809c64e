"""The kernels' tests, for compute-sanitizer on a machine with a GPU:

    compute-sanitizer --tool memcheck python -m tests.sanitized [-k EXPRESSION]       and again with --tool racecheck

Every array gets an allocation of its own: in CuPy's pool an access out of bounds would land in somebody else's block.
"""

from __future__ import annotations

import sys

import pytest

FILES = ("decode_attention", "decode_step", "elementwise", "experts", "linear", "linear_quantized", "pack_and_rotate")
FILES += ("prefill_attention", "sample", "tower_kernels")


def main(argv: list[str]) -> int:
    import cupy

    cupy.cuda.set_allocator(None)
    # those of the card's own grids too; racecheck takes more than five minutes for 256 sequences
    chosen = argv or ["-k", "cuda"]
    return pytest.main(["-q", "-p", "no:cacheprovider", *chosen, *(f"tests/test_{name}.py" for name in FILES)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
