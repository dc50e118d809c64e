"""GGUF -> model folder, on tiny files written here with known weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from minioscar.errors import Failure, UserError
from minioscar.storage.gguf import convert, unpermute
from minioscar.tokenizer import Tokenizer

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 64, 4, 2, 16, 96
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges of a tiny byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*SPECIALS, *sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "12", "<think>"]
    return tokens, [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS) - 1) + [4], ["Ġ t", "h e", "Ġt he", "1 2"]


def hf_weights(rng: np.random.Generator, tied: bool = True) -> dict[str, np.ndarray]:
    """What the model is in Hugging Face's names and row order; float32."""
    shapes = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    shapes |= {"self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM)}
    shapes |= {f"self_attn.{name}_proj": (KV_HEADS * HEAD_DIM, HIDDEN) for name in "kv"}
    shapes |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
    names = {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    vocab = len(vocabulary()[0])
    names |= {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        names["lm_head.weight"] = (vocab, HIDDEN)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if not name.startswith("model.layers."):
        return GGUF_NAMES[name] + ".weight"
    _, _, i, rest = name.split(".", 3)
    return f"blk.{i}.{GGUF_NAMES[rest]}.weight"


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's row order, row by row: rows i and i + head_dim/2 of a head, which RoPE turns together, become
    neighbours."""
    half = HEAD_DIM // 2
    order = [head * HEAD_DIM + j * half + i for head in range(heads) for i in range(half) for j in (0, 1)]
    return x[order]


def write_gguf(
    path: Path, weights: dict[str, np.ndarray], kinds: dict[str, str] | None = None, architecture: str = "llama",
    **changes: Any
) -> None:
    """kinds: part of a GGUF name -> quantization type, F32 where none matches. changes: other or (None) absent
    metadata."""
    tokens, types, merges = vocabulary()
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "block_count": LAYERS,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "context_length": 512,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "rope.dimension_count": HEAD_DIM,
    }
    for key, number in (numbers | {k: v for k, v in changes.items() if k in numbers}).items():
        if number is not None:
            writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    for key, text in (("tokenizer.ggml.pre", "smollm"), ("llama.rope.scaling.type", None)):
        if text := changes.get(key, text):
            writer.add_string(key, text)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, token in changes.get("more", {}).items():
        {int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}[type(token)](f"tokenizer.{key}", token)
    for hf_name, x in weights.items():
        name = gguf_name(hf_name) if hf_name.endswith(".weight") else hf_name
        if "attn_q" in name or "attn_k" in name:
            x = interleaved(x, HEADS if "attn_q" in name else KV_HEADS)
        kind = next((kind for part, kind in (kinds or {}).items() if part in name), "F32")
        if kind == "F32":
            writer.add_tensor(name, x)
        else:
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    out = path.with_name("out")
    out.mkdir()
    convert(path, out)
    with safe_open(out / "model.safetensors", framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads((out / "config.json").read_text())


@pytest.fixture
def weights(seed: int) -> dict[str, np.ndarray]:
    return hf_weights(np.random.default_rng(seed))


def test_weights_keep_their_names_shapes_and_row_order_and_are_rounded_once_to_bf16(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights)
    found, _ = converted(tmp_path / "m.gguf")
    assert found.keys() == weights.keys()
    for name, x in weights.items():
        assert found[name].dtype == ml_dtypes.bfloat16, name
        np.testing.assert_array_equal(found[name], x.astype(ml_dtypes.bfloat16), err_msg=name)


def test_bf16_rounding_is_to_nearest_even(tmp_path, weights):
    # two ties, just above and just below one
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32)
    weights["model.norm.weight"][:4] = bits.view(np.float32)
    write_gguf(tmp_path / "m.gguf", weights)
    found, _ = converted(tmp_path / "m.gguf")
    assert [hex(b) for b in found["model.norm.weight"][:4].view(np.uint16)] == ["0x3f80", "0x3f82", "0x3f81", "0x3f80"]


@pytest.mark.parametrize(("kind", "levels"), [("Q8_0", 127), ("Q4_1", 15 / 2)])
def test_quantized_tensors_are_dequantized_before_rows_are_put_back(tmp_path, weights, kind, levels):
    write_gguf(tmp_path / "m.gguf", weights, {"attn_": kind, "ffn_down": kind, "norm": "F32"})
    found, _ = converted(tmp_path / "m.gguf")
    for name, x in weights.items():
        if "_proj" not in name or "gate" in name or "up" in name:
            continue
        # half a step of the quantizer (range over levels; scale and minimum in fp16), then half a step of BF16
        bound = abs(x).max() * (0.5 / levels + 2**-9 + 2**-10)
        assert abs(found[name].astype(np.float32) - x).max() <= bound, name
        assert abs(found[name].astype(np.float32) - x).max() > 0, name  # it was really quantized


def test_config_has_the_fields_and_the_shortest_spelling_of_float32_numbers(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights)
    _, config = converted(tmp_path / "m.gguf")
    wanted = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], torch_dtype="bfloat16", tie_word_embeddings=True
    )
    wanted |= dict(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        head_dim=HEAD_DIM
    )
    wanted |= dict(num_key_value_heads=KV_HEADS, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=1e5)
    wanted |= dict(vocab_size=len(vocabulary()[0]), bos_token_id=1, eos_token_id=2)
    assert {key: config[key] for key in wanted} == wanted


def test_an_output_tensor_means_untied_embeddings(tmp_path, seed):
    weights = hf_weights(np.random.default_rng(seed), tied=False)
    write_gguf(tmp_path / "m.gguf", weights)
    found, config = converted(tmp_path / "m.gguf")
    assert config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(found["lm_head.weight"], weights["lm_head.weight"].astype(ml_dtypes.bfloat16))


def test_the_tokenizer_splits_digits_and_knows_special_and_added_tokens(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights)
    converted(tmp_path / "m.gguf")
    tokenizer = Tokenizer(tmp_path / "out")
    tokens = vocabulary()[0]
    assert [
        tokens[i] for i in tokenizer.encode("a the 12<think><|im_end|>")
    ] == ["a", "Ġthe", "Ġ", "1", "2", "<think>", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("a the 12<think><|im_end|>é")) == "a the 12<think>é"
    assert (tokenizer.eos_ids, tokenizer.bos_id) == ({2}, 1)
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_ends_of_turns_bos_eos_and_named_templates_are_those_of_the_file(tmp_path, weights):
    more = {
        "ggml.eot_token_id": 3, "ggml.eom_token_id": 2, "ggml.add_bos_token": True, "ggml.add_eos_token": True,
        "ggml.cls_token_id": 1
    }
    write_gguf(tmp_path / "m.gguf", weights, more=more | {"chat_template.tool_use": "tools {{ cls_token }}"})
    converted(tmp_path / "m.gguf")
    one = Tokenizer(tmp_path / "out")
    assert one.eos_ids == {2, 3}
    assert one.prompt_ids("the") == [1, *one.encode("the"), 2]
    messages = [{"role": "user", "content": "a"}]
    assert one.chat(messages, template={"chat_template": "tool_use"}) == f"tools {one._named['bos_token']}"
    assert one.chat(messages) != one.chat(messages, template={"chat_template": "tool_use"})


def test_an_end_of_turn_that_is_no_token_is_refused(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights, more={"ggml.eot_token_id": 10**6})
    with pytest.raises(UserError, match="the eot token 1000000 is not among"):
        converted(tmp_path / "m.gguf")


def test_whoever_may_read_one_file_may_read_all(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights)
    converted(tmp_path / "m.gguf")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_unpermute_undoes_the_interleaving_of_each_head_by_itself():
    x = np.arange(2 * HEAD_DIM * 3).reshape(2 * HEAD_DIM, 3)
    np.testing.assert_array_equal(unpermute(interleaved(x, 2), 2), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gptneox"}, "architecture 'gptneox'"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe'"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"attention.head_count": 0}, "llama.attention.head_count is 0"),
        ({"block_count": LAYERS + 1}, "tensor blk.2.attn_norm.weight is missing"),
        ({"block_count": LAYERS - 1}, "tensor blk.1.attn_k.weight is not part"),
        ({"feed_forward_length": FFN * 2}, "tensor blk.0.ffn_gate.weight has shape"),
        ({"rope.dimension_count": HEAD_DIM // 2}, "head sizes"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_and_leaves_no_config(tmp_path, weights, changes, message):
    write_gguf(tmp_path / "m.gguf", weights, **changes)
    with pytest.raises(UserError, match=message) as caught:
        converted(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_bias_is_refused_by_name(tmp_path, weights):
    write_gguf(tmp_path / "m.gguf", weights | {"blk.0.attn_v.bias": np.zeros(KV_HEADS * HEAD_DIM, np.float32)})
    with pytest.raises(UserError, match="tensor blk.0.attn_v.bias is not part"):
        converted(tmp_path / "m.gguf")


def test_a_truncated_file_at_any_length_is_one_line(tmp_path, weights, seed):
    write_gguf(tmp_path / "m.gguf", weights)
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "out").mkdir()
    for length in [0, 3, 8, 24, *np.random.default_rng(seed).integers(0, len(whole) - 1, 20)]:
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable GGUF file") as caught:
            convert(tmp_path / "m.gguf", tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_one_line(tmp_path, weights, monkeypatch):
    import safetensors.numpy

    def full(*_args: Any, **_options: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    write_gguf(tmp_path / "m.gguf", weights)
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(Failure, match="model.safetensors: cannot be written: .*No space left"):
        converted(tmp_path / "m.gguf")


def test_without_the_gguf_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'minioscar\[gguf\]'"):
        convert(tmp_path / "m.gguf", tmp_path)
