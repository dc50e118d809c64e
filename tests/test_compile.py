"""Every kernel compiles for every supported card without a GPU, in its budget of registers and without spills.

NVRTC is what compiles them on a card too. The budget lets a block run as decode_plan counts on: 65,536
registers a multiprocessor over its threads. What a program takes is recorded in fixtures/programs.json by a digest of
its text, its options and the compiler's version, so that only changed ones are compiled again.
`python -m tests.test_compile` renews that, and what each kernel takes in docs/results/resources.json.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minioscar.compilation.cubins import KERNELS, options
from minioscar.compilation.cubins import source as text_of
from minioscar.config import Experts
from minioscar.experts import plans as experts
from minioscar.machine import SHARED_KIB, Card
from minioscar.ops import attention, linear, linear_batch, prefill, sample
from minioscar.ops.launch import Launch
from minioscar.oscar import SCHEMES
from minioscar.parallel.collectives import Links
from minioscar.parallel.ranks import Namespace, Ranks
from minioscar.plans import batch_plan, decode_plan
from minioscar.quantized import Q4, Q8
from minioscar.quantized import plans as quantized
from minioscar.sampling import RowSampling, Sampling
from minioscar.sm90 import linear_batch as wgmma
from minioscar.sm90 import prefill_attention as sm90
from minioscar.sm90 import quantized_vector
from minioscar.towers import on_card as towers
from minioscar.towers.layers import ACTIVATIONS, Places, Shape

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC is not installed: pip install 'minioscar[nvrtc]'")

ARCHES = (80, 86, 89, 90, 100, 120)
MULTIPROCESSORS = 132
RECORD = Path(__file__).resolve().parent.parent / "docs" / "results" / "resources.json"
PROGRAMS = Path(__file__).parent / "fixtures" / "programs.json"
SHAPES = [("int2", 128, 4), ("bf16", 128, 4)]  # scheme, head_dim, q heads a kv head: on every card
MORE = [("oscar", 128, 4), ("int2-compact", 128, 8), ("int4", 128, 4), ("kivi", 128, 1), ("int2", 64, 3)]
MORE += [("int2", 256, 7), ("bf16", 256, 8), ("k4v2", 64, 3)]
MORE += [(kv, 128, 4) for kv in ("k3v2", "k3v3", "k4v2", "k4v4")]
PACKED = [("int2-compact", 128), ("int4", 64), ("oscar", 256), ("k4v2", 128), ("k3v3", 128)]
PACKED += [("int2", 64), ("int2", 256)]


def launches(arch: int) -> dict[str, Launch]:
    """Label -> what is launched for a shape on a card of this compute capability."""
    card = Card(MULTIPROCESSORS, arch)
    others = linear_launches(card, arch == 90) | quantized_launches(card, arch == 90)
    others |= expert_launches(card) | quantized_expert_launches(card, arch == 90)
    others |= tower_launches(arch == 90)
    return attention_launches(card, arch == 90) | others | parallel_launches(arch == 90)


def attention_launches(card: Card, everything: bool) -> dict[str, Launch]:
    found, ints, out = {}, np.empty(1, np.int32), np.empty(1, np.uint16)
    cache = {
        name: np.empty((1, 1, 1, 1), np.uint8)
        for name in ("keys", "values", "pages", "norms", "window_keys", "window_values")
    }
    cache["table"] = np.empty((1, 1), np.int32)
    for kv, dim, q_per_kv in SHAPES + MORE * everything:
        heads, scheme = attention.Heads(2 * q_per_kv, 2, dim), SCHEMES[kv]
        plan = decode_plan(heads, scheme, 1, card)
        state = attention.DecodeState(heads, scheme, plan, ints, ints, out, ints, cache["table"])
        launch = attention.decode_attention(state, out, cache, out, parity=0)
        found[f"{launch.name} {kv} d{dim} {q_per_kv}:1"] = launch
        if kv == "int2" and dim == 128:
            found[f"schedule {kv} d{dim} {q_per_kv}:1"] = attention.schedule(state)
    new = attention.PrefillTokens(out, out, 0, 0, ints, ints, ints, ints, 1)
    for kv, dim in [("int2", 128), ("oscar", 128)] + PACKED * everything:
        heads, feedback = attention.Heads(2, 2, dim), out if SCHEMES[kv].shaped else None
        for launch in (
            attention.pack_bulk(heads, SCHEMES[kv], new, cache, feedback),
            attention.pack_step(heads, SCHEMES[kv], ints, cache, feedback=feedback),
        ):
            found[f"{launch.name} {kv} d{dim}"] = launch
    for dim, q_per_kv in [(128, 4)] + [(64, 3), (96, 1), (256, 8)] * everything:
        heads = attention.Heads(2 * q_per_kv, 2, dim)
        past = sm90.Tiles(out, out, ints) if sm90.tiled(dim, card) else None
        found[f"prefill_attention d{dim} {q_per_kv}:1"] = prefill.prefill_attention(heads, out, new, past, out, card)
        if past:
            found[f"prefill_tiles d{dim}"] = sm90.fill_tiles(heads, new, None, 1, past)
    for dim in (72, *((64, 128) if everything else ())):
        x = np.empty((1, 2, dim), np.uint16)
        shape = Shape(2 * dim, 8, 2, 0.0, "gelu", "", (), "", "", "", "")
        *tiles, launch = towers.full_attention(x, x, x, x, towers.Segments.allocate(np, shape, 1, 1, card), card)
        found |= {f"full_attention d{dim}": launch} | {f"full_attention_tiles d{dim}": launch for launch in tiles}
    for kv, dim in [("int2", 128)] + PACKED[1:] * everything:
        past = np.empty((1, 2, 1, dim), np.uint16)
        to = sm90.Tiles(past, past, ints) if sm90.tiled(dim, card) else (past, past)
        found[f"unpack {kv} d{dim}"] = prefill.unpack(attention.Heads(2, 2, dim), SCHEMES[kv], ints, ints, 1, cache, to)
    for dim in (128, *((64, 256) if everything else ())):
        rotation = attention.Rotation(attention.Heads(8, 2, dim), out, out, True)
        found[f"rotate_scale d{dim}"] = attention.rotate_scale(rotation, out, ints, out, attention.KeyOutputs())
        kept = replace(rotation, keys=(4, np.int32(2)))  # of one of two cards
        found[f"rotate_scale kept d{dim}"] = attention.rotate_scale(kept, out, ints, out, attention.KeyOutputs())
        shifted = replace(rotation, shifts=ints)
        launch = attention.rotate_scale(shifted, out, ints, out, attention.KeyOutputs())
        found[f"rotate_scale shifted d{dim}"] = launch
        for axis in (0, 1):
            launch = attention.rotate_heads(np.empty((dim, dim), np.uint16), dim, axis)
            found[f"{launch.name} d{dim}"] = launch
    return found


def tower_launches(everything: bool) -> dict[str, Launch]:
    """Of Qwen3-VL's tower."""
    found, out = {}, np.empty(1, np.uint16)
    for hidden in (1152, 4608, *((1024, 1280, 2048) if everything else ())):
        x = np.empty((1, hidden), np.uint16)
        found[f"layer_norm of {hidden}"] = towers.layer_norm(x, (out, out), x, 0.0, (x, out))
    for d, heads in ((72, 16), *(((64, 16), (64, 20)) if everything else ())):
        x = np.empty((1, heads, d), np.uint16)
        found[f"heads d{d} {heads}"] = towers.heads((x, x, x), (out, out, out), None)
    for name in ACTIVATIONS:
        found[name] = towers.activate(name, np.empty((1, 8), np.uint16), out)
    places = Places(np.zeros((1, 2), np.int32), out, out, out)
    found["places"] = towers.placed(x[0], out, places, 48)
    vision = SimpleNamespace(patch=16, frames=2, merge=2, mean=(0.5,) * 3, deviation=(0.5,) * 3)
    found["patches"] = towers.patches(np.empty((1, 32, 32, 3), np.uint8), out, vision, 1)
    return found


