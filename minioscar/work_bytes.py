"""Bytes of weights, of the arrays of one forward pass and of the steps behind it: what memory.py asks a back end for.

Each plan says what its launches take; here they are added up, over what is alive at once.
"""

from __future__ import annotations

from .causal_attention import QUERIES
from .config import Config
from .experts import plans as experts
from .layer_cache import BF16, blocks_of
from .machine import Card
from .ops.linear import scratch_sizes
from .ops.sample import MAX_BIASES, MAX_ENDS, SETTINGS, sample_words
from .oscar import SCHEMES
from .pages import HEAD_DIMS
from .penalties import mask_words
from .plans import BATCH_TOKENS, LINEAR_TOKENS, Heads, LinearPlan, batch_plan, decode_plan, step_sizes
from .quantized import RUN
from .quantized import plans as quantized
from .sm90 import prefill_attention as sm90
from .weights import expected, matrices

MLP_TOKENS = 8192  # whose gate and up projections are in memory at once


def of_weights(config: Config, itemsize: int) -> int:
    """Of all weights, where quantized matrices are kept in 4 or 8 bits and numbers take `itemsize` bytes."""
    total, shapes = config.parameters() * itemsize, expected(config)
    for name in matrices(config):
        rows, columns = shapes[name]
        bits = config.stored_bits(name == "lm_head.weight", columns if config.shared_keys else 0)
        if bits is not None:  # of whole runs, and a number for each row
            total += round(rows * (-(-columns // RUN) * RUN * bits / 8 - columns * itemsize)) + 4 * rows
    return total


def of_array_code(config: Config, tokens: int, context: int, rows: int, itemsize: int) -> int:
    """`Reference.work_bytes`: the widest of an MLP, attention and logits, in numbers of so many bytes."""
    hidden, q, kv = config.hidden_size, config.q_size, config.kv_size

    def attention(n: int) -> int:
        chunk = min(QUERIES, n)
        scores = config.num_heads * chunk * context
        scores += chunk * (2 * chunk + 3 * q)  # the mask, q and y of a chunk
        unpacked = 2 * kv * (context - n)  # the past, twice for a moment
        return n * (hidden + 3 * q + 6 * kv) + 2 * kv * context + max(unpacked, scores)

    mlp = tokens * (2 * hidden + 8 * config.intermediate_size)
    if config.experts:  # the router's arrays, and all tokens at one expert
        mlp += tokens * (3 * hidden + 5 * config.experts.count)
    return itemsize * max(mlp, attention(tokens), attention(1), rows * config.vocab_size)


def on_card(config: Config, tokens: int, context: int, rows: int, penalties: bool | None, card: Card) -> int:
    """`Cuda.work_bytes`: the arrays of model.py that are alive at once in a prefill, or, of many rows, in a decode
    step, which finds the scratch of the prefill still there; and in both the logits, the tables of RoPE and that of
    blocks. Where rows join, both are alive, and steps of several numbers of rows."""
    tables = 4 * config.head_dim * max(1024, 1 << (context - 1).bit_length()) + 4 * rows * blocks_of(context)
    if config.head_dim not in HEAD_DIMS:  # array code in float32
        return of_array_code(config, tokens, context, rows, 4) + tables
    batch = max(rows, tokens if tokens <= BATCH_TOKENS else 0)  # cuBLAS takes more
    reading = _prefill_bytes(config, tokens, context, card) + scratch_bytes(config, batch, card)
    sizes, joins = (step_sizes(rows), True) if penalties is None else ([rows], False)
    steps = sum(_step_bytes(config, n, card) + scratch_bytes(config, n, card) for n in sizes)
    steps += _drawing_bytes(config.vocab_size, rows, penalties is not False)
    logits = 4 * config.vocab_size * (sum(sizes) + joins * rows)
    together = reading + steps if joins else max(reading, steps + scratch_bytes(config, rows, card))
    return together + logits + tables


def _prefill_bytes(c: Config, tokens: int, context: int, card: Card) -> int:
    """While attention reads keys and values in BF16, or while the MLP runs."""
    heads, width = Heads.of(c), BF16.itemsize
    split = sm90.split_plan(heads, tokens, 1, context - tokens, card)
    past = context if sm90.tiled(c.head_dim, card) else context - tokens  # all in tiles, or the older ones unpacked
    attending = width * tokens * (c.hidden_size + 2 * c.q_size + c.qkv_size + c.kv_size)  # x, qkv, q, k, y
    attending += 2 * width * past * c.kv_size + (split.nbytes(c.head_dim) if split else 0)
    if c.experts:
        return max(attending, width * tokens * c.hidden_size + experts.work_bytes(c, tokens, card))
    gate_up = min(tokens, MLP_TOKENS) * 2 * c.intermediate_size
    if c.stored_bits(False) and tokens > BATCH_TOKENS:  # the matrix itself, dequantized
        gate_up += 2 * c.intermediate_size * c.hidden_size
        attending = max(attending, width * (tokens * (2 * c.hidden_size + c.qkv_size) + c.qkv_size * c.hidden_size))
    return max(attending, width * (tokens * (2 * c.hidden_size + c.intermediate_size) + gate_up))


def _step_bytes(c: Config, rows: int, card: Card) -> int:
    """Of a `StepBatch`, how rows draw aside, and of the activations of a step."""
    plan = decode_plan(Heads.of(c), SCHEMES["int2"], rows, card)  # no scheme has more tasks
    widths = 2 * c.hidden_size, 2 * c.q_size + c.qkv_size, c.intermediate_size  # x twice; qkv, q, y; h
    x, attending, h = (BF16.itemsize * rows * width for width in widths)
    activations = x + (max(attending, experts.work_bytes(c, rows, card)) if c.experts else attending + h)
    return activations + plan.nbytes(c.head_dim)


def _drawing_bytes(vocab: int, rows: int, adjusted: bool) -> int:
    """Of the arrays of a `Drawing`; adjusted: of rows with penalties, or of any rows that join."""
    of_any = 8 * vocab + 4 * mask_words(vocab) + 4 * MAX_ENDS + 8 * MAX_BIASES
    return rows * (8 * sample_words(vocab) + SETTINGS.itemsize + (of_any if adjusted else 0))


def step_plans(c: Config, tokens: int, card: Card) -> list[LinearPlan]:
    """Of the matrices of a model, for so many tokens; none for few, which linear.cu takes without scratch."""
    if tokens <= LINEAR_TOKENS:
        return []
    shapes = [(c.hidden_size, c.qkv_size, False), (c.q_size, c.hidden_size, False)]
    shapes += [(c.hidden_size, c.vocab_size, False)]
    if c.experts:
        shapes += [(c.hidden_size, c.experts.count, False)]  # the router
    else:
        shapes += [(c.hidden_size, 2 * c.intermediate_size, True), (c.intermediate_size, c.hidden_size, False)]
    shapes = [shape for shape in shapes if shape[0] % 8 == 0]
    plans = [batch_plan(tokens, *shape, card) for shape in shapes]
    return plans + (quantized.possible_plans(tokens, shapes, card) if c.stored_bits(False) else [])


def scratch_bytes(config: Config, tokens: int, card: Card) -> int:
    """Of `Products` for the matrices of a model and so many tokens."""
    plans = step_plans(config, min(tokens, BATCH_TOKENS), card)
    sizes = scratch_sizes(plans, tokens * config.hidden_size if plans else 0)
    return sum(count * (BF16.itemsize if name == "x" else 4) for name, count in sizes.items())
