"""What `bench.py --peers` measures beside ours: attention kernels over the same BF16 tensors, and Hugging Face
transformers end to end.

Nothing here is needed to run: a peer that is absent, cannot run a shape or computes something else has its reason
where its time would stand. Attention peers are timed as our kernels are, 20 launches in one replayed graph;
transformers cannot be captured as it is, so its steps are timed one by one, launches from Python included.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measure import LAUNCHES, replayed, sustained
from minioscar.config import Config

if TYPE_CHECKING:
    from benchmarks.cases import Case

Array = Tensor = Any
Call = Callable[[], Tensor]
Candidates = Iterator[Callable[[], list[Call]]]  # ways of a peer to do it; each prepares a call per cache
Caches = Sequence[tuple[Tensor, Tensor]]  # keys and values, [batch, kv_heads, tokens, head_dim] in BF16
Times = dict[str, float | str]  # or the reason why there is none

CLOSE = 0.02  # of the norm of the output; rounding to BF16 costs about 0.003


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def gives_back(measure: Callable) -> Callable:
    """What torch's allocator still holds afterwards would be missing to CuPy's."""

    @functools.wraps(measure)
    def run(*args: Any, **options: Any) -> Any:
        found = measure(*args, **options)
        gc.collect()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()
        return found

    return run


# --- attention alone


@gives_back
def peer_times(case: Case, caches: list[dict[str, Array]], rest: bool = True) -> Times:
    """Microseconds of decode attention over `context` tokens and half a window, by peer; caches: our kernel's
    rotating BF16 arrays. rest: as `measure.graph_time` has it."""
    try:
        import torch

        tokens = case.context + case.window
        pairs = [
            tuple(
                torch.from_dlpack(cache[name].view(np.uint16)).view(torch.bfloat16)[:, :, :tokens]
                for name in ("keys", "values")
            )
            for cache in caches
        ]
        q = torch.randn(case.batch, case.heads.q_heads, case.heads.head_dim, device=pairs[0][0].device).to(
            torch.bfloat16
        )
        expected = attention(q, *pairs[0])
    except Exception as error:
        return dict.fromkeys(ATTENTION, reason(error))
    found: Times = {}
    for name, candidates in ATTENTION.items():
        try:
            found[name] = fastest(candidates(q, pairs), expected, rest)
        except Exception as error:
            found[name] = reason(error)
    return found


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float32, row by row: what every peer is held to. q: [batch, q_heads, head_dim]; the result has its shape."""
    import torch

    batch, q_heads, dim = q.shape
    out = torch.empty(q.shape, device=q.device)
    for row in range(batch):
        grouped = q[row].float().view(k.shape[1], -1, dim)  # [kv_heads, group, head_dim]
        weights = torch.softmax(grouped @ k[row].float().transpose(1, 2) * dim**-0.5, -1)
        out[row] = (weights @ v[row].float()).view(q_heads, dim)
    return out


def fastest(candidates: Candidates, expected: Tensor, rest: bool) -> float:
    """Microseconds of the peer's fastest candidate. One that fails or is wrong is passed over, unless all of them
    are."""
    tried: list[tuple[float, list[Call]]] = []
    failure: Exception = RuntimeError("nothing to try for this shape")
    for prepare in candidates:
        try:
            calls = prepare()
            off = float((calls[0]().float() - expected).norm() / expected.norm())
            if not off < CLOSE:
                raise ArithmeticError(f"the result is off by {off:.2g} of its norm")
            tried.append((graph_time(calls, replays=5), calls))
        except Exception as error:
            failure = error
    if not tried:
        raise failure
    return graph_time(min(tried, key=lambda each: each[0])[1], rest=rest)