def linear_launches(card: Card, everything: bool) -> dict[str, Launch]:
    found, ints, out = {}, np.empty(1, np.int32), np.empty(1, np.uint16)
    scratch = linear_batch.Scratch(out, ints)
    for to, silu, dtype in (
        ("bf16", False, np.uint16),
        ("silu, bf16", True, np.uint16),
        ("float32", False, np.float32),
    ):
        norm = None if to == "bf16" else (out, 0.0)
        x, weight, y = np.empty((1, 4096)), np.empty((8192, 4096)), np.empty((1, 1), dtype)
        found[f"linear to {to}"] = linear.linear(x, weight, y, card, norm=norm, silu=silu)
    for tokens in (32, 48, 128, *((192, 256) if everything else ())):
        x, weight, y = np.empty((tokens, 4096)), np.empty((24576, 4096), np.uint8), np.empty((1, 1), np.uint16)
        plan = batch_plan(tokens, 4096, 24576, True, card)
        found[f"linear_batch of {tokens}"] = linear_batch.linear_batch(x, weight, y, plan, scratch, silu=True)
    for warpgroups, tile in wgmma.MAX_TILE_ROWS.items() if everything else ():  # the largest sums
        x, weight, y = (
            np.empty((64 * warpgroups, 4096)),
            np.empty((2 * tile, 4096), np.uint8),
            np.empty((1, 1), np.uint16),
        )
        plans = wgmma.wgmma_configs(64 * warpgroups, 4096, 2 * tile, False, card)
        plan, label = next(p for p in plans if p.rows == tile), f"linear_batch of {64 * warpgroups}, tiles of {tile}"
        found[label] = linear_batch.linear_batch(x, weight, y, plan, scratch)
    found["embed"], found["advance"] = linear.embed(out[None], ints, out), sample.advance(ints, ints)
    for launch in (linear.silu_mul(out[None], np.empty((1, 8))), linear.add(out[None], np.empty((1, 8)))):
        found[launch.name] = launch
    found["rms_norm"] = linear.rms_norm(x, out, 0, out)
    for batch in (1, *((64,) if everything else ())):
        rows = [RowSampling(Sampling(1, top_p=0.5, repetition_penalty=2))] * batch
        for launch in sample.sample(np.empty((batch, 2)), sample.Drawing(np, rows, 2), ints, ints):
            found[f"{launch.name} of {batch}"] = launch
    return found


