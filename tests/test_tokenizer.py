"""Text <-> ids, streaming text, stop tokens and chat templates, hostile ones included."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from minioscar import chat_template
from minioscar.detokenizer import BYTES, Detokenizer
from minioscar.errors import ChatTemplateError, UserError, said
from minioscar.storage import hub
from minioscar.tokenizer import Tokenizer

from .patience import at_most

TEXT = "The café costs 12 €. 日本語のテキスト, Привет мир! नमस्ते 👩‍👩‍👧 🇯🇵 e\u0301 \u200f مرحبا\n\n  two  spaces\ttab"
SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level() -> Library:
    """Like GPT-2, Llama 3, Qwen: tokens are bytes and merges of bytes, across the borders of characters too."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([TEXT] * 3, trainer)
    # outside and inside the byte alphabet
    library.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "é€", "ÿÿ")])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def sentencepiece() -> Library:
    """Like Llama 2 and Mistral: a space is a ▁ before the word, one is added in front, unknown characters are byte
    tokens."""
    words = ["▁", "▁The", "▁caf", "é", "▁two", "▁spaces", "日", "本", "e", "s", "t", "a", ".", ","]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    library = Library(
        models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    library.add_tokens([AddedToken("<tool>", normalized=False)])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def metaspace() -> Library:
    """The same vocabulary as newer files write it: Metaspace as pre-tokenizer and decoder."""
    library = sentencepiece()
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    library.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    return library


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


def save(folder: Path, library: Library, **files: Any) -> Path:
    """A model folder; files: name without .json -> content."""
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save(tmp_path_factory.mktemp(request.param), KINDS[request.param]()))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.add(i) for i in ids), stream.flush()]


# --- streaming


@settings(max_examples=300, deadline=None, print_blob=True)
@given(data=st.data())
def test_streamed_pieces_together_are_decode_of_any_ids(tiny, data):
    size = tiny._tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=40))  # + 3: a vocabulary padded beyond the last token
    assert "".join(streamed(tiny, ids)) == tiny.decode(ids)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(data=st.data())
def test_streamed_bytes_are_decode_whether_or_not_they_are_utf8(tiny, data):
    """Any bytes as byte tokens: random, or text cut anywhere; between them words, specials and added tokens."""
    raw = data.draw(
        st.one_of(st.binary(max_size=12), st.text(max_size=8).map(lambda s: s.encode("utf-8", "replace")[1:]))
    )
    of_byte = {byte: c for c, byte in BYTES.items()}
    names = [
        of_byte[b] if tiny.encode("a")[0] < 256 and tiny._tokenizer.token_to_id("<0x00>") is None else f"<0x{b:02X}>"
        for b in raw
    ]
    ids = [i for i in (tiny._tokenizer.token_to_id(name) for name in names) if i is not None]
    for _ in range(data.draw(st.integers(0, 3))):
        ids.insert(
            data.draw(st.integers(0, len(ids))), data.draw(st.sampled_from([1, 2, *tiny.encode("The café <think> ")]))
        )
    assert "".join(streamed(tiny, ids)) == tiny.decode(ids)


SPECIAL = st.lists(st.sampled_from([*TEXT, "👩‍👩‍👧", "🇯🇵", " ", "  "]), max_size=30).map("".join)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(text=st.one_of(st.text(max_size=30), SPECIAL))
def test_no_piece_of_a_text_holds_half_a_character(tiny, text):
    ids = [i for i in tiny.encode(text.replace("▁", "_")) if i > 2]
    pieces = streamed(tiny, ids)
    assert "".join(pieces) == tiny.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_comes_back_as_it_was(tiny):
    text = TEXT if tiny.encode(TEXT) else ""
    assert tiny.decode(tiny.encode(text)) == "".join(streamed(tiny, tiny.encode(text))) == text


def test_a_character_appears_with_its_last_byte_and_not_before(tmp_path):
    library = byte_level()
    one = Tokenizer(save(tmp_path, library))
    of_byte = {byte: c for c, byte in BYTES.items()}
    ids = [library.token_to_id(of_byte[b]) for b in "a👩é".encode()]
    assert streamed(one, ids) == ["a", "", "", "", "👩", "", "é", ""]
    assert streamed(one, ids[:3]) == ["a", "", "", "\ufffd"]


