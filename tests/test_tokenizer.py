"""Text <-> ids, streaming text, stop tokens and chat templates, hostile ones included."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from minioscar import hub, tokenizer
from minioscar.errors import UserError
from minioscar.tokenizer import Tokenizer

TEXT = "The café costs 12 €. 日本語のテキスト, Привет мир! नमस्ते 👩‍👩‍👧 🇯🇵 e\u0301 \u200f مرحبا\n\n  two  spaces\ttab"
SPECIALS = ["<unk>", "<s>", "</s>"]


def byte_level() -> Library:
    """Like GPT-2, Llama 3, Qwen: tokens are bytes and merges of bytes, across the borders of characters too."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([TEXT] * 3, trainer)
    library.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "é€", "ÿÿ")])  # outside and inside the byte alphabet
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def sentencepiece() -> Library:
    """Like Llama 2 and Mistral: a space is a ▁ before the word, one is added in front, unknown characters are byte tokens."""
    words = ["▁", "▁The", "▁caf", "é", "▁two", "▁spaces", "日", "本", "e", "s", "t", "a", ".", ","]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    library = Library(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
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
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)])
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
    raw = data.draw(st.one_of(st.binary(max_size=12), st.text(max_size=8).map(lambda s: s.encode("utf-8", "replace")[1:])))
    of_byte = {byte: c for c, byte in tokenizer._BYTES.items()}
    names = [of_byte[b] if tiny.encode("a")[0] < 256 and tiny._tokenizer.token_to_id("<0x00>") is None else f"<0x{b:02X}>" for b in raw]
    ids = [i for i in (tiny._tokenizer.token_to_id(name) for name in names) if i is not None]
    for _ in range(data.draw(st.integers(0, 3))):
        ids.insert(data.draw(st.integers(0, len(ids))), data.draw(st.sampled_from([1, 2, *tiny.encode("The café <think> ")])))
    assert "".join(streamed(tiny, ids)) == tiny.decode(ids)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(text=st.one_of(st.text(max_size=30), st.lists(st.sampled_from([*TEXT, "👩‍👩‍👧", "🇯🇵", " ", "  "]), max_size=30).map("".join)))
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
    of_byte = {byte: c for c, byte in tokenizer._BYTES.items()}
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
    decoded = 0

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny._tokenizer, name)

        def decode(self, ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return tiny._tokenizer.decode(ids)

    ids = tiny.encode("two spaces 日本 " * 400)
    stream = tokenizer.Detokenizer(Counting(), frozenset())
    for i in ids:
        stream.add(i)
    assert len(ids) > 2000
    assert decoded <= 3 * len(ids)


# --- files


def test_encode_adds_special_tokens_only_when_asked(tiny):
    plain = tiny.encode("two")
    assert tiny.encode("two", add_special_tokens=True) == tiny.prompt_ids("two", chat=False) == [1, *plain]


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
    assert Tokenizer(save(tmp_path, library)).encode("abcdefgh") == byte_level().encode("abcdefgh", add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (dict(generation_config={"eos_token_id": [2, 7]}, config={"eos_token_id": 5}), {2, 7}),
        (dict(generation_config={"eos_token_id": 7}, config={"eos_token_id": 5}), {7}),
        (dict(generation_config={"eos_token_id": 0}, config={"eos_token_id": 5}), {0}),
        (dict(generation_config={}, config={"eos_token_id": [5, 6]}), {5, 6}),
        (dict(generation_config={"eos_token_id": None}, tokenizer_config={"eos_token": "</s>"}), {2}),
        (dict(tokenizer_config={"eos_token": {"content": "</s>", "lstrip": False}}), {2}),
        (dict(generation_config={"eos_token_id": "x"}, config={"eos_token_id": True}), set()),
        ({}, set()),
    ],
)
def test_generation_stops_at_every_eos_id_of_the_first_file_that_names_one(tmp_path, files, wanted):
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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "Nonsense"}}', b"\xff\xfe", b'{"version": "1.0"'])
def test_a_corrupt_tokenizer_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json: not a readable tokenizer") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer_config", "generation_config", "config", "chat_template"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_corrupt_side_file_is_one_line_that_names_it(tmp_path, name, content):
    save(tmp_path, byte_level())
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.json") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


# --- chat


MESSAGES = [{"role": "user", "content": "a <b> & 'c'"}]


def with_template(folder: Path, template: Any, **config: Any) -> Tokenizer:
    return Tokenizer(save(folder, byte_level(), tokenizer_config={"chat_template": template, **config}))


def test_the_template_sees_messages_special_tokens_and_the_generation_prompt(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}\n    {% if true %}\n[{{ m['role'] }}] {{ m.content | trim }}\n    {% endif %}\n"
    template += "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{{ eos_token }}{{ pad_token }}"
    one = with_template(tmp_path, template, bos_token="<s>", eos_token={"content": "</s>"})
    assert one.has_chat_template
    assert one.chat(MESSAGES) == "<s>[user] a <b> & 'c'\n[assistant]</s>"
    assert one.chat(MESSAGES, add_generation_prompt=False) == "<s>[user] a <b> & 'c'\n</s>"


def test_chat_prompts_get_no_second_bos(tmp_path):
    one = with_template(tmp_path, "{{ bos_token }}{{ messages[0].content }}", bos_token="<s>")
    assert one.prompt_ids("two", chat=True) == one.prompt_ids("two", chat=False)


def test_what_templates_use_beyond_plain_jinja_is_there(tmp_path):
    template = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ strftime_now('%Y') | length }}"
    template += "{{ messages[0] | tojson }}{{ ['é'] | tojson(indent=1) }}{{ tools is none }}"
    expected = '014{"role": "user", "content": "a <b> & \'c\'"}[\n "é"\n]True'
    assert with_template(tmp_path, template).chat(MESSAGES) == expected


