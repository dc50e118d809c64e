"""Whatever stands in a config, a safetensors index or a prompt cache's header: a value that works, or one line that
says why not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minioscar.cache import Cache, cache_bytes
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.model_files.rope import read_rope
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES, WINDOW
from minioscar.pages import check_scheme
from minioscar.prompt_cache import FORMAT, VERSION, File, _is_neutral, binding, common, continued
from minioscar.rows import row_layout
from minioscar.storage.checkpoint import INDEX, _files
from minioscar.tokenizer import Tokenizer

from .tiny import CONFIG, WINDOWS, write_talker

examples = settings(
    max_examples=200, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
usual = st.sampled_from([16, 64, 96, 128, 1024, 4096, 10**6, 2**31 - 1, 1.0, 0.5, 40.0, 1e4, 5e5, 1e-6])
numbers = st.one_of(st.integers(-2, 5), st.integers(), usual, st.floats())
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=4) | st.sampled_from(
        ["full_attention", "sliding_attention", "yarn", "llama3"]
    ),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=4), value, max_size=3),
    max_leaves=5,
)
rope = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn"]) | anything},
    optional={
        key: numbers | anything
        for key in (
            "factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
            "beta_fast", "beta_slow",
            "attention_factor", "mscale", "mscale_all_dim", "truncate", "partial_rotary_factor",
        )
    },
)
configs = st.builds(
    lambda kind, changes: {**CONFIG, "model_type": kind, **changes},
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    st.fixed_dictionaries(
        {},
        optional={
            "rope_scaling": rope | anything, "rope_parameters": rope, "rope_theta": numbers,
            "use_sliding_window": st.booleans(),
            "sliding_window": numbers,
            "layer_types": st.lists(st.sampled_from(["full_attention", "sliding_attention"])) | anything,
            **{key: numbers | anything for key in CONFIG if key not in ("rope_theta", "model_type")},
        },
    ),
)


def one_line(error: pytest.ExceptionInfo | Exception) -> bool:
    return "\n" not in str(error) and len(str(error)) > 10


@examples
@given(raw=configs)
def test_any_config_is_a_model_that_can_be_counted_and_turned_or_is_refused(raw):
    try:
        config = Config.from_dict(raw)
    except UserError as error:
        assert one_line(error)
        return
    assert config.num_heads % config.num_kv_heads == 0 and 0 < config.max_positions <= 2**31 and config.parameters() > 0
    with np.errstate(all="raise"):
        cos, sin = config.rope.tables(32)
    assert cos.shape == sin.shape == (32, config.head_dim // 2) and np.isfinite(cos).all() and np.isfinite(sin).all()
    for scheme in SCHEMES.values():
        try:
            check_scheme(config, scheme)
        except UserError as error:
            assert one_line(error)
            continue
        assert cache_bytes(config, scheme, 1, min(config.max_positions, 4096)) > 0


positive = st.one_of(st.sampled_from([1.0, 2.0, 1e-9, 1e11]), st.floats(1e-9, 1e11), st.integers(1, 10**11))
options = ["beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings"]


@examples
@given(
    kind=st.sampled_from(["linear", "llama3", "yarn"]),
    required=st.fixed_dictionaries(
        {key: positive for key in ("factor", "rope_theta", "low_freq_factor", "high_freq_factor")}
    ),
    optional=st.dictionaries(st.sampled_from(options), positive, max_size=4),
    truncate=st.booleans(),
)
def test_rope_of_any_positive_numbers_turns_by_finite_angles_or_is_refused(kind, required, optional, truncate):
    fields = {"rope_type": kind, "truncate": truncate, **required, **optional}
    try:
        rope = read_rope({"rope_scaling": fields, "rope_theta": 1e4}, 64, 4096, "config.json")
    except UserError as error:
        assert one_line(error)
        return
    cos, sin = rope.tables(16)
    assert np.isfinite(cos).all() and np.isfinite(sin).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_talker(tmp_path_factory.mktemp("properties") / "model", 5)


names = st.one_of(st.text(max_size=12), st.text("./\\a\0", max_size=9).map(lambda s: s + ".safetensors"), anything)
weight_maps = st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=3), names, max_size=3) | anything})


@examples
@given(index=weight_maps | anything)
def test_any_safetensors_index_names_files_of_its_folder_or_is_refused(tmp_path, index):
    (tmp_path / INDEX).write_bytes(json.dumps(index).encode("utf-8", "surrogatepass"))
    try:
        names = _files(tmp_path)
    except UserError as error:
        assert one_line(error)
        return
    assert names
    for name in names:
        assert (tmp_path / name).resolve().parent == tmp_path.resolve() and name.endswith(".safetensors")


NAMES = st.sampled_from(["bos_token", "eos_token", "chat_template", "x"])


@examples
@given(extra=st.dictionaries(NAMES, anything | st.text(), max_size=4))
def test_any_tokenizer_config_encodes_or_is_refused(folder, extra, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(extra))
    try:
        tokenizer = Tokenizer(tmp_path)
        chat = tokenizer.has_chat_template
        ids = tokenizer.prompt_ids(tokenizer.chat([{"role": "user", "content": "the cat"}]) if chat else "the cat")
    except UserError as error:
        assert one_line(error)
        return
    assert all(isinstance(i, int) for i in [*ids, *tokenizer.eos_ids])


@examples
@given(data=st.data())
def test_any_header_of_a_prompt_cache_is_this_models_or_is_refused(folder, tmp_path, data):
    config, scheme = Config.from_folder(folder), SCHEMES["int2"]
    good = {**binding(config, scheme), "weights": "w", "contents": "c"}
    texts = st.text(max_size=5) | anything.map(json.dumps)
    changes = data.draw(st.dictionaries(st.sampled_from([*good, "x"]), texts, max_size=3))
    field = data.draw(st.sampled_from(["config", "scheme"]))
    fields = data.draw(st.dictionaries(st.sampled_from([*json.loads(good[field]), "x"]), anything, max_size=2))
    metadata = {**good, field: json.dumps({**json.loads(good[field]), **fields}), **changes}
    metadata = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    save_file({"ids": np.zeros(1, np.int32)}, tmp_path / "c", metadata)
    checked = good.keys() - {"contents"}
    same = all(metadata[key] == good[key] or _known(metadata[key]) == _known(good[key]) for key in checked)
    try:
        with File(tmp_path / "c") as file:
            file.check(config, scheme, "w")
    except UserError as error:
        assert one_line(error) and str(tmp_path / "c") in str(error)
        return
    assert same and metadata["format"] == FORMAT and metadata["version"] == VERSION


def _known(text: str):
    """The fields that this version has; another one ("x") may be there where it changes nothing."""
    try:
        fields = json.loads(text)
    except ValueError:
        return object()
    return {k: v for k, v in fields.items() if k != "x" or not _is_neutral(v)} if isinstance(fields, dict) else fields


@examples
@given(kv=st.sampled_from(sorted(SCHEMES)), length=st.integers(1, 1024), dim=st.sampled_from([32, 64, 128]))
def test_a_row_of_any_length_is_counted_by_its_layout(kv, length, dim):
    """What a saved row takes is what the cache takes for its tokens: packed blocks, and a window as far as it is
    filled."""
    config, scheme = Config.from_dict({**CONFIG, "head_dim": dim}), SCHEMES[kv]
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in row_layout(config, scheme, length).values())
    whole = cache_bytes(config, scheme, 1, -(-length // WINDOW) * WINDOW) // config.num_layers
    assert 0 < size <= whole
    assert all(math.prod(shape) for shape, _ in row_layout(config, scheme, length).values())


@examples
@given(kv=st.sampled_from(["bf16", "oscar", *WINDOWS]), held=st.integers(0, 1000), part=st.floats(0, 1))
def test_a_cut_keeps_all_that_it_can(kv, held, part):
    """All, if the window begins where that of the shorter row would; else whole blocks, fewer than a window less."""
    scheme, length = (SCHEMES | WINDOWS)[kv], round(held * part)
    cache = Cache(Config.from_dict({**CONFIG, "head_dim": 64, "num_hidden_layers": 1}), scheme, 1, 1000, Reference())
    cache.lengths[0] = held
    left = cache.truncate(0, length)
    assert 0 <= left <= length and length - left < (scheme.ring if scheme.quantized else 1)
    assert left == length or (left % scheme.flush == 0 and length < held - held % scheme.flush)


@examples
@given(a=st.lists(st.integers(0, 3), max_size=12), b=st.lists(st.integers(0, 3), max_size=12))
def test_common_is_the_longest_shared_beginning(a, b):
    n = common(a, b)
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])


@examples
@given(texts=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4))
def test_continued_never_loses_a_message(texts):
    messages = []
    for text in texts:
        messages = continued(messages, text)
        assert messages[-1]["role"] == "user" and messages[-1]["content"].endswith(text)
    assert messages == [{"role": "user", "content": "\n\n".join(texts)}]