def test_words_appear_with_their_token_and_only_the_first_loses_its_space(tmp_path):
    for kind in (sentencepiece, metaspace):
        library = kind()
        one = Tokenizer(save(tmp_path, library))
        ids = [1, *(library.token_to_id(t) for t in ("▁The", "▁caf", "é", "<0xE2>", "<0x82>", "<0xAC>", "▁two")), 2]
        assert streamed(one, ids) == ["", "The", " caf", "é", "", "", "", "€ two", "", ""]


def test_special_tokens_print_nothing_and_added_tokens_print_themselves(tiny):
    added = "<think>" if tiny.encode("<think>")[0] > 258 else "<tool>"
    ids = [1, *tiny.encode(f"a{added}"), 2]
    assert tiny.decode(ids) == "".join(streamed(tiny, ids)) == f"a{added}"


def test_added_tokens_in_and_outside_the_byte_alphabet_stream_as_they_decode(tmp_path):
    library = byte_level()
    one = Tokenizer(save(tmp_path, library))
    for token in ("é€", "ÿÿ"):  # the decoder takes the letters of the second for bytes
        ids = [*one.encode("a"), library.token_to_id(token), *one.encode("b")]
        assert "".join(streamed(one, ids)) == one.decode(ids)


def test_a_token_costs_the_same_however_long_the_text_before_it_is(tiny):
    """Neither the whole answer nor a whole prompt is decoded again: the steps hold a few bytes, a prompt is read from
    its end."""
    asked = 0

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny._tokenizer, name)

        def id_to_token(self, token_id: int) -> str | None:
            nonlocal asked
            asked += 1
            return tiny._tokenizer.id_to_token(token_id)

    ids = tiny.encode("two spaces 日本 " * 400)
    stream = Detokenizer(Counting(), frozenset(), ids)
    assert len(ids) > 2000 and asked < 200
    for i in ids:
        stream.add(i)
    assert asked <= len(ids) + 200
    assert sum(len(str(vars(step))) for step in stream._steps) < 2000


# --- files


def test_encode_adds_special_tokens_only_when_asked(tiny):
    plain = tiny.encode("two")
    assert tiny.encode("two", add_special_tokens=True) == tiny.prompt_ids("two") == [1, *plain]


def test_text_that_cannot_be_encoded_is_one_line(tmp_path):
    library = Library(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    one = Tokenizer(save(tmp_path, library))
    assert one.encode("a") == [0]
    with pytest.raises(UserError, match="cannot encode this text .*UNK"):
        one.encode("b")
    with pytest.raises(UserError, match="not valid Unicode"):
        one.encode(b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_truncation_and_padding_left_in_a_file_are_ignored(tmp_path):
    library = byte_level()
    library.enable_truncation(4)
    library.enable_padding(length=64)
    assert Tokenizer(save(tmp_path, library)).encode("abcdefgh") == byte_level().encode(
        "abcdefgh", add_special_tokens=False
    ).ids


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (dict(generation_config={"eos_token_id": [2, 7]}, config={"eos_token_id": 5}), {2, 5, 7}),
        (dict(generation_config={"eos_token_id": 0}, config={"eos_token_id": [5, 6]}), {0, 5, 6}),
        (dict(config={"text_config": {"eos_token_id": [5]}}), {5}),
        (dict(config={"eos_token_id": 7}, tokenizer_config={"eos_token": "</s>"}), {2, 7}),
        (
            dict(config={"eos_token_id": 7}, tokenizer_config={"eos_token": {"content": "</s>", "lstrip": False}}),
            {2, 7}
        ),
        (dict(config={"eos_token_id": 7}, special_tokens_map={"eos_token": {"content": "</s>"}}), {2, 7}),
        (dict(tokenizer_config={"eos_token": "<s>"}, special_tokens_map={"eos_token": "</s>"}), {1, 2}),
        (
            dict(tokenizer_config={"eos_token": "<s>", "eot_token": "</s>"}, generation_config={"eos_token_id": None}),
            {1, 2}
        ),
        (
            dict(generation_config={"eos_token_id": [-1, 99999, 2]}, config={"eos_token_id": 350, "vocab_size": 350}),
            {2}
        ),
        (dict(generation_config={"eos_token_id": "x"}, config={"eos_token_id": True}), set()),
        ({}, set()),
    ],
)
def test_an_answer_ends_at_the_end_tokens_of_all_files_together(tmp_path, files, wanted):
    assert Tokenizer(save(tmp_path, byte_level(), **files)).eos_ids == wanted


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (dict(tokenizer_config={"bos_token": "<s>"}, config={"bos_token_id": 9}), 1),
        (dict(tokenizer_config={"bos_token": None}, config={"bos_token_id": 9}), 9),
        ({}, None),
    ],
)
def test_bos_is_the_tokenizers_else_the_models(tmp_path, files, wanted):
    assert Tokenizer(save(tmp_path, byte_level(), **files)).bos_id == wanted