def expert_launches(card: Card) -> dict[str, Launch]:
    """Of Qwen3-30B-A3B: few tokens, tiles of 8 and of 16 pairs, and where there are warpgroups of 128."""
    found, e = {}, Experts(128, 8, True)

    def blank(dtype: type, *shape: int) -> np.ndarray:
        return np.broadcast_to(dtype(0), shape)

    gate_up, down = blank(np.uint16, 128, 1536, 2048), blank(np.uint16, 128, 2048, 768)
    for tokens in (4, 48, 128, 256):  # 256: on compute capability 9.0 by warpgroups
        x, h, logits = blank(np.uint16, tokens, 2048), blank(np.uint16, tokens * 8, 768), blank(np.float32, tokens, 128)
        choices = logits
        if tokens > experts.FEW:
            choices = experts.Routes.allocate(np, tokens, e, card)
            found |= {launch.name: launch for launch in choices.launches(logits, e)}
        out = blank(np.float32, tokens * 8, 2048) if tokens > experts.FEW else x
        up = experts.Product(x, gate_up, h, True, norm=(x, 0.0))
        for what, product in (("up", up), ("down", experts.Product(h, down, out, False, residual=x))):
            found[f"experts {what} of {tokens}"] = product.launch(choices, e, card)
    found["gather"], found["combine"] = experts.gather(x, choices, e, h, h), experts.combine(out, x, e)
    found["combine alone"] = experts.combine(out, x, e, alone=True)  # of one of several cards
    x, h, logits = blank(np.uint16, 4, 2048), blank(np.uint16, 32, 768), blank(np.float32, 4, 128)
    found["experts down alone of 4"] = experts.Product(h, down, x, False).launch(logits, e, card)
    return found


def parallel_launches(everything: bool) -> dict[str, Launch]:
    found, on = {}, lambda rank: nullcontext()
    for cards in (2, *((4, 8) if everything else ())):
        links = Links(Namespace([np] * cards, on), cards, on, 1024)
        part = Ranks([np.empty((1, 1024), np.uint16)] * cards)
        found[f"all_reduce of {cards}"] = links.all_reduce(part, part, part)
        for share in (1024, 1023):
            part, whole = (Ranks([np.empty((1, n), np.float32)] * cards) for n in (share, share * cards))
            firsts = [share * rank for rank in range(cards)]
            launch = links.gather(part, whole, firsts)
            found[f"gather of {cards} by {launch.defines[0][-1]}"] = launch
    return found


def quantized_expert_launches(card: Card, everything: bool) -> dict[str, Launch]:
    """Of the same model: few tokens, tiles of 8 and of 16 pairs."""
    found, e, out = {}, Experts(128, 8, True), np.empty(1, np.uint16)

    def blank(dtype: type, *shape: int) -> np.ndarray:
        return np.broadcast_to(dtype(0), shape)

    kinds = [("int4", 128), ("e4m3", 128)] + [("int4", 32), ("int8", 128), ("int8", 32)] * everything
    for (kind, group), tokens in itertools.product(kinds, (4, 48, 128)):
        form = Q4 if kind == "int4" else Q8
        gate_up, down = (form(kind, (128 * n, k), group, out, out, out) for n, k in ((1536, 2048), (2048, 768)))
        x, h, logits = blank(np.uint16, tokens, 2048), blank(np.uint16, tokens * 8, 768), blank(np.float32, tokens, 128)
        choices = logits if tokens <= experts.FEW else experts.Routes.allocate(np, tokens, e, card, True)
        y = blank(np.float32, tokens * 8, 2048) if tokens > experts.FEW else x
        up = experts.Product(x, gate_up, h, True, norm=(x, 0.0))
        for what, product in (("up", up), ("down", experts.Product(h, down, y, False, residual=x))):
            found[f"experts {kind} g{group} {what} of {tokens}"] = product.launch(choices, e, card)
    return found