def graph_time(calls: list[Call], replays: int = 25, rest: bool = True) -> float:
    """`measure.graph_time` on torch's allocator and streams: microseconds of one call, median over the replays."""
    import torch

    count = max(LAUNCHES, len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()

    def once() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / count

    return statistics.median(replayed(once, count, replays) if rest else sustained(once))


def sdpa(backend: str, q: Tensor, caches: Caches) -> Candidates:
    """torch's scaled_dot_product_attention, held to one of its back ends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def call(k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)

    yield lambda: [partial(call, k, v) for k, v in caches]


def triton(q: Tensor, caches: Caches) -> Candidates:
    """benchmarks/triton_decode.py in all its tunings."""
    import torch

    from benchmarks import triton_decode

    batch, _, tokens, _ = caches[0][0].shape
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=q.device)
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    for tuning in triton_decode.TUNINGS:
        yield partial(triton_decode.decode, q, caches, lengths, tuning, multiprocessors)


def flashinfer(q: Tensor, caches: Caches) -> Candidates:
    """FlashInfer on tensor cores: its kernel for one sequence, and the paged one that servers use
    (docs.flashinfer.ai, decode)."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, single_decode_with_kv_cache

    if q.shape[0] == 1:
        options = {"kv_layout": "HND", "use_tensor_cores": True}
        yield lambda: [
            lambda k=k, v=v: single_decode_with_kv_cache(q[0], k[0], v[0], **options)[None] for k, v in caches
        ]
    for backend in ("fa2", "fa3"):  # "auto" is fa2 for BF16 (0.6.18); FlashAttention-3 runs on Hopper alone
        yield partial(paged, BatchDecodeWithPagedKVCacheWrapper, backend, q, caches)


def paged(wrapper_class: type, backend: str, q: Tensor, caches: Caches, page: int = 64) -> list[Call]:
    import torch

    (batch, kv_heads, tokens, dim), room = caches[0][0].shape, caches[0][0].stride(1) // caches[0][0].stride(2)
    if tokens % page or room % page:
        raise ValueError(f"{tokens} tokens in room for {room} are not whole pages of {page}")
    numbers = {"dtype": torch.int32, "device": q.device}
    indptr = torch.arange(batch + 1, **numbers) * (tokens // page)
    rows, within = torch.arange(batch, **numbers) * (kv_heads * room // page), torch.arange(tokens // page, **numbers)
    indices = (rows[:, None] + within).flatten()
    last = torch.full((batch,), page, **numbers)
    wrapper = wrapper_class(
        torch.zeros(128 << 20, dtype=torch.uint8, device=q.device), "HND", use_cuda_graph=True, use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr, paged_kv_indices_buffer=indices, paged_kv_last_page_len_buffer=last,
        backend=backend,
    )  # fmt: skip
    wrapper.plan(indptr, indices, last, q.shape[1], kv_heads, dim, page, q_data_type=q.dtype, kv_data_type=q.dtype)
    return [partial(wrapper.run, q, (pages(k, page), pages(v, page))) for k, v in caches]


def pages(x: Tensor, page: int) -> Tensor:
    """A view of [batch, kv_heads, tokens, head_dim] as [pages, kv_heads, page, head_dim]: page i begins i * page
    tokens into the storage.

    A row begins every kv_heads * room / page pages. What stands between are other heads' tokens again: pages of no row.
    """
    (batch, kv_heads, _, dim), head_stride = x.shape, x.stride(1)
    count = ((batch - 1) * kv_heads + 1) * head_stride // (page * dim)
    return x.as_strided((count, kv_heads, page, dim), (page * dim, head_stride, dim, 1))


ATTENTION: dict[str, Callable[[Tensor, Caches], Candidates]] = {
    "sdpa_fa2": partial(sdpa, "FLASH_ATTENTION"),
    "sdpa_cudnn": partial(sdpa, "CUDNN_ATTENTION"),
    "triton": triton,
    "flashinfer": flashinfer,
}


# --- a whole model

# Options of transformers' QuantizedCache; None: its DynamicCache.
CACHES: dict[str, dict[str, Any] | None] = {
    "transformers": None,
    "transformers_hqq2": {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1},
    "transformers_quanto2": {"backend": "quanto", "nbits": 2, "axis_key": 0, "axis_value": 0},
}


@gives_back
def decode_peers(
    config: Config, cases: Sequence[tuple[int, int]], device: str = "cuda", steps: int = 20
) -> list[Times]:
    """Milliseconds of a decode step of transformers for every (batch, context), by cache; random weights, the cache
    filled at random.

    The cache grows by a token a step, as transformers' does. A quantized one packs again every 128 steps; the median
    leaves that out.
    """
    try:
        model = random_model(config, device)
    except Exception as error:
        return [dict.fromkeys(CACHES, reason(error)) for _ in cases]
    found: list[Times] = [{} for _ in cases]
    for times, (batch, context) in zip(found, cases, strict=True):
        for name, options in CACHES.items():
            try:
                times[name] = 1e3 * step_seconds(model, config, options, batch, context, steps)
            except Exception as error:
                times[name] = reason(error)
    return found


@gives_back
def prefill_peers(config: Config, prompts: Sequence[int], device: str = "cuda") -> list[Times]:
    """Tokens per second of transformers over one prompt of every length, logits of its last token."""
    try:
        import torch

        model = random_model(config, device)
    except Exception as error:
        return [{"transformers": reason(error)} for _ in prompts]
    found: list[Times] = []
    for tokens in prompts:
        ids = torch.randint(config.vocab_size, (1, tokens), device=device)
        try:
            seconds = median_seconds(
                lambda ids=ids: model(ids, use_cache=True, logits_to_keep=1), device, repeats=3, warm_up=1
            )
            found.append({"transformers": tokens / seconds})
        except Exception as error:
            found.append({"transformers": reason(error)})
    return found


def beside(config: Config, rows: Sequence[tuple[str, dict]], steps: int) -> None:
    """Puts transformers' figures into the rows of bench.py's sections decode and prefill, measured once for each
    shape."""
    decode, prefill = ([row for section, row in rows if section == wanted] for wanted in ("decode", "prefill"))
    cases = list(dict.fromkeys((row["batch"], row["context"]) for row in decode))
    found = dict(zip(cases, decode_peers(config, cases, steps=steps) if cases else (), strict=True))
    for row in decode:
        row["peers"] = found[row["batch"], row["context"]]
    prompts = [row["tokens"] for row in prefill]
    for row, times in zip(prefill, prefill_peers(config, prompts) if prompts else (), strict=True):
        row["peers"] = times


def random_model(config: Config, device: str) -> Any:
    """transformers' model of this shape, BF16, SDPA. Raises ValueError where it has other weights than ours."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    c = config
    shape = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "head_dim": c.head_dim,
    }
    shape |= {
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
    }
    shape |= {
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.qkv_bias,
    }
    if c.experts:
        shape |= {"num_experts": c.experts.count, "num_experts_per_tok": c.experts.per_token}
        shape |= {"moe_intermediate_size": c.intermediate_size, "norm_topk_prob": c.experts.normalized}
    shape |= {"mlp_bias": c.mlp_bias}
    with torch.device(device):
        made = AutoConfig.for_model(c.model_type, **shape, sliding_window=None)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    count = sum(weight.numel() for weight in model.parameters())
    if count != c.parameters():
        raise ValueError(f"transformers' {c.model_type} has {count} weights in this shape, not {c.parameters()}")
    return model


def step_seconds(
    model: Any, config: Config, options: dict[str, Any] | None, batch: int, context: int, steps: int
) -> float:
    import torch
    from transformers import DynamicCache, QuantizedCache

    cache = DynamicCache() if options is None else QuantizedCache(config=model.config, **options)
    shape = batch, config.num_kv_heads, context, config.head_dim
    for layer in range(config.num_layers):
        cache.update(*(torch.randn(shape, dtype=torch.bfloat16, device=model.device) for _ in range(2)), layer)
    ids = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
    return median_seconds(
        lambda: model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1), str(model.device), steps
    )


def median_seconds(run: Callable[[], Any], device: str, repeats: int, warm_up: int = 3) -> float:
    """Of a call, by the clock on the wall; the device has finished when a call counts as done."""
    import torch

    seconds = []
    with torch.inference_mode():
        for i in range(warm_up + repeats):
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if i >= warm_up:
                seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