def test_a_token_that_is_half_a_character_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer_config.json: the token '.ud800' is not valid Unicode"):
        Tokenizer(save(tmp_path, byte_level(), tokenizer_config={"eos_token": "\ud800"}))


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"model": {"type": "Nonsense"}}', b"\xff\xfe", b'{"version": "1.0"']
)
def test_a_corrupt_tokenizer_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json: not a readable tokenizer") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["tokenizer_config", "generation_config", "config", "chat_template", "special_tokens_map", "added_tokens"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_corrupt_side_file_is_one_line_that_names_it(tmp_path, name, content):
    save(tmp_path, byte_level())
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.json") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


# --- added tokens


TWO = {"<|a|>": 280, "<|b|>": 281}
FLAGS = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)


def plain(size: int = 280) -> Library:
    """Byte-level, without a token of its own but <s>."""
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(
        ["the cat sat on the mat, and the dog saw that the cat sat there, hello world"] * 3, trainer
    )
    assert library.get_vocab_size() == size
    return library


def decoder_of(**tokens: Any) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(i): {"content": text, **FLAGS} for text, i in TWO.items()} | tokens}


HOMES = {
    "tokenizer_config": dict(tokenizer_config=decoder_of()),
    "added_tokens": dict(
        added_tokens=TWO, special_tokens_map={"eos_token": "<|b|>", "additional_special_tokens": ["<|a|>"]}
    ),
    "both": dict(
        tokenizer_config={
            "added_tokens_decoder": {"280": {"content": "<|a|>", **FLAGS}}, "extra_special_tokens": ["<|b|>"]
        },
        added_tokens=TWO,
    ),
    "names": dict(special_tokens_map={"bos_token": "<|a|>", "eos_token": {"content": "<|b|>", "lstrip": False}}),
    "names_of_the_model": dict(tokenizer_config={"extra_special_tokens": {"a_token": "<|a|>", "b_token": "<|b|>"}}),
    "more_names": dict(tokenizer_config={"additional_special_tokens": ["<|a|>", {"content": "<|b|>"}]}),
    "order": dict(
        tokenizer_config={
            "added_tokens_decoder": {i: {"content": t, **FLAGS} for t, i in (("<|b|>", "281"), ("<|a|>", "280"))}
        }
    ),
}


@pytest.mark.parametrize("home", HOMES)
def test_added_tokens_are_known_by_their_ids_wherever_they_are_written(tmp_path, home):
    one = Tokenizer(save(tmp_path, plain(), **HOMES[home]))
    ids = one.encode("<|a|>hello<|b|>")
    assert (ids[0], ids[-1]) == (280, 281) and not {280, 281} & set(ids[1:-1])
    assert one.decode(ids) == "".join(streamed(one, ids)) == "hello"
    assert [
        one.special_id(text) for text in ("<|a|>", "<|b|>", "<|c|>", "hello", "a", "", "\ud800")
    ] == [280, 281, *[None] * 5]


