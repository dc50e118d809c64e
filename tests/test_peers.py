"""benchmarks/peers.py: peers compute attention; one that is absent, fails or is wrong says so in its place. Whole where
installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import peers
from minioscar.cache import BF16
from minioscar.config import Config
from minioscar.ops import cuda_missing
from minioscar.oscar import WINDOW

CARD = cuda_missing() is None
if not CARD:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, which no test has done yet
PEERS = ("torch", "triton", "flashinfer", "transformers", "hqq", "optimum")
QWEN = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2
}
QWEN |= {"head_dim": 64, "num_hidden_layers": 2, "vocab_size": 96, "max_position_embeddings": 1024}


def case(batch: int, context: int, q_heads: int = 4, head_dim: int = 64) -> SimpleNamespace:
    heads = SimpleNamespace(q_heads=q_heads, head_dim=head_dim)
    return SimpleNamespace(batch=batch, context=context, window=64, heads=heads)


def caches(
    rng: np.random.Generator, batch: int, context: int, kv_heads: int = 2, head_dim: int = 64
) -> list[dict[str, np.ndarray]]:
    shape = batch, kv_heads, context + WINDOW, head_dim
    return [
        {name: rng.standard_normal(shape, np.float32).astype(BF16) for name in ("keys", "values")} for _ in range(2)
    ]


def test_absent_peers_give_their_reason(monkeypatch):
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    found = [peers.peer_times(case(1, 128), [])]
    config = Config.from_dict(QWEN)
    found += peers.decode_peers(config, [(1, 128), (2, 128)]) + peers.prefill_peers(config, [64])
    names = [peers.ATTENTION, peers.CACHES, peers.CACHES, {"transformers"}]
    assert [set(times) for times in found] == [set(each) for each in names]
    assert all("torch" in why and "\n" not in why for times in found for why in times.values())


def test_the_package_imports_no_peer(pytestconfig):
    for path in (pytestconfig.rootpath / "minioscar").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & set(PEERS), path


def test_peers_get_our_tensors_and_one_that_fails_or_is_wrong_gives_its_reason(monkeypatch, seed):
    pytest.importorskip("torch", reason="torch is not installed")

    def wrong(q, tensors):
        yield lambda: [lambda: q.float() for _ in tensors]

    def fail():
        raise NotImplementedError("not for\nthis shape")

    def fails(q, tensors):
        yield fail

    def right(q, tensors):
        yield lambda: [lambda k=k, v=v: peers.attention(q, k, v).bfloat16() for k, v in tensors]
        yield from (*wrong(q, tensors), fail)

    monkeypatch.setattr(peers, "graph_time", lambda calls, replays=25, rest=True: float(len(calls)))
    monkeypatch.setattr(peers, "ATTENTION", {**peers.ATTENTION, "wrong": wrong, "fails": fails, "right": right})
    found = peers.peer_times(case(2, 128), caches(np.random.default_rng(seed), 2, 128))
    assert found["right"] == 2.0
    assert found["wrong"].startswith("ArithmeticError: the result is off by")
    assert found["fails"] == "NotImplementedError: not for this shape"
    assert set(found) == set(peers.ATTENTION) and all(isinstance(value, float | str) for value in found.values())
    assert found["sdpa_fa2"] == 2.0  # torch has this one for CPUs too


@pytest.mark.gpu
def test_peers_that_are_installed_are_timed_on_a_card(seed):
    pytest.importorskip("torch", reason="torch is not installed")
    import cupy

    made = caches(np.random.default_rng(seed), 2, 1024, head_dim=128)
    on_card = [{name: cupy.asarray(x.view(np.uint16)).view(BF16) for name, x in cache.items()} for cache in made]
    found = peers.peer_times(case(2, 1024, q_heads=8, head_dim=128), on_card)
    wanted = ["sdpa_fa2"] + [name for name in ("triton", "flashinfer") if find_spec(name)]
    assert all(isinstance(found[name], float) and found[name] > 0 for name in wanted), found


def test_the_pages_of_a_cache_are_its_tokens(seed):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(3, 2, 192 + 64, 16, generator=generator)[:, :, :192] for _ in range(2))
    q = torch.randn(3, 4, 16, generator=generator)

    class Wrapper:
        """What FlashInfer's paged decode does with its page table (docs.flashinfer.ai, KV-Cache layout)."""

        def __init__(self, workspace, layout, **options):
            assert layout == "HND"

        def plan(self, indptr, indices, last, q_heads, kv_heads, dim, page, **types):
            assert (q_heads, kv_heads, dim, last.tolist()) == (4, 2, 16, [page] * 3)
            self.rows = [indices[a:b] for a, b in zip(indptr[:-1], indptr[1:], strict=True)]

        def run(self, q, pages):
            whole = [torch.stack([x[row].transpose(0, 1).flatten(1, 2) for row in self.rows]) for x in pages]
            return peers.attention(q, *whole)

    (call,) = peers.paged(Wrapper, "fa2", q, [(k, v)])
    torch.testing.assert_close(call(), peers.attention(q, k, v))
    with pytest.raises(ValueError, match="190 tokens"):
        peers.paged(Wrapper, "fa2", q, [(k[:, :, :190], v[:, :, :190])])