def quantized_launches(card: Card, everything: bool) -> dict[str, Launch]:
    found, out = {}, np.empty(1, np.uint16)
    norm = out, 0.0
    kinds = [("int4", 128), ("e4m3", 128)] + [("int4", 64), ("int4", 32), ("int8", 128), ("int8", 32)] * everything
    for kind, group in kinds:
        for label, rows, given in (
            ("normed", 6144, {"norm": norm}), ("silu", 24576, {"norm": norm, "silu": True}), ("plain", 4096, {}),
            ("float32", 151936, {"norm": norm}),
        ):
            size = 12288 if label == "plain" else 4096
            weight = (Q4 if kind == "int4" else Q8)(kind, (rows, size), group, out, out, out)
            y = np.empty((1, 1), np.float32 if label == "float32" else np.uint16)
            launch = quantized.linear(np.empty((1, size)), weight, y, card, **given)
            found[f"quantized linear {kind} g{group} {label}"] = launch
            if quantized_vector.fits(1, weight, label == "silu", card):
                launch = quantized_vector.linear(np.empty((1, size)), weight, y, card, **given)
                found[f"quantized linear {kind} g{group} {label}, copied"] = launch
            for tokens in (48, 128) if label in ("plain", "silu") else ():
                plan = quantized.batch_plan(tokens, weight, label == "silu", card)
                x = np.empty((tokens, size))
                numbers = np.empty(max(plan.x_numbers, x.size), np.uint16)
                scratch = linear_batch.Scratch(out, out, numbers, out)
                before, x = quantized.before_batch(x, weight, plan, (out, 0.0) if label == "silu" else None, scratch)
                launch = quantized.linear_batch(x, weight, y, plan, scratch, silu=label == "silu")
                found[f"quantized linear_batch {kind} g{group} {label} of {tokens}"] = launch
                found |= {f"{one.name} g{group}{' normed' * (label == 'silu')}": one for one in before}
        found[f"dequantize {kind}"] = quantized.dequantize(weight, out)
        found[f"repack {kind}"] = quantized.repack(kind, np.empty((16, 64), np.uint8), out)
    return found


def test_every_kernel_waits_for_the_launch_before_it():
    """Its start overlaps that launch's end. The simulator runs one after the other and would not see a missing wait.

    Three let the next launch start before their own wait: what norms or prepares x alone, before a product, which
    reads only weights before it waits, and rotate_scale, before decode attention, which reads what is older than the
    projection, or a launch of a prefill, which reads nothing.
    """
    found = [body for file in KERNELS.rglob("*.cu") for body in file.read_text().split("__global__")[1:]]
    attend = (KERNELS / "attention.cuh").read_text().split("DEVICE void attend(")[1]
    found = [attend if "attend(" in body else body for body in found]
    found = [body.replace("wait_then_allow_next()", "wait_for_previous(), allow_next()") for body in found]
    early = [body for body in found if body.index("wait_for_previous()") > body.index("allow_next()")]
    names = sorted(re.search(r"\)\s+(\w+)\(", body)[1] for body in early)
    assert len(found) > 10 and names == ["prepare_x", "rms_norm", "rotate_scale"]
    for file in ("pack.cu", "unpack.cu", "prefill_attention.cu", "sm90/prefill_attention.cu", "sm90/prefill_tiles.cu"):
        for body in (KERNELS / file).read_text().split("__global__")[1:]:
            assert re.search(r"\) \{\n  wait_then_allow_next\(\);", body), file


def headers() -> Path:
    """Of CUDA, which the wheel nvidia-cuda-runtime brings (cuda_fp16.h, cuda_bf16.h)."""
    import nvidia

    return next(
        found for root in nvidia.__path__ for found in Path(root).glob("*/include") if (found / "cuda_fp16.h").exists()
    )


@cache
def digest(source: str, defines: tuple[str, ...], arch: int) -> str:
    """Of all that the machine code depends on: the text without comments, the options, the compiler and its
    headers."""
    lines = (line.split("//")[0].rstrip() for line in text_of(source).splitlines())
    versions = [version(wheel) for wheel in ("nvidia-cuda-nvrtc", "nvidia-cuda-runtime")]
    parts = list(filter(None, lines)), options((source, defines), arch), versions
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