def test_added_tokens_keep_their_flags(tmp_path):
    entries = {
        "280": {"content": "<t>", **FLAGS, "special": False},
        "281": {"content": "<l>", **FLAGS, "lstrip": True, "rstrip": True}
    }
    entries["282"] = {"content": "word", **FLAGS, "special": False, "single_word": True}
    config, more = {"added_tokens_decoder": entries}, {"<t>": 280, "<m>": 283}
    one = Tokenizer(save(tmp_path, plain(), tokenizer_config=config, added_tokens=more))
    assert one.decode(one.encode("a<t>b<m>")) == "a<t>b<m>" and one.special_id("<t>") is None
    assert one.encode("a  <l>  b") == [*one.encode("a"), 281, *one.encode("b")]
    assert one.encode("a word") == [*one.encode("a "), 282] and 282 not in one.encode("swords")


def test_flags_of_tokenizer_config_win_over_those_of_tokenizer_json_as_in_transformers(tmp_path):
    library = plain()
    library.add_tokens([AddedToken("<|a|>", normalized=False)])
    assert Tokenizer(save(tmp_path, library)).special_id("<|a|>") is None
    config = {"added_tokens_decoder": {"280": {"content": "<|a|>", **FLAGS, "lstrip": True}}}
    one = Tokenizer(save(tmp_path, library, tokenizer_config=config))
    assert one.special_id("<|a|>") == 280 and one.encode("x  <|a|>") == [*one.encode("x"), 280]


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "<|a|>"},
        {"additional_special_tokens": ["<|a|>"]},
        {"extra_special_tokens": {"a_token": "<|a|>"}},
        {"eos_token": "<|a|>", "added_tokens_decoder": {"280": {"content": "<|a|>", **FLAGS, "special": False}}},
        {"added_tokens_decoder": {"280": {"content": "<|a|>", **FLAGS}}},
    ],
)
def test_a_token_that_any_file_calls_special_is_no_text_as_in_transformers(tmp_path, config):
    library = plain()
    library.add_tokens([AddedToken("<|a|>", normalized=False)])
    one = Tokenizer(save(tmp_path, library, tokenizer_config=config))
    assert one.special_id("<|a|>") == 280 and one.decode([*one.encode("x"), 280]) == "x"


def test_a_special_token_that_is_only_named_has_the_flags_of_its_entry(tmp_path):
    entry = {"content": "<l>", **FLAGS, "lstrip": True, "rstrip": True}
    one = Tokenizer(save(tmp_path, plain(), special_tokens_map={"eos_token": entry}))
    assert one.encode("a  <l>  b") == [*one.encode("a"), 280, *one.encode("b")] and one.eos_ids == {280}


def test_a_text_that_tokenizer_json_has_keeps_its_id_as_in_transformers(tmp_path):
    one = Tokenizer(save(tmp_path, plain(), added_tokens={"<s>": 281, "<|b|>": 280}))
    assert (one.special_id("<s>"), one.encode("<|b|>")) == (0, [280])


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (dict(added_tokens={"<|a|>": 285}), r"'<\|a\|>' has id 285, .* the next free id is 280"),
        (
            dict(tokenizer_config=decoder_of(**{"283": {"content": "<c>"}})),
            "'<c>' has id 283, .* the next free id is 282"
        ),
        (
            dict(tokenizer_config={"added_tokens_decoder": {"0": {"content": "<c>"}}}),
            "'<c>' has id 0, .* that is '<s>'"
        ),
        (dict(tokenizer_config={"added_tokens_decoder": {"x": {"content": "<c>"}}}), "no token under 'x'"),
        (dict(tokenizer_config={"added_tokens_decoder": {"280": "<c>"}}), "no token under '280'"),
        (dict(tokenizer_config={"added_tokens_decoder": {"9" * 20: {"content": "<c>"}}}), "no token under '9{20}'"),
        (dict(added_tokens={"<c>": "280"}), "'<c>' has the id '280'"),
        (dict(added_tokens={"<c>": 10**20}), "'<c>' has the id 10{20}"),
        (dict(added_tokens={"<c>": 280, "<d>": 280}), "'<d>' has the id 280, as has '<c>'"),
    ],
)
def test_an_id_that_cannot_be_had_is_one_line_with_the_token(tmp_path, files, reason):
    with pytest.raises(UserError, match=reason):
        Tokenizer(save(tmp_path, plain(), **files))