def test_whole_models_stand_beside_the_rows_of_their_shape(monkeypatch):
    asked = []

    def decode(config, cases, steps):
        asked.append(cases)
        return [{"transformers": float(context)} for _, context in cases]

    monkeypatch.setattr(peers, "decode_peers", decode)
    monkeypatch.setattr(peers, "prefill_peers", lambda config, prompts: [{"transformers": float(n)} for n in prompts])
    rows = [("decode", {"kv": kv, "batch": 1, "context": n}) for kv in ("bf16", "int2") for n in (128, 256)]
    rows += [("memory", {"kv": "int2"}), ("prefill", {"tokens": 64})]
    peers.beside(None, rows, 3)
    assert asked == [[(1, 128), (1, 256)]]
    assert [row["peers"]["transformers"] for section, row in rows if section != "memory"] == [128, 256, 128, 256, 64]
    peers.beside(None, [("memory", {})], 3)  # nothing asked for, nothing loaded


# --- the Triton kernel


@pytest.fixture
def triton_decode():
    """Compiled where there is a card, else interpreted."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks import triton_decode

    return triton_decode


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "lengths", "block", "programs"),
    [
        (8, 2, 64, (1, 37, 200), 64, 6),  # splits beyond the end of the short ones
        (9, 3, 64, (65, 64), 64, 1),
        (4, 4, 32, (130,), 32, 1),
        (28, 4, 128, (300,), 128, 3),
        (40, 2, 64, (100,), 64, 1),  # more q heads than 16 rows
    ],
)
def test_triton_decode_is_attention(triton_decode, seed, q_heads, kv_heads, head_dim, lengths, block, programs):
    import torch

    device, dtype = ("cuda", torch.bfloat16) if CARD else ("cpu", torch.float16)  # the interpreter has no BF16 dot
    rng, batch = np.random.default_rng(seed), len(lengths)
    made = [rng.standard_normal((batch, n, max(lengths) + 7, head_dim), np.float32) for n in (kv_heads, kv_heads)]
    k, v = (torch.from_numpy(x).to(device, dtype)[:, :, : max(lengths)] for x in made)
    q = torch.from_numpy(rng.standard_normal((batch, q_heads, head_dim), np.float32)).to(device, dtype)
    tuning = triton_decode.Tuning(block, 4, 2, programs)
    (call,) = triton_decode.decode(q, [(k, v)], torch.tensor(lengths, dtype=torch.int32, device=device), tuning, 8)
    found = call().double().cpu().numpy()
    q, k, v = (x.double().cpu().numpy() for x in (q, k, v))
    for row, length in enumerate(lengths):
        for head in range(q_heads):
            keys, values = k[row, head * kv_heads // q_heads, :length], v[row, head * kv_heads // q_heads, :length]
            logits = keys @ q[row, head] / head_dim**0.5
            weights = np.exp(logits - logits.max())
            expected = weights @ values / weights.sum()
            tolerance = 6e-3 if dtype == torch.bfloat16 else 1e-3
            assert np.linalg.norm(found[row, head] - expected) < tolerance * np.linalg.norm(expected)


def test_triton_decode_refuses_a_head_it_has_no_tile_for(triton_decode):
    import torch

    q, k = torch.zeros(1, 2, 96), torch.zeros(1, 1, 8, 96)
    with pytest.raises(ValueError, match="head_dim 96"):
        triton_decode.decode(q, [(k, k)], torch.tensor([8]), triton_decode.TUNINGS[0], 1)


COMPILE = """
import sys
from benchmarks import triton_decode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
types = dict(zip("q k v lengths parts logs scale per_split row_stride head_stride".split(),
                 "*bf16 *bf16 *bf16 *i32 *fp32 *fp32 fp32 i32 i32 i32".split()))
tile = triton_decode.TUNINGS[0]
sizes = {"GROUP": 4, "ROWS": 16, "DIM": 128, "BLOCK": tile.block}
aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 4, 5, 7, 8, 9)}
source = ASTSource(triton_decode.attend, types | dict.fromkeys(sizes, "constexpr"), sizes, aligned)
how = {"num_warps": tile.warps, "num_stages": tile.stages}
made = compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=how)
assert made.asm["cubin"] and "mma.sync" in made.asm["ptx"] and "cp.async" in made.asm["ptx"]
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernel_compiles_to_tensor_cores_and_asynchronous_copies(capability, pytestconfig):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath, env=environment)
    assert done.returncode == 0, done.stderr


# --- transformers


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_runs_the_same_shape_end_to_end(kind):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = Config.from_dict({**QWEN, "model_type": kind})
    (rate,) = peers.prefill_peers(config, [32], "cpu")
    assert rate["transformers"] > 0
    for times in peers.decode_peers(config, [(1, 128), (2, 256)], "cpu", steps=2):
        assert times["transformers"] > 0
        for name, package in (("transformers_hqq2", "hqq"), ("transformers_quanto2", "quanto")):
            assert isinstance(times[name], float) or package in times[name].lower()