@cache  # the kernels of a file come together
def compiled(source: str, defines: tuple[str, ...], arch: int) -> tuple[str, bytes]:
    """The log with ptxas's report, and the cubin. Raises AssertionError with the log where it does not compile."""
    given = [*options((source, defines), arch), "--ptxas-options=-v"]
    given += [] if source.startswith("sm90/") else [f"-I{headers()}"]  # as cubins.compiled finds them for the others
    program = checked(nvrtc.nvrtcCreateProgram(text_of(source).encode(), source.encode(), 0, [], []))
    (code,) = nvrtc.nvrtcCompileProgram(program, len(given), [o.encode() for o in given])
    log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode(errors="replace")
    assert code == nvrtc.nvrtcResult.NVRTC_SUCCESS, text[:3000]
    cubin = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    return text, bytes(cubin)


def checked(answer: tuple):
    code, *rest = answer
    assert code == nvrtc.nvrtcResult.NVRTC_SUCCESS, code
    return rest[0] if rest else None


def used(source: str, defines: tuple[str, ...], arch: int) -> dict[str, list[int]]:
    """Of each kernel of a program: registers a thread, bytes of static shared memory, bytes spilled."""
    log, cubin = compiled(source, defines, arch)
    assert cubin[:4] == b"\x7fELF", (source, defines)
    # "wgmma.mma_async instructions are serialized", "warpgroup.arrive is injected"
    assert not re.search("wgmma|warpgroup", log), log
    report = re.split(r"Compiling entry function '(\w+)'", log)
    return {
        name: [int(re.search(r"Used (\d+) registers", of)[1]), total("bytes smem", of), total("bytes spill", of)]
        for name, of in zip(report[1::2], report[2::2], strict=True)
    }


def total(what: str, log: str) -> int:
    return sum(map(int, re.findall(rf"(\d+) {what}", log)))


def resources(arch: int, known: dict[str, dict[str, list[int]]]) -> Iterator[dict]:
    """What each kernel of a card takes: registers a thread, static and dynamic shared memory in bytes, bytes
    spilled. known: what programs are known to take, by their `digest`; what is compiled is added."""
    for label, launch in launches(arch).items():
        key = digest(launch.source, launch.defines, arch)
        if key not in known:
            known[key] = used(launch.source, launch.defines, arch)
        registers, static, spilled = known[key][launch.name]
        yield {
            "kernel": label,
            "arch": arch,
            "threads": launch.block,
            "registers": registers,
            "static_shared": static,
            "dynamic_shared": launch.shared,
            "spilled": spilled,
        }


@pytest.mark.parametrize("arch", ARCHES)
def test_kernels_compile_within_their_registers_and_without_spills(arch: int):
    """Compiles those whose text, options or compiler are not the recorded ones."""
    recorded, known = {row["kernel"] for row in json.loads(RECORD.read_text()) if row["arch"] == arch}, programs()
    before = len(known)
    for row in resources(arch, known):
        assert row["spilled"] == 0, row
        assert row["registers"] * row["threads"] <= 65536, row
        assert row["static_shared"] + row["dynamic_shared"] <= SHARED_KIB[arch] * 1024, row
        recorded.remove(row["kernel"])
    assert not recorded, f"{RECORD.name} has kernels that are gone: {recorded}"
    print(f"{len(known) - before} programs are not in {PROGRAMS.name} (python -m tests.test_compile renews it)")


def test_programs_take_what_is_recorded_of_them(seed):
    """One of every card, another each time: what the test above relies on."""
    known, rng = programs(), random.Random(seed)
    for arch in ARCHES:
        every = {digest(of.source, of.defines, arch): (of.source, of.defines) for of in launches(arch).values()}
        for key in rng.sample(sorted(every.keys() & known.keys()), 1):
            assert used(*every[key], arch) == known[key], (arch, every[key])


def programs() -> dict[str, dict[str, list[int]]]:
    """`used` of programs that were compiled before, by their `digest`."""
    return json.loads(PROGRAMS.read_text()) if PROGRAMS.exists() else {}


def main() -> None:
    """Compiles what is not recorded yet and forgets what no launch needs any more."""
    known = programs()
    rows = [row for arch in ARCHES for row in resources(arch, known)]
    needed = {digest(of.source, of.defines, arch) for arch in ARCHES for of in launches(arch).values()}
    lines = (f"{json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(needed))
    PROGRAMS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    RECORD.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