# --- BOS and EOS around a plain text


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizerFast"}


@pytest.mark.parametrize(
    ("config", "in_file", "before", "after"),
    [
        (LLAMA | {"add_bos_token": True}, False, [1], []),
        (LLAMA | {"add_bos_token": False}, True, [], []),
        (LLAMA | {"add_eos_token": True}, True, [1], [2]),
        (LLAMA | {"add_bos_token": False, "add_eos_token": True}, True, [], [2]),
        (LLAMA, False, [1], []),
        ({"tokenizer_class": "GemmaTokenizer"}, False, [1], []),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, False, [], []),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": "</s>"}, True, [2], []),
        ({"tokenizer_class": "GPTNeoXTokenizerFast"}, True, [], []),
        (LLAMA | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, False, [], []),
        (LLAMA | {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}, True, [1], []),
        ({"bos_token": "<s>", "add_bos_token": True}, False, [], []),
        ({"bos_token": "<s>"}, True, [1], []),
    ],
)
@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_bos_and_eos_are_added_as_transformers_does_for_the_class(tmp_path, kind, config, in_file, before, after):
    library = kind()  # with <s> in tokenizer.json
    if not in_file:
        library.post_processor = processors.ByteLevel()
    one = Tokenizer(save(tmp_path, library, tokenizer_config=config))
    assert one.prompt_ids("two") == [*before, *one.encode("two"), *after]


def test_the_class_of_a_model_is_known_where_no_file_names_it(tmp_path):
    config = {"bos_token": "<s>", "add_bos_token": False}
    one = Tokenizer(save(tmp_path, byte_level(), tokenizer_config=config, config={"model_type": "llama"}))
    assert one.prompt_ids("two") == one.encode("two")


def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path):
    one = Tokenizer(save(tmp_path, byte_level(), tokenizer_config={"bos_token": "<s>"}))
    assert one.prompt_ids("<s>two") == one.prompt_ids("two")


def test_byte_order_marks_and_line_ends_of_files_are_no_content(tmp_path):
    one = Tokenizer(save(tmp_path, byte_level(), tokenizer_config={"eos_token": "</s>"}))
    (tmp_path / "tokenizer_config.json").write_bytes(
        b"\xef\xbb\xbf" + (tmp_path / "tokenizer_config.json").read_bytes()
    )
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfa\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc")
    one = Tokenizer(tmp_path)
    assert one.eos_ids == {2} and one.chat([]) == "a\nb\nc"
    (tmp_path / "chat_template.jinja").write_bytes("a\r\né".encode("utf-16"))
    assert Tokenizer(tmp_path).chat([]) == "a\né"
    library = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "tokenizer.json").write_text(library, encoding=encoding)
        assert Tokenizer(tmp_path).encode("a b") == one.encode("a b")
    (tmp_path / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="chat_template.jinja cannot be read as UTF-8 text"):
        Tokenizer(tmp_path)


# --- chat


MESSAGES = [{"role": "user", "content": "a <b> & 'c'"}]


def with_template(folder: Path, template: Any, **config: Any) -> Tokenizer:
    return Tokenizer(save(folder, byte_level(), tokenizer_config={"chat_template": template, **config}))


def test_the_template_sees_messages_special_tokens_and_the_generation_prompt(tmp_path):
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {% if true %}\n[{{ m['role'] }}] {{ m.content | trim }}\n    "
        "{% endif %}\n"
    )
    template += "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{{ eos_token }}{{ pad_token }}"
    one = with_template(tmp_path, template, bos_token="<s>", eos_token={"content": "</s>"})
    assert one.has_chat_template
    assert one.chat(MESSAGES) == "<s>[user] a <b> & 'c'\n[assistant]</s>"
    assert one.chat(MESSAGES, add_generation_prompt=False) == "<s>[user] a <b> & 'c'\n</s>"


def test_chat_prompts_get_no_second_bos(tmp_path):
    one = with_template(tmp_path, "{{ bos_token }}{{ messages[0].content }}", bos_token="<s>")
    assert one.encode(one.chat([{"role": "user", "content": "two"}])) == one.prompt_ids("two")