def test_a_template_is_found_in_every_place_it_may_be(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert with_template(tmp_path, named).chat([]) == "default"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from json"}')
    assert Tokenizer(tmp_path).chat([]) == "from json"
    (tmp_path / "chat_template.jinja").write_text("from jinja é", encoding="utf-8")
    assert Tokenizer(tmp_path).chat([]) == "from jinja é"


@pytest.mark.parametrize("template", [None, 7, [], [{"name": "tool_use", "template": "x"}], ["x"], {"default": "x"}])
def test_without_a_template_chat_says_to_use_raw(tmp_path, template):
    one = with_template(tmp_path, template)
    assert not one.has_chat_template
    with pytest.raises(UserError, match="no chat template; use --raw"):
        one.prompt_ids("x", chat=True)


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
]


SHUT = ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ messages.__init__ }}", "{{ ''|attr('__class__') }}"]
SHUT += ["{{ '{0.__class__}'.format(1) }}", "{{ strftime_now.__code__ }}", "{{ (messages|map(attribute='__class__')|list)[0] }}"]


@pytest.mark.parametrize("template", BAD)
def test_a_template_that_fails_is_one_line_with_its_reason(tmp_path, template):
    with pytest.raises(UserError, match="the chat template failed") as caught:
        with_template(tmp_path, template).chat(MESSAGES)
    assert BAD[template] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_reaches_nothing_and_ends(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer, "MAX_CHAT", 1 << 20)
    one, before = with_template(tmp_path, template), sorted(tmp_path.iterdir())
    start = time.monotonic()
    with pytest.raises(UserError, match="the chat template failed") as caught:
        one.chat(MESSAGES)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    assert MESSAGES == [{"role": "user", "content": "a <b> & 'c'"}]
    assert time.monotonic() - start < 10  # unbounded loops would not end at all


@pytest.mark.parametrize("template", SHUT)
def test_pythons_inner_attributes_look_empty_to_a_template(tmp_path, template):
    assert with_template(tmp_path, template).chat(MESSAGES) == ""


# --- the real one


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    """The built-in model; fetched on first use."""
    return Tokenizer(hub.resolve("smollm2-135m"))


def test_smollm2_encodes_as_transformers_does(smollm2):
    """Ids of AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct"), as published in several projects' tests."""
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert smollm2.encode("Once upon a time") == [6403, 1980, 253, 655]
    assert smollm2.encode("def add(a, b): return") == [1604, 803, 24, 81, 28, 278, 727, 1003]
    assert smollm2.encode("In 2026, the weather") == [788, 216, 34, 32, 34, 38, 28, 260, 3947]  # each digit by itself
    chat = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198]
    assert smollm2.prompt_ids("Hi there", chat=True) == [*chat, 1, 4093, 198, 26843, 665, 2, 198, 1, 520, 9531, 198]


def test_smollm2_stops_at_im_end_and_chats_in_chatml(smollm2):
    assert smollm2.eos_ids == {2}
    assert smollm2.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.prompt_ids("Hi", chat=True)
    assert ids[:1] == [1] and ids.count(2) == 2


def test_smollm2_streams_what_it_decodes(smollm2):
    ids = smollm2.encode(TEXT)
    pieces = streamed(smollm2, ids)
    assert "".join(pieces) == smollm2.decode(ids) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
