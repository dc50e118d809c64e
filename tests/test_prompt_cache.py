"""A prompt that has been read goes on, from memory or from a file, as if nothing had happened; every mismatch is
refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache as cache_results
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minioscar import engine as module
from minioscar import memory, pages
from minioscar.app.cli import main
from minioscar.cache import Cache
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.generation import Options
from minioscar.oscar import SCHEMES
from minioscar.pages import HEAD_DIMS, page_bytes, unsupported
from minioscar.prompt_cache import PromptCache, common, continued, digest
from minioscar.rows import row_layout
from minioscar.sampling import Sampling
from minioscar.storage.identity import WeightFiles

from . import simt
from .tiny import CONFIG, WINDOWS, load, relative, talker, write_model, write_talker

TEXT = "the cat sat on the mat, and the dog saw that the cat sat there. "
LENGTHS = (1, 40, 127, 128, 129, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("prompt-cache") / "model", 5)


@pytest.fixture(scope="module")
def engine(folder):
    return talker(folder)


@pytest.fixture(scope="module")
def engine_of(folder):
    """The talker by its scheme, loaded once: oscar-cov takes a second."""
    return cache_results(lambda kv: talker(folder, kv))


# --- rows


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kv", [*SCHEMES, *WINDOWS])
def test_a_row_goes_out_and_into_any_other_cache_bit_for_bit(engine_of, kv, length, seed, windows):
    engine, rng = engine_of(kv), np.random.default_rng(seed)
    ids = rng.integers(0, 320, length)
    cache = Cache(engine.config, engine.scheme, 2, 384, engine.ops)
    engine.model.forward(ids, cache, cache.batch_for([1], [length]))
    rows = cache.export_row(1)
    for row in rows:
        shapes = row_layout(engine.config, engine.scheme, length)
        assert {name: (array.shape, array.dtype) for name, array in row.items()} == shapes
    other = Cache(engine.config, engine.scheme, 3, 700, engine.ops)
    other.import_row(2, rows, length, length)
    for row, again in zip(rows, other.export_row(2), strict=True):
        assert all(np.array_equal(row[name], again[name]) for name in row)
    more = rng.integers(0, 320, 140)  # over the next block
    got, want = (
        engine.model.forward(more, c, c.batch_for([slot], [140]))
        for c, slot in ((other, 2), (cache_of(engine, cache), 1))
    )
    np.testing.assert_array_equal(got, want)


def cache_of(engine, cache):
    """The same rows with more room, so that 140 more tokens fit."""
    bigger = Cache(engine.config, engine.scheme, 2, 640, engine.ops)
    for a, b in zip(bigger.layers, cache.layers, strict=True):
        for name, array in b.arrays.items():
            if name in b.row_arrays:
                a[name][tuple(map(slice, array.shape))] = array
            elif name != "table":
                a[name][a.table[:, : b.table.shape[1]]] = array[b.table]
    bigger.lengths[:] = cache.lengths
    return bigger


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "kv", [name for name, s in SCHEMES.items() if s.quantized and unsupported(s, 64) is None]
)
def test_pages_to_plain_arrays_and_back_are_the_same_bytes(kv, dim, seed):
    scheme = SCHEMES[kv]
    given = np.random.default_rng(seed).integers(0, 256, (3, 4, page_bytes(scheme, dim)), dtype=np.uint8)
    row = pages.from_pages(given, scheme, dim)
    config = Config.from_dict({**CONFIG, "head_dim": dim, "num_attention_heads": 3, "num_key_value_heads": 3})
    shapes = row_layout(config, scheme, 256 + scheme.keep)
    assert {name: (array.shape, array.dtype) for name, array in row.items()} == {name: shapes[name] for name in row}
    np.testing.assert_array_equal(pages.to_pages(row, scheme), given)


@pytest.mark.skipif(simt.missing() is not None, reason=str(simt.missing()))
@pytest.mark.parametrize("kv", ["int2", "bf16", "plain-64-64", "plain-128-128"])
def test_what_one_back_end_saved_the_other_goes_on_with(tmp_path, kv, monkeypatch, seed, windows):
    """The CUDA back end on the simulator: its pages become a file that the CPU reads, and the other way round, bit for
    bit."""
    folder = write_model(tmp_path / "m", 4, head_dim=64, num_hidden_layers=1)
    ids = np.random.default_rng(seed).integers(0, 160, 300).tolist()
    here = load(folder, kv)
    monkeypatch.setenv("MINIOSCAR_BACKEND", "tests.simt.backend:Simt")
    there = load(folder, kv, "auto")
    assert there.ops.name == "simt"
    for source, target in ((here, there), (there, here)):
        cache = source.prefill(ids)
        cache.save(tmp_path / "c.safetensors")
        loaded = target.load_cache(tmp_path / "c.safetensors")
        kept = Cache(target.config, target.scheme, 1, 512, target.ops)
        loaded.fill(kept, 0, 300)
        assert all(np.array_equal(kept.export_row(0)[0][name], array) for name, array in cache.rows[0].items())
    a, b = (
        e.generate([3, 1, 4], cache=e.load_cache(tmp_path / "c.safetensors"), max_tokens=1, logprobs=5)
        for e in (here, there)
    )
    assert a.prefilled_tokens == b.prefilled_tokens == 3
    # float32 here, BF16 there
    assert a.logprobs[0].top[0].logprob == pytest.approx(b.logprobs[0].top[0].logprob, abs=0.1)


# --- going on


def bits(result) -> tuple:
    return result.token_ids, [entry.logprob for entry in result.logprobs]


@pytest.mark.parametrize("kv", ["bf16", "oscar", "int2", "int2-compact", "quarot"])
@pytest.mark.parametrize("repeats", [1, 2, 8, 20])
def test_generation_from_a_file_is_generation_without_interruption(folder, tmp_path, kv, repeats):
    """Bit for bit, log-probabilities included: from the cache in memory, from the file, and from the text itself."""
    engine, options = talker(folder, kv), {
        "max_tokens": 140, "logprobs": 1, "sampling": Sampling(temperature=0.8, seed=2)
    }
    straight = engine.generate(TEXT * repeats, chat=False, **options)
    cache = engine.prefill(TEXT * repeats, chat=False)
    cache.save(tmp_path / "c.kv.safetensors")
    file = tmp_path / "c.kv.safetensors"
    for found in (cache, engine.load_cache(file), talker(folder, kv).load_cache(file)):
        result = found.engine.generate("", cache=found, **options)
        assert bits(result) == bits(straight) and result.prefilled_tokens == 0
    more, loaded = (
        engine.generate("And so? ", cache=c, **options)
        for c in (cache, engine.load_cache(tmp_path / "c.kv.safetensors"))
    )
    assert bits(more) == bits(loaded)
    assert more.prompt_tokens == len(engine.encode(TEXT * repeats + "And so? ", chat=False))


def test_a_document_goes_on_in_the_users_message_and_only_the_question_is_read(engine):
    document = TEXT * 10
    cache = engine.prefill(document)
    question = "Where is the cat?"
    whole = engine.encode([{"role": "user", "content": f"{document}\n\n{question}"}])
    result = engine.generate(question, cache=cache, max_tokens=4)
    assert result.prompt_tokens == len(whole)
    assert result.prefilled_tokens == len(whole) - len(cache) < 40
    assert whole[: len(cache)] == cache.ids


def test_a_batch_goes_on_from_one_document(engine):
    cache, questions = engine.prefill(TEXT * 5), ["the cat", "the dog saw that", "a"]
    together = engine.generate(questions, cache=cache, max_tokens=10)
    for question, result in zip(questions, together, strict=True):
        assert result.token_ids == engine.generate(question, cache=cache, max_tokens=10).token_ids
    run = engine.start(questions[:2], cache=cache, options=Options(max_tokens=10, n=2))
    list(run)
    assert [r.token_ids for r in run.results] == [together[i].token_ids for i in (0, 0, 1, 1)]


@pytest.mark.parametrize("kv", ["bf16", "int2", "oscar"])
@pytest.mark.parametrize("shared", [0, 1, 100, 128, 200, 255, 256, 270, 299, 300])
def test_a_prompt_that_parts_from_the_document_uses_what_they_share(folder, kv, shared, seed):
    """Whatever the place: blocks and window before the cut serve, the rest is fed, and that is all that can be told of
    the history."""
    engine = talker(folder, kv)
    ids = np.random.default_rng(seed).integers(4, 320, 300).tolist()
    other = [*ids[:shared], *([4] if shared < 300 and ids[shared] != 4 else [5]), 7, 8]
    kept, cut, straight = (Cache(engine.config, engine.scheme, 1, 384, engine.ops) for _ in range(3))
    engine.prefill(ids).fill(kept, 0, common(other, ids))
    held = int(kept.lengths[0])
    packed = {"bf16": 0, "oscar": shared // 128 * 128, "int2": max(shared // 64 * 64 - 64, 0)}[kv]
    assert held == (shared if kv == "bf16" or shared >= 256 else packed)
    engine.model.forward(np.array(ids), cut, cut.batch_for([0], [300]))
    assert cut.truncate(0, shared) == held
    if held:
        read = held if held == shared else held + engine.scheme.keep
        engine.model.forward(np.array(ids[:read]), straight, straight.batch_for([0], [read]))
        if held < shared:
            straight.restore(0, read, engine.scheme.ring + 1)  # nothing but what is packed
    rest = np.array(other[held:])
    got, again, want = (engine.model.forward(rest, c, c.batch_for([0], [len(rest)])) for c in (kept, cut, straight))
    np.testing.assert_array_equal(got, again)
    assert relative(got, want) < 0.03  # float32 sums in another order, and the codes that they tip


def test_only_what_is_read_counts_as_work(engine, monkeypatch):
    """A document that fits because it need not be read again."""
    cache = engine.prefill(TEXT * 30)
    cost = memory.needed(engine.config, engine.scheme, engine.ops, 1, len(cache) + 40, 40)
    assert cost.total < memory.needed(engine.config, engine.scheme, engine.ops, 1, len(cache) + 40).total
    monkeypatch.setattr(engine.ops, "free_bytes", lambda: cost.total)
    assert engine.generate("the cat", cache=cache, max_tokens=4).new_tokens <= 4
    with pytest.raises(UserError, match="needs .* but .* are free"):
        engine.generate(TEXT * 30 + "the cat", max_tokens=4)


def test_the_weights_are_hashed_once(folder, file, monkeypatch):
    hashed, digest = [], WeightFiles._digest
    monkeypatch.setattr(WeightFiles, "_digest", lambda files, path: hashed.append(path) or digest(files, path))
    loaded = module.load(folder, device="cpu", cache=file)
    loaded.load_cache(file)
    assert len(hashed) == 1


def test_ids_go_on_with_ids(tmp_path):
    engine = load(write_model(tmp_path / "m", 3))
    cache = engine.prefill([1, 2, 3, 4])
    assert engine.generate(
        [5, 6], cache=cache, max_tokens=6
    ).token_ids == engine.generate([1, 2, 3, 4, 5, 6], max_tokens=6).token_ids
    with pytest.raises(UserError, match="token ids without their text"):
        engine.generate("text", cache=cache)


def test_a_cache_of_another_engine_is_refused(folder, engine):
    with pytest.raises(UserError, match="belongs to another loaded model"):
        talker(folder).generate("x", cache=engine.prefill("a"))


def test_common_and_continued():
    assert [
        common(a, b) for a, b in (([], [1]), ([1, 2], [1, 3]), ([1, 2], [1, 2, 3]), ([1, 2], [1, 2]))
    ] == [0, 1, 2, 2]
    document = [{"role": "user", "content": "D"}]
    assert continued(document, "q") == [{"role": "user", "content": "D\n\nq"}] and continued(document, "") == document
    answered = [*document, {"role": "assistant", "content": "A"}]
    assert continued(answered, "q") == [*answered, {"role": "user", "content": "q"}]


# --- files


@pytest.fixture
def file(engine, tmp_path) -> Path:
    engine.prefill(TEXT * 8).save(tmp_path / "c.kv.safetensors")
    return tmp_path / "c.kv.safetensors"


def test_a_file_holds_what_was_in_memory(engine, file):
    cache, loaded = engine.prefill(TEXT * 8), engine.load_cache(file)
    assert (loaded.ids, loaded.messages, loaded.text) == (cache.ids, cache.messages, cache.text)
    np.testing.assert_array_equal(loaded.logits, cache.logits)
    for a, b in zip(cache.rows, loaded.rows, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name].view(np.uint8), b[name].view(np.uint8)) for name in a)
    assert file.stat().st_size < cache.nbytes + 40_000
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_2_bit_file_is_more_than_five_times_smaller_than_one_in_bf16(tmp_path):
    folder, ids, sizes = write_talker(
        tmp_path / "m", 5, max_position_embeddings=16384, num_key_value_heads=4
    ), [5] * 12_800, {}
    for kv in ("bf16", "int2", "int2-compact"):
        one, path = talker(folder, kv), tmp_path / f"{kv}.safetensors"
        shapes = row_layout(one.config, one.scheme, len(ids))
        PromptCache(one, ids, [{name: np.zeros(*of) for name, of in shapes.items()}] * one.config.num_layers).save(path)
        assert one.load_cache(path).ids == ids
        sizes[kv] = path.stat().st_size
    assert sizes["bf16"] / sizes["int2"] > 5 and sizes["bf16"] / sizes["int2-compact"] > 5.8


def rewritten(file: Path, edit) -> None:
    """The file with other tensors or metadata; its digest is made to fit."""
    with safe_open(file, "np") as handle:
        metadata = dict(handle.metadata())
    tensors = load_file(file)
    edit(tensors, metadata)
    if metadata.get("contents") == "fit":
        metadata["contents"] = digest(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file, metadata)


def put(key: str, **changes):
    """Changes fields of a JSON object in the metadata."""
    def edit(tensors, metadata):
        metadata[key] = json.dumps({**json.loads(metadata[key]), **changes})

    return edit


def tensor(name: str, change):
    def edit(tensors, metadata):
        tensors[name], metadata["contents"] = change(tensors[name]), "fit"

    return edit


def nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[3] = np.nan
    return array


HARM = {
    "version": (lambda t, m: m.update(version="0"), "has version '0' of the format, this minioscar reads '1'"),
    "not ours": (lambda t, m: m.clear(), "not a prompt cache of minioscar"),
    "scheme": (put("scheme", name="oscar"), "was made with --kv oscar, not int2; use --kv oscar"),
    "unknown scheme": (put("scheme", name="int1"), "--kv 'int1', which this minioscar does not have"),
    "scheme no name": (put("scheme", name={}), "was made with --kv {}, which"),
    "scheme field": (put("scheme", shrink=0.8), "another scheme: shrink 0.8 there, 0.9 here"),
    "newer scheme": (put("scheme", extra=1), "another scheme: extra 1 there, \"nothing\" here"),
    "window": (put("scheme", window=128), "another scheme: window 128 there, 64 here"),
    "kept": (put("scheme", keep=0), "another scheme: keep 0 there, 64 here"),
    "config": (put("config", num_layers=3), "another config: num_layers 3 there, 2 here"),
    "head layout": (put("config", head_dim=128), "another config: head_dim 128 there, 64 here"),
    "rope": (
        lambda t, m: m.update(config=m["config"].replace("10000.0", "5e5")),
        "config: rope.theta 500000.0 there, 10000.0 here",
    ),
    "no config": (lambda t, m: m.pop("config"), "does not say which config"),
    "config no JSON": (lambda t, m: m.update(config="{"), "does not say which config"),
    "config too deep": (lambda t, m: m.update(config="[" * 100_000), "does not say which config"),
    "weights": (lambda t, m: m.update(weights="0" * 64), "made with other weights (SHA-256 000000000000"),
    "missing tensor": (lambda t, m: t.pop("layers.1.norms"), "tensor layers.1.norms is missing"),
    "extra tensor": (lambda t, m: t.update(extra=np.zeros(3)), "tensor extra is missing or has no place"),
    "no ids": (lambda t, m: t.pop("ids"), "it holds 0 tokens"),
    "no prompt": (lambda t, m: t.pop("prompt"), "prompt"),
    "other length": (tensor("ids", lambda x: x[:-1]), "has shape"),
    "ids of another shape": (tensor("ids", lambda x: x[None]), "damaged"),
    "ids of another type": (tensor("ids", lambda x: x.astype(np.int64)), "tensor ids is int64, not int32"),
    "ids out of range": (tensor("ids", lambda x: x + 300), "token ids outside 0 ... 319"),
    "codes of another type": (tensor("layers.0.key_codes", lambda x: x.astype(np.int8)), "is int8, not uint8"),
    "a NaN": (tensor("layers.1.key_step", nan), "layers.1.key_step holds a NaN"),
    "an infinite logit": (tensor("logits", lambda x: x * np.float32(np.inf)), "logits holds a NaN or an infinity"),
    "other bytes": (lambda t, m: t["layers.0.value_codes"].__ixor__(1), "digest of its tensors"),
    "prompt no JSON": (tensor("prompt", lambda x: x[:-1]), "prompt is not readable"),
    "prompt no messages": (
        tensor("prompt", lambda x: np.frombuffer(b'{"messages": [1], "text": null}', np.uint8)), "prompt is not"
    ),
}


@pytest.mark.parametrize("case", HARM)
def test_a_file_that_is_not_this_models_or_is_damaged_is_refused_by_name(engine, file, case):
    harm, message = HARM[case]
    rewritten(file, harm)
    with pytest.raises(UserError) as error:
        engine.load_cache(file)
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def without(key: str, *names: str, **changes):
    """The metadata of a version that did not have these fields, and had others."""
    def edit(tensors, metadata):
        fields = json.loads(metadata[key])
        metadata[key] = json.dumps({name: value for name, value in fields.items() if name not in names} | changes)

    return edit


def test_a_file_of_version_0_1_is_read(folder, tmp_path):
    """Its Config had no window and no mlp_bias, its Scheme codebook and outliers, and nothing was kept in a window."""
    engine, file = talker(folder, "oscar"), tmp_path / "c.kv.safetensors"
    engine.prefill(TEXT * 8).save(file)
    new = engine.load_cache(file)
    rewritten(file, without("config", "window", "mlp_bias"))
    rewritten(file, without("scheme", "keep", codebook=False, outliers=0))
    old = engine.load_cache(file)
    assert old.ids == new.ids
    assert engine.generate("a", cache=old, max_tokens=3).text == engine.generate("a", cache=new, max_tokens=3).text


def test_a_sliding_window_of_version_0_1_was_the_positions(tmp_path):
    engine = talker(write_talker(tmp_path / "m", 1, model_type="mistral", sliding_window=512))
    engine.prefill("a b c").save(tmp_path / "c")
    rewritten(tmp_path / "c", without("config", "window", "mlp_bias", max_positions=512))
    assert len(engine.load_cache(tmp_path / "c"))
    rewritten(tmp_path / "c", without("config", max_positions=1024))
    with pytest.raises(UserError, match="max_positions 1024 there, 512 here"):
        engine.load_cache(tmp_path / "c")


@pytest.mark.parametrize(("flush", "keep"), [(128, 0), (128, 128), (64, 0)])
def test_a_file_made_under_another_definition_of_its_scheme_is_refused(folder, file, flush, keep, monkeypatch):
    """Its window would be read as other tokens."""
    monkeypatch.setitem(SCHEMES, "int2", replace(SCHEMES["int2"], flush=flush, keep=keep))
    engine = talker(folder)
    with pytest.raises(UserError, match=f"made with another scheme: keep 64 there, {keep} here; make it again"):
        engine.load_cache(file)
    engine.prefill("the cat sat").save(file)
    assert len(engine.load_cache(file)) == len(engine.prefill("the cat sat"))


def test_bits_of_both_are_those_of_keys_and_of_values(engine, file):
    """As Scheme had them before each had a number of its own."""
    bits = engine.scheme.key_bits
    rewritten(file, without("scheme", "key_bits", "value_bits", bits=bits))
    assert len(engine.load_cache(file))
    rewritten(file, without("scheme", bits=bits + 1))
    with pytest.raises(UserError, match=f"key_bits {bits + 1} there, {bits} here"):
        engine.load_cache(file)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, 1.0])
@pytest.mark.parametrize("key", ["config", "scheme"])
def test_a_field_of_another_version_that_changes_nothing_is_no_difference(engine, file, key, value):
    rewritten(file, without(key, new=value))
    engine.load_cache(file)


@pytest.mark.parametrize("edit", [
    without("scheme", outliers=2), without("scheme", codebook=True), without("scheme", new=1),
    without("config", new="half"),
    without("config", new=[0]), without("config", new=0.5), without("scheme", "key_bits"), without("scheme", "rotate"),
    without("scheme", "shrink"), without("config", "rope"), without("config", "num_layers"),
    without("scheme", rotate=None),
])
def test_a_field_of_another_version_that_changes_something_is_one(engine, file, edit):
    rewritten(file, edit)
    with pytest.raises(UserError, match="was made with another"):
        engine.load_cache(file)


@pytest.mark.parametrize(
    "harm", [lambda b: b"", lambda b: b[:7], lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"\xff" * 100]
)
def test_half_a_file_is_refused(engine, file, harm):
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        engine.load_cache(file)


def test_other_weights_are_refused_before_any_are_read(folder, engine, file, tmp_path, monkeypatch):
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors")
    monkeypatch.setattr(module, "load_weights", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match="made with other weights"):
        module.load(other, device="cpu", cache=file)


def test_the_same_model_in_another_folder_is_the_same_model(folder, file, tmp_path):
    copy = talker(shutil.copytree(folder, tmp_path / "copy"))
    assert copy.load_cache(file).engine is copy


def test_a_file_that_cannot_be_written_is_one_line(engine, tmp_path):
    cache = engine.prefill("a")
    weights, config = engine.folder / "model.safetensors", engine.folder / "config.json"
    for path, message in (
        (tmp_path, "is a folder"), (tmp_path / "no" / "c", "there is no folder"), ("/dev/null", "is a device"),
        (weights, "would be lost"),
        (config, "would be lost"),
    ):
        with pytest.raises(UserError, match=message):
            cache.save(path)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(engine, file, monkeypatch):
    before = file.read_bytes()

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", half)
    with pytest.raises(Exception, match="No space left on device"):
        engine.prefill("a").save(file)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


# --- the command line


def test_cache_and_generate_on_the_command_line(folder, tmp_path, capsys):
    (tmp_path / "doc.txt").write_text(TEXT * 8)
    out, device = tmp_path / "doc.kv.safetensors", ["--device", "cpu"]
    assert main(
        ["cache", str(folder), "--prompt-file", str(tmp_path / "doc.txt"), "--out", str(out), "--kv", "oscar", *device]
    ) == 0
    printed, said = capsys.readouterr()
    assert printed == f"{out}\n" and "oscar" in said and "less cache than in bf16" in said
    base = ["generate", str(folder), "Who?", "--cache", str(out), "--device", "cpu", "--max-tokens", "5"]
    assert main([*base, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kv"] == "oscar"  # the scheme of the file is the default
    engine = talker(folder, "oscar")
    assert result["token_ids"] == engine.generate("Who?", cache=engine.load_cache(out), max_tokens=5).token_ids
    assert main(base) == 0
    assert "more from the cache" in capsys.readouterr().err
    for extra, message in (
        (["--kv", "int2"], "was made with --kv oscar, not int2"),
        (["--raw"], "decided when the prompt cache was made"),
        (["--ctx", "20"], "context holds 20"),
    ):
        assert main([*base, *extra]) == 2
        printed, said = capsys.readouterr()
        assert printed == "" and said.startswith("minioscar: ") and said.count("\n") == 1 and message in said


def test_lines_of_a_prompts_file_go_on_from_a_cache_or_say_why_not(folder, tmp_path, capsys):
    """Messages are a whole chat: they repeat the document, or they would be answered as if it had not been given."""
    document, out = TEXT * 8, str(tmp_path / "c.safetensors")
    talker(folder).prefill(document).save(out)
    behind = [{"role": "user", "content": f"{document}\n\nWho?"}]
    lines = ["Who?", {"prompt": "Who?"}, {"messages": behind}, {"messages": [{"role": "user", "content": "Who?"}]}]
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, lines)))
    options = ["--prompts-file", str(tmp_path / "lines"), "--cache", out, "--device", "cpu", "--max-tokens", "3"]
    assert main(["generate", str(folder), *options]) == 2
    *answers, wrong = map(json.loads, capsys.readouterr().out.splitlines())
    want = talker(folder).generate(behind, max_tokens=3)
    assert [answer["prompt_tokens"] for answer in answers] == [want.prompt_tokens] * 3
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 1
    assert wrong["line"] == 4 and "do not begin with those of the prompt cache" in wrong["error"]


def test_a_raw_cache_without_a_prompt_goes_on_where_the_text_ends(folder, tmp_path, capsys):
    (tmp_path / "doc.txt").write_text("the cat sat")
    out = str(tmp_path / "c.safetensors")
    options = ["--prompt-file", str(tmp_path / "doc.txt"), "--device", "cpu"]
    assert main(["cache", str(folder), *options, "--out", out, "--raw", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"file", "tokens", "kv", "kv_bytes", "file_bytes", "bf16_bytes", "device", "prefill_s"}
    assert main(["generate", str(folder), *options, "--raw", "--max-tokens", "9"]) == 0
    straight = capsys.readouterr().out
    assert main(["generate", str(folder), "--cache", out, "--device", "cpu", "--max-tokens", "9"]) == 0
    assert capsys.readouterr().out == straight


def test_everything_that_cannot_work_is_said_before_the_model_is_loaded(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "load_weights", lambda *_: pytest.fail("the weights were read"))
    (tmp_path / "doc.txt").write_text("the cat")
    (tmp_path / "empty.txt").write_text("")
    doc, model = str(tmp_path / "doc.txt"), str(folder)
    for argv, message in (
        (["cache", model, "--prompt-file", doc, "--out", str(tmp_path / "no" / "c")], "there is no folder"),
        (["cache", model, "--prompt-file", doc, "--out", str(tmp_path)], "is a folder"),
        (["cache", model, "--prompt-file", str(tmp_path / "empty.txt"), "--out", "c"], "is empty"),
        (["cache", model, "--prompt-file", doc], "--out"),
        (
            ["generate", model, "x", "--cache", str(tmp_path / "none")],
            "does not exist; make it with: python -m minioscar cache"
        ),
        (["generate", model, "x", "--cache", str(folder / "model.safetensors")], "not a prompt cache of minioscar"),
        (["chat", model, "--cache", doc], "not a safetensors file"),
    ):
        assert main(argv) == 2, argv
        printed, said = capsys.readouterr()
        assert printed == "" and said.startswith("minioscar: ") and said.count("\n") == 1 and message in said


def test_a_cache_goes_through_standard_output_and_is_read_from_a_file_alone(folder, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t").write_bytes("\ufeffthe cat\r\nsat".encode("utf-16-le"))
    make = ["cache", str(folder), "--prompt-file", "~/t", "--device", "cpu", "--out"]
    assert main([*make, "~/c"]) == 0
    assert capfdbinary.readouterr().out == f"{tmp_path}/c\n".encode()
    assert main([*make, "-"]) == 0
    out, err = capfdbinary.readouterr()
    (tmp_path / "d").write_bytes(out)  # safetensors puts the metadata of its header in any order
    assert len(out) == (tmp_path / "c").stat().st_size and b"tokens in" in err
    engine = talker(folder)
    for name in ("~/c", "~/d"):
        assert engine.load_cache(name).messages[0]["content"] == "the cat\nsat"
    for wrong, message in (
        ([*make, "-", "--json"], b"leave --json out"),
        ([*make, str(tmp_path / "t")], b"what this is made from"),
        ([*make, f"{folder}/tokenizer.json"], b"what this is made from"),
        *(
            (["generate", str(folder), "x", "--cache", at], message)
            for at, message in (("-", b"standard input"), (".", b"is a folder"))
        ),
        (["chat", str(folder), "--cache", "/dev/null"], b"is a device"),
    ):
        assert main(wrong) == 2
        out, err = capfdbinary.readouterr()
        assert out == b"" and err.count(b"\n") == 1 and message in err, wrong