def test_what_templates_use_beyond_plain_jinja_is_there(tmp_path):
    template = (
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    template += "{{ messages[0] | tojson }}{{ ['é'] | tojson(indent=1) }}{{ tools is none }}"
    expected = '014{"role": "user", "content": "a <b> & \'c\'"}[\n "é"\n]True'
    assert with_template(tmp_path, template).chat(MESSAGES) == expected


def test_a_template_is_found_in_every_place_it_may_be(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert with_template(tmp_path, named).chat([]) == with_template(
        tmp_path, {"default": "default"}
    ).chat([]) == "default"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from json"}')
    assert Tokenizer(tmp_path).chat([]) == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja é", encoding="utf-8")
    assert Tokenizer(tmp_path).chat([]) == "from jinja é"


@pytest.mark.parametrize("template", [None, 7, [], [{"name": "tool_use", "template": "x"}], ["x"], {"tool_use": "x"}])
def test_without_a_template_the_way_out_is_one_that_the_caller_has(tmp_path, template):
    one = with_template(tmp_path, template)
    assert not one.has_chat_template
    with pytest.raises(
        ChatTemplateError, match=r"no chat template; use --raw \(in Python: generate\(..., chat=False\)\)"
    ) as caught:
        one.chat([{"role": "user", "content": "x"}])
    for command in ("generate", "cache"):
        assert said(caught.value, command).endswith("no chat template; use --raw")
    assert said(caught.value, "chat").endswith("no chat template; use generate --raw")


BAD = {
    "{% for %}": "Expected",
    "{{ raise_exception('roles must\nalternate') }}": "roles must alternate",
    "{{ messages[0].nothing.more }}": "no attribute",
    "{{ 1 / 0 }}": "division by zero",
    "{% include 'tokenizer.json' %}": "loader",
    "{{ messages | nofilter }}": "nofilter",
}
HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch broken-out') }}",
    "{% set _ = messages.append(1) %}",
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ (10 ** 10 * [1]) | length }}",
    "{{ 2 ** (10 ** 9) }}",
]


SHUT = [
    "{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ messages.__init__ }}", "{{ ''|attr('__class__') }}"
]
SHUT += [
    "{{ '{0.__class__}'.format(1) }}", "{{ strftime_now.__code__ }}",
    "{{ (messages|map(attribute='__class__')|list)[0] }}"
]


@pytest.mark.parametrize("template", BAD)
def test_a_template_that_fails_is_one_line_with_its_reason(tmp_path, template):
    with pytest.raises(UserError, match="the chat template failed") as caught:
        with_template(tmp_path, template).chat(MESSAGES)
    assert BAD[template] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_reaches_nothing_and_ends(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat_template, "MAX_CHAT", 1 << 20)
    one, before = with_template(tmp_path, template), sorted(tmp_path.iterdir())
    # Unbounded loops would not end at all
    with at_most(10), pytest.raises(UserError, match="the chat template failed") as caught:
        one.chat(MESSAGES)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    assert MESSAGES == [{"role": "user", "content": "a <b> & 'c'"}]


@pytest.mark.parametrize("template", SHUT)
def test_pythons_inner_attributes_look_empty_to_a_template(tmp_path, template):
    assert with_template(tmp_path, template).chat(MESSAGES) == ""


GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>{%- generation -%}\n{{ m.content }}{% for i in range(9) %}"
    "{% if i == 1 %}{% break %}{% endif %}!{% endfor %}{% endgeneration %}{% else %}<U>{{ m.content }}"
    "{% endif %}{% endfor %}"
)


def test_generation_tags_mean_nothing_here(tmp_path):
    roles = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert with_template(tmp_path, GENERATION).chat(roles) == "<U>a<A>b!<U>c"
    with pytest.raises(UserError, match="the chat template failed .*endgeneration"):
        with_template(tmp_path, "{% generation %}x").chat(roles)


