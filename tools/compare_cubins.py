"""Shows that a change of the kernels' sources left the machine code as it was: `python tools/compare_cubins.py
REVISION`.

Every launch that tests/test_compile.py lists is compiled with NVRTC, once from the files of a git revision and once
from the working tree, and the code of the two cubins is compared: instructions, constants, registers, static shared
memory. Names and line numbers are not, so a kernel may be renamed. Exits 1 where a launch differs or only one side
has it; needs no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOBITS = 8  # section type of ELF: no bytes in the file


def sections(cubin: bytes) -> Iterator[tuple[str, int, int, bytes]]:
    """Name, size, sh_info and content of each section of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQII", cubin, table + i * entry) for i in range(count)]
    strings = headers[names][4]
    for name, kind, _, _, offset, size, _, info in headers:
        end = cubin.index(b"\0", strings + name)
        yield cubin[strings + name : end].decode(), size, info, b"" if kind == NOBITS else cubin[offset : offset + size]


def code(cubin: bytes) -> list[str]:
    """A digest of each kernel's code, sorted: names do not count. The upper byte of a .text section's sh_info counts
    registers."""
    kernels: dict[str, list] = {}
    for name, size, info, content in sections(cubin):
        if found := re.match(r"\.(text|nv\.constant\d+|nv\.shared)\.(.+)", name):
            kernels.setdefault(found[2], []).append((found[1], size, info >> 24 if found[1] == "text" else 0, content))
    return sorted(hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()[:16] for parts in kernels.values())


def compile_tree(arch: int, only: str, cache: Path) -> dict[str, list[str]]:
    """Label -> `code` of each launch of the tree in the working directory; sources that were compiled before come
    from `cache`."""
    from minioscar.compilation.cubins import architecture, source
    from tests import test_compile

    found = {}
    for label, launch in test_compile.launches(arch).items():
        if not re.search(only, label):
            continue
        text = source(launch.source)
        parts = text, launch.defines, architecture(launch.source, arch)
        path = cache / (hashlib.sha256(repr(parts).encode()).hexdigest()[:32] + ".json")
        if not path.exists():
            path.write_text(json.dumps(code(test_compile.compiled(launch.source, launch.defines, arch)[1])))
        found[label] = json.loads(path.read_text())
    return found


def compiled(tree: Path, arch: int, only: str, cache: Path) -> dict[str, list[str]]:
    """`compile_tree` in a process that imports from `tree`. Raises CalledProcessError where something does not
    compile."""
    command = [sys.executable, __file__, "--tree", "--arch", str(arch), "--only", only, "--cache", str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return json.loads(subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "revision", nargs="?", default="HEAD", help="what the working tree is compared with (default HEAD)"
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities (default 80 90; 90 includes sm_90a)"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="launches whose label matches")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was compiled")
    parser.add_argument("--tree", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tree:
        print(json.dumps(compile_tree(options.arch[0], options.only, options.cache)))
        return 0
    differing, equal = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        base, cache = Path(folder) / "base", (options.cache or Path(folder) / "cache").resolve()
        cache.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["git", "archive", options.revision], cwd=ROOT, check=True, stdout=subprocess.PIPE
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(base, filter="data")
        for arch in options.arch:
            before, after = (compiled(tree, arch, options.only, cache) for tree in (base, ROOT))
            for label in sorted(before.keys() | after.keys()):
                if before.get(label) == after.get(label):
                    equal += 1
                    continue
                differing += 1
                sides = (
                    f"only in {options.revision}"
                    if label not in after
                    else "new"
                    if label not in before
                    else "code differs"
                )
                print(f"{arch}: {label}: {sides}")
    print(f"{equal} launches have the machine code of {options.revision}, {differing} do not")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