def test_templates_know_every_named_special_token(tmp_path):
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
    template = "".join(f"{{{{ {name} }}}}" for name in named)
    template += "{{ boi_token }}{{ additional_special_tokens | join }}{{ documents is none }}"
    extra = {"extra_special_tokens": {"boi_token": {"content": "<boi>"}}, "additional_special_tokens": ["<x>", "<y>"]}
    one = with_template(tmp_path, template, **named, **extra)
    assert one.chat(MESSAGES) == "".join(named.values()) + "<boi><x><y>True"
    assert one.encode("<eos><boi><x>") == [one.special_id(text) for text in ("<eos>", "<boi>", "<x>")]


def test_arithmetic_is_pythons(tmp_path):
    template = "{{ 3 * 4 }} {{ '=' * 5 }} {{ 3 * '-' }} {{ 2 ** 10 }} {{ 2.5 * 2 }} {{ 2 ** -1 }} {{ [1] * 2 }}"
    assert with_template(tmp_path, template).chat(MESSAGES) == "12 ===== --- 1024 5.0 0.5 [1, 1]"


def test_tojson_has_the_options_of_transformers(tmp_path):
    template = "{{ {'b': 'é<', 'a': [1]} | tojson(separators=(',', ':'), sort_keys=true) }}{{ 'é' | tojson(true) }}"
    assert with_template(tmp_path, template).chat(MESSAGES) == '{"a":[1],"b":"é<"}"\\u00e9"'


def test_one_of_several_templates_is_chosen_by_its_name(tmp_path):
    named = [{"name": "default", "template": "usual"}, {"name": "rag", "template": "rag {{ k }}"}]
    one = with_template(tmp_path, named)
    assert one.chat(MESSAGES) == "usual"
    assert one.chat(MESSAGES, template={"chat_template": "rag", "k": 1}) == "rag 1"
    with pytest.raises(UserError, match="no chat template 'x'; it has: default, rag"):
        one.chat(MESSAGES, template={"chat_template": "x"})
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("from a folder")
    assert Tokenizer(tmp_path).chat(MESSAGES, template={"chat_template": "tool"}) == "from a folder"


def test_arguments_reach_the_template_and_only_those_that_it_has(tmp_path):
    one = with_template(
        tmp_path, "{{ messages[0].content }}{% if not (thinking is defined and thinking is false) %}<think>{% endif %}"
    )
    assert one.chat([{"role": "user", "content": "a"}]) == "a<think>"
    assert one.chat([{"role": "user", "content": "a"}], template={"thinking": False}) == "a"
    with pytest.raises(UserError, match="no variable 'thinkin' to set; it has: thinking$"):
        one.chat(MESSAGES, template={"thinkin": False})
    for name in ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "range"):
        with pytest.raises(UserError, match=f"'{name}' would overwrite"):
            one.chat(MESSAGES, template={name: []})


PARTS = [{"type": "text", "text": " one"}, {"type": "text", "text": "two "}]
LOOP = "{% for p in m.content %}[{{ p.text | trim }}]{% endfor %}"
FORMS = {
    "text": ("{{ m.content }}", "s", " one\ntwo "),
    "text_trimmed": ("{{ m.content | trim }}", "s", "one\ntwo"),
    "text_by_its_methods": ("{{ m.content.split('z')[0] + '' }}", "s", " one\ntwo "),
    "text_or_nothing": ("{% if m.content is string %}{{ m.content }}{% endif %}", "s", " one\ntwo "),
    "parts": (LOOP, "[s]", "[one][two]"),
    "parts_by_index": (
        "{% if m.content[0]['type'] == 'text' %}{{ m.content | map(attribute='text') | join }}{% endif %}", "s",
        " onetwo "
    ),
    "both": ("{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}", "s", "[one][two]"),
    "half": ("{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0] }}{% endif %}", "s", " one\ntwo "),
}


@pytest.mark.parametrize("form", FORMS)
def test_content_is_rendered_in_the_form_that_the_template_knows(tmp_path, form):
    template, of_text, of_parts = FORMS[form]
    one = with_template(tmp_path, "{% for m in messages %}" + template + "{% endfor %}")
    assert one.chat([{"role": "user", "content": "s"}]) == of_text
    assert one.chat([{"role": "user", "content": PARTS}]) == of_parts


def test_the_reason_of_a_template_is_not_that_of_the_other_form(tmp_path):
    one = with_template(tmp_path, "{{ messages[0].content + 'x' }}{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate"):
        one.chat([{"role": "user", "content": PARTS}])


def test_a_dropped_thought_is_no_reason_for_another_form(tmp_path):
    template = (
        "{% for m in messages %}{% if m.content is string %}<{{ m.content.split('</t>')[-1] }}>{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "hm</t>b"}, {"role": "user", "content": "c"}
    ]
    assert with_template(tmp_path, template).chat(messages) == "<a><b><c>"


def test_fields_of_a_message_beyond_role_and_content_reach_the_template(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": None, "tool_calls": [call]}
    ]
    messages += [
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "content": "ok", "reasoning_content": "hm"}
    ]
    template = "{% for m in messages %}{{ m.name }}{{ m.tool_calls | tojson if m.tool_calls }}"
    template += "{{ m.tool_call_id }}{{ m.reasoning_content }};{% endfor %}"
    expected = f"Ann;{json.dumps([call])};c1;hm;"
    assert chat_template.malformed(messages) is None
    assert with_template(tmp_path, template).chat(messages) == expected


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no message"),
        ({"role": "user", "content": "a"}, "no list"),
        (["a"], r"messages\[0\] has no role"),
        ([{"content": "a"}], r"messages\[0\] has no role"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 7}], r"messages\[1\] has no content"),
        ([{"role": "assistant", "content": None}], r"messages\[0\] has no content"),
        (
            [{"role": "user", "content": [{"type": "film", "film": {}}]}],
            "part 'film'; only parts of the types 'text', 'image', 'audio' and 'video'"
        ),
        ([{"role": "user", "content": ["a"]}], "part 'a'; only parts of the types 'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part without its text"),
    ],
)
def test_what_is_wrong_with_messages_is_said_by_their_place(tmp_path, messages, reason):
    assert re.search(reason, chat_template.malformed(messages))
    if messages:
        with pytest.raises(UserError, match=reason):
            with_template(tmp_path, "x").chat(messages)


SLOW = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{% set _ = m(n - 1) %}{% set _ = m(n - 1) %}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% generation %}{% for j in range(99999) %}{% continue %}{% endfor %}"
    "{% endgeneration %}{% endfor %}",
]


@pytest.mark.parametrize("template", SLOW)
def test_a_template_that_writes_nothing_for_long_is_ended(tmp_path, monkeypatch, template):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    said = r"the chat template failed \(it runs for more than 0.2 seconds\)"
    with at_most(5), pytest.raises(UserError, match=said):
        with_template(tmp_path, template).chat(MESSAGES)


# --- the real one


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """The built-in model; fetched on first use."""
    return Tokenizer(hub.resolve("smollm2-135m"))


def test_smollm2_encodes_as_transformers_does(smollm2):
    """Ids of AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct"), as published in several projects'
    tests."""
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2.encode("Once upon a time") == [6403, 1980, 253, 655]
    assert smollm2.encode("def add(a, b): return") == [1604, 803, 24, 81, 28, 278, 727, 1003]
    assert smollm2.encode("In 2026, the weather") == [788, 216, 34, 32, 34, 38, 28, 260, 3947]  # each digit by itself
    chat = [
        1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198
    ]
    there = smollm2.encode(smollm2.chat([{"role": "user", "content": "Hi there"}]))
    assert there == [*chat, 1, 4093, 198, 26843, 665, 2, 198, 1, 520, 9531, 198]


def test_smollm2_stops_at_im_end_and_chats_in_chatml(smollm2):
    assert smollm2.eos_ids == {2}
    assert smollm2.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.encode(smollm2.chat([{"role": "user", "content": "Hi"}]))
    assert ids[:1] == [1] and ids.count(2) == 2


def test_smollm2_streams_what_it_decodes(smollm2):
    ids = smollm2.encode(TEXT)
    pieces = streamed(smollm2, ids)
    assert "".join(pieces) == smollm2.decode(ids) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
