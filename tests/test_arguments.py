"""What a Python program may give, and what not: a wrong kind, type or name is a UserError of one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

import minioscar
from minioscar import Conversation, Options, Sampling
from minioscar.arguments import OPTIONS, SAMPLING
from minioscar.detokenizer import complete
from minioscar.errors import UserError

from . import simt
from .tiny import TEMPLATE, load, talker, write_model, write_talker

TONE = "{% if tone is defined %}<|system|>{{ tone }}<|end|>{% endif %}" + TEMPLATE
HI, SYSTEM = {"role": "user", "content": "the cat"}, {"role": "system", "content": "the dog"}
ANSWER = {"role": "assistant", "content": "sat"}

HALF = "\ufffd"  # half a character, at which an answer is cut, does not enter a conversation


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_talker(tmp_path_factory.mktemp("arguments") / "model", 5, template=TONE)


@pytest.fixture(scope="module")
def engine(folder):
    return talker(folder)


def refused(call, *words: str) -> None:
    with pytest.raises(UserError) as error:
        result = call()
        list(result)  # what is a generator begins here
    message = str(error.value)
    assert "\n" not in message and len(message) < 500 and all(word in message for word in words), message


# --- prompts

NO_PROMPTS = {
    "None": None, "a number": 5, "a float": 1.5, "a bool": True, "an object": object(), "a class": str,
    "a generator": iter([1, 2]),
    "bytes": b"the cat", "bytearray": bytearray(b"the cat"), "memoryview": memoryview(b"the cat"),
    "bytes in a list": [b"the cat"],
    "one message": HI, "another dict": {"prompt": "x"}, "a set": {1, 2}, "message and text": [HI, "a"],
    "no content": [{"role": "user"}],
    "no role": [{"content": "x"}], "role a number": [{"role": 5, "content": "x"}],
    "content a number": [{"role": "user", "content": 5}],
    "content None": [{"role": "user", "content": None}], "float ids": [1.0, 2.0], "NaN": [float("nan")],
    "bool ids": [True, False],
    "ids and text": [1, "a"], "ids and None": [1, None], "ids too deep": [[[1]]], "float array": np.array([1.0, 2.0]),
    "bool array": np.array([True]), "texts too deep": np.array([[["a"]]]), "0-d array": np.array(3),
    "3-d array": np.ones((1, 1, 1), int),
    "complex": np.array([1j]), "objects": np.array([None]), "nothing": [], "empty array": np.array([]),
    "no text": "", "no ids": [[]],
}


@pytest.mark.parametrize("name", NO_PROMPTS)
@pytest.mark.parametrize("call", ["generate", "stream", "start", "prefill", "logits", "encode", "render"])
def test_what_is_no_prompt_is_refused_wherever_a_prompt_goes(engine, call, name):
    wrong = NO_PROMPTS[name]
    refused(lambda: getattr(engine, call)(wrong))
    if call in ("generate", "start"):
        refused(lambda: getattr(engine, call)(["the cat", wrong]))


@pytest.mark.parametrize("call", ["stream", "prefill", "logits", "encode"])
@pytest.mark.parametrize("several", [["a", "b"], [[1], [2]], np.ones((2, 2), int), [[HI], [HI]], ("a",)])
def test_several_prompts_are_refused_where_one_goes(engine, call, several):
    refused(lambda: getattr(engine, call)(several))


ALONE = ["the cat", [1, 2], (1, 2), range(3), np.arange(3), [HI], (HI,), b"the cat", np.array([1.5])]


@pytest.mark.parametrize("alone", ALONE)
def test_start_takes_a_list_of_prompts_only(engine, alone):
    refused(lambda: engine.start(alone))


def test_ids_are_ids_in_whatever_a_program_holds_them(engine):
    want = engine.generate([5, 6, 7], max_tokens=3).token_ids
    for ids in (
        (5, 6, 7), range(5, 8), np.array([5, 6, 7]), np.array([5, 6, 7], np.uint8), [np.int64(5), 6, np.int32(7)],
        np.arange(3, 9)[2:5],
        np.array([5, 6, 7], ">i4"), np.array([5, 6, 7], np.uint64),
    ):
        assert engine.generate(ids, max_tokens=3).token_ids == engine.generate([ids], max_tokens=3)[0].token_ids == want
        assert "".join(engine.stream(ids, max_tokens=3)) == engine.generate(ids, max_tokens=3).text
    together = engine.generate(np.array([[5, 6, 7], [5, 6, 7]]), max_tokens=3)
    assert [one.token_ids for one in together] == [want, want]


def test_a_string_of_numpy_and_tuples_of_prompts_are_what_they_look_like(engine):
    one, two = (engine.generate(text, max_tokens=2) for text in (np.str_("the cat"), "the cat"))
    assert one.token_ids == two.token_ids
    assert len(engine.generate(("the cat", [5, 6], [HI]), max_tokens=2)) == 3


@pytest.mark.parametrize("id", [-1, 320, 2**31, 2**63, -(2**70), np.uint64(2**63)])
def test_ids_that_the_model_does_not_have_are_refused(engine, id):
    refused(lambda: engine.generate([id]), "token ids outside 0 ... 319")


# --- options

WRONG = {
    "ctx": ["128", 1.5, True, float("nan"), b"1", [128], 0, -1, 1025, 10**30, np.float32(128)],
    "chat": ["yes", 1, 0, "", [], np.int64(1)],
    "cache": ["c.safetensors", Path("c"), b"x", 5, {}, False, object()],
    "system": [5, b"x", ["x"], True, HI, ("a",)],
    "template": [5, "x", [("a", 1)], {5: 1}, True, {"messages": []}, {"add_generation_prompt": False}],
    "max_tokens": ["8", 1.5, True, 0, -1, [1]],
    "sampling": [{"temperature": 1}, 0.5, "greedy", Sampling, True],
    "stop": ["x", b"x", 5, [5], [""], [None], {"a": 1}, np.array("x")],
    "stop_ids": ["x", 5, [1.5], [True], ["a"], [-1], np.array(5)],
    "logprobs": [2.5, "3", True, -1, 101],
    "min_tokens": ["1", 1.5, -1, 300],
    "ignore_eos": ["yes", 1, []],
    "temperature": ["1", -1, float("nan"), float("inf"), True, b"1", [1]],
    "top_p": [0, 1.5, "0.5", None.__class__],
    "top_k": [2.5, -1, "2", True],
    "min_p": [-0.1, 1.1, "x"],
    "seed": [1.9, -1, 2**64, "x", True, [1]],
    "repetition_penalty": ["x", float("nan"), True],
    "presence_penalty": ["x", float("nan")],
    "frequency_penalty": ["x", float("inf")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_options_of_wrong_types_are_refused_by_their_names(engine, name, value):
    for call in (engine.generate, engine.stream):
        refused(lambda call=call: call("the cat", **{name: value}), name)
    if name in ("ctx", "chat", "cache", "template"):
        refused(lambda: engine.start(["the cat"], **{name: value}), name)
    if name in ("chat", "cache", "template"):
        refused(lambda: engine.encode("the cat", **{name: value}), name)
    if name in ("chat", "template"):
        refused(lambda: engine.prefill("the cat", **{name: value}), name)
    if name in ("ctx", "cache", "system", "template"):
        refused(lambda: Conversation(engine, **{name: value}), name)
    if name in (*SAMPLING, *OPTIONS, "sampling"):
        conversation = Conversation(engine, ctx=128)
        refused(lambda: conversation.say("the cat", **{name: value}), name)
        assert conversation.messages == []


def test_a_stream_of_text_has_no_logprobs_and_a_conversation_keeps_them(engine):
    refused(lambda: engine.stream("the cat", logprobs=2), "use generate or start")
    conversation = Conversation(engine, ctx=128)
    list(conversation.say("the cat", logprobs=2, max_tokens=3, ignore_eos=True))
    assert [len(entry.top) for entry in conversation.last.logprobs] == [2, 2, 2]


def test_an_end_that_the_model_does_not_have_is_refused(engine):
    for call in (engine.generate, engine.stream, Conversation(engine, ctx=128).say):
        refused(lambda call=call: call("the cat", stop_ids=[320]), "320")


def test_none_is_the_default_of_every_option(engine):
    nothing = dict.fromkeys([*SAMPLING, *OPTIONS, "sampling", "ctx", "chat", "cache", "system", "template"])
    want = engine.generate("the cat")
    assert engine.generate("the cat", **nothing).token_ids == want.token_ids
    assert "".join(engine.stream("the cat", **nothing)) == want.text
    run = engine.start(["the cat"], ctx=None, chat=None, cache=None, sequences=None, options=None, template=None)
    assert [list(run), run.results[0].token_ids][1] == want.token_ids
    conversation = Conversation(engine, system=None, cache=None, ctx=None, template=None)
    said = "".join(conversation.say("the cat", **dict.fromkeys([*SAMPLING, *OPTIONS, "sampling"])))
    assert said == want.text.rstrip(HALF)


def test_every_number_of_sampling_is_an_option_by_itself(engine):
    numbers = {
        "temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 4, "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    }
    assert list(numbers) == SAMPLING
    want = engine.generate("the cat", max_tokens=20, sampling=Sampling(**numbers))
    assert engine.generate("the cat", max_tokens=20, **numbers).token_ids == want.token_ids
    assert "".join(engine.stream("the cat", max_tokens=20, **numbers)) == want.text
    said = "".join(Conversation(engine, ctx=256).say("the cat", max_tokens=20, **numbers))
    assert said == want.text.rstrip(HALF)
    for name in numbers:
        both = {"sampling": Sampling(), name: numbers[name]}
        refused(lambda both=both: engine.generate("the cat", **both), "sampling=", f"{name}=")
    again = engine.generate("the cat", max_tokens=20, sampling=Sampling(**numbers), temperature=None)
    assert again.token_ids == want.token_ids
    assert engine.generate("the cat", max_tokens=20, sampling=None, **numbers).token_ids == want.token_ids


MISSPELT = {
    "temprature": "temperature", "temp": "temperature", "max_new_tokens": "max_tokens", "topk": "top_k",
    "stops": "stop",
    "context": "ctx", "n": "start(..., options=minioscar.Options(n=...))", "zzz": "max_tokens", "options": "options",
}


@pytest.mark.parametrize(("wrong", "meant"), MISSPELT.items())
def test_an_option_that_is_not_there_is_refused_with_what_was_meant(engine, wrong, meant):
    for call in (engine.generate, engine.stream):
        refused(lambda call=call: call("the cat", **{wrong: 1}), repr(wrong), meant)
    refused(lambda: Conversation(engine, ctx=128).say("the cat", **{wrong: 1}), repr(wrong))


SEQUENCES = [
    5, "ab", b"ab", bytearray(b"ab"), [1], [1, 2, 3], [0, -1], [0, 1.5], [0, None], [0, 2**40], {0: 1, 1: 2},
    np.array(5)
]


@pytest.mark.parametrize("sequences", SEQUENCES)
def test_sequences_are_a_number_for_each_answer(engine, sequences):
    refused(lambda: engine.start(["the cat", "the dog"], sequences=sequences), "sequences")
    refused(lambda: engine.start(["the cat"], options={"max_tokens": 3}), "minioscar.Options")


# --- models and files


def named(options: dict) -> str:
    """The name of a test: the same in every process, as an object's address is not."""
    return "-".join(
        f"{name}={type(value).__name__ if type(value) is object else repr(value)}" for name, value in options.items()
    )


DEVICES = ["cuda:0", "CPU", "gpu", "mps", "", "cpu ", "cuda0", "rocm", 0, True, b"cpu", ["cpu"], object(), np.int64(0)]


@pytest.mark.parametrize("device", DEVICES)
def test_devices_that_are_not_there_are_refused_with_those_that_are(folder, device, monkeypatch):
    for backend in ("", "tests.simt.backend:Simt"):
        monkeypatch.setenv("MINIOSCAR_BACKEND", backend)
        refused(lambda: minioscar.load(folder, device=device), "device", "choose from auto, cuda, cpu")


def test_no_device_is_any_device(folder):
    assert minioscar.load(folder, device=None).ops.name == minioscar.load(folder, device="auto").ops.name


LOADING = {
    "model": [None, b"x", 5, ["x"], "", "a\0b", object()],
    "kv": ["", "int3", 5, [], b"int2", minioscar.SCHEMES["int2"]],
    "ctx": WRONG["ctx"],
    "cache": [5, b"x", [], "", "a\0b"],
    "tokenizer": ["x"],
    "debug": ["yes"],
    "progress": ["yes", np.array([1, 2])],
}


@pytest.mark.parametrize("options", [{name: value} for name, values in LOADING.items() for value in values], ids=named)
def test_models_schemes_contexts_and_files_that_cannot_be_are_refused(folder, options):
    refused(lambda: minioscar.load(**{"model": folder, "device": "cpu", **options}))


@pytest.mark.parametrize("path", [None, 5, b"x", ["x"], "", "a\0b", 1.5, object(), "n" * 256, "n/" * 3000])
def test_what_is_no_path_is_refused(engine, path):
    cache, conversation = engine.prefill("the cat"), Conversation(engine, ctx=128)
    list(conversation.say("the cat", max_tokens=2))
    for call in (engine.load_cache, cache.save, conversation.save):
        refused(lambda call=call: call(path))


def test_a_cache_is_asked_for_by_what_it_is(engine, tmp_path):
    cache = engine.prefill("the cat")
    cache.save(tmp_path / "c")
    refused(lambda: engine.generate("so", cache=tmp_path / "c"), "load_cache")
    refused(lambda: engine.generate("so", cache=str(tmp_path / "c")), "load_cache")
    refused(lambda: minioscar.load(engine.folder, device="cpu", cache=cache), "cache")
    for wrong in (None, b"so", 5, [HI], ["so"], [5]):
        refused(lambda wrong=wrong: cache.followed_by(wrong), "must be text")


@pytest.mark.parametrize("extra", [object(), {1, 2}, b"x", "\ud800", np.float32(1)])
def test_messages_that_no_file_can_hold_are_refused_when_they_are_saved(engine, tmp_path, extra):
    cache = engine.prefill([{**HI, "extra": extra}])
    refused(lambda: cache.save(tmp_path / "c"), "the messages cannot be written as JSON")
    assert list(tmp_path.iterdir()) == []


class NoPath:
    def __fspath__(self):
        return 5


class NoName:
    def __repr__(self):
        raise RuntimeError("no name")


def test_objects_that_do_not_even_have_a_name_are_refused(engine, folder):
    refused(lambda: engine.generate(NoName()), "NoName")
    refused(lambda: minioscar.load(folder, device=NoName()), "device (NoName)")
    refused(lambda: minioscar.load(NoPath()), "model")
    refused(lambda: engine.load_cache(NoPath()))
    refused(lambda: engine.generate("x", template={"chat_template": np.array([1, 2])}), "chat template")


NO_IDS = [None, 5, "the cat", b"x", bytearray(b"x"), memoryview(b"x")]
NO_IDS += [[1.5], ["a"], [None], [True], [-1], [2**40], {1: 2}, np.array(3), np.array([1.5])]


@pytest.mark.parametrize("ids", NO_IDS)
def test_the_tokenizer_decodes_ids_only_and_encodes_text_only(engine, ids):
    refused(lambda: engine.tokenizer.decode(ids), "token id")
    if not isinstance(ids, str):
        refused(lambda: engine.tokenizer.encode(ids), "only text has token ids")
        assert engine.tokenizer.special_id(ids) is None
    if ids != 5:
        refused(lambda: engine.tokenizer.token_text(ids), "token id")
    refused(lambda: engine.tokenizer.chat(ids), "messages cannot be rendered")
    assert engine.tokenizer.decode(np.array([5, 6])) == engine.tokenizer.decode([5, np.int64(6)])


# --- conversations


@pytest.mark.parametrize("engine_", [None, "smollm2-135m", Path("x"), 5])
def test_a_conversation_needs_a_model(engine_):
    refused(lambda: Conversation(engine_), "minioscar.load")


@pytest.mark.parametrize("text", [None, b"the cat", 5, ["the cat"], HI, [HI], [5, 6], True, np.array([5])])
def test_a_message_is_text(engine, text):
    conversation = Conversation(engine, ctx=128)
    answer = conversation.say("the dog", max_tokens=3)
    next(answer, None)
    refused(lambda: conversation.say(text), "the message must be text")
    list(answer)  # a wrong call has not ended it
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


def prompt_of(engine, tokens: int) -> str:
    texts = map("a".__mul__, range(400))
    return next(text for text in texts if len(engine.render([{"role": "user", "content": text}])) == tokens)


@pytest.mark.parametrize("tokens", [127, 128, 129])
def test_a_chat_takes_what_generate_takes(engine, tokens):
    """A prompt that fills the context still has a next token."""
    text, conversation = prompt_of(engine, tokens), Conversation(engine, ctx=128)
    if tokens > 128:
        refused(lambda: engine.generate(text, ctx=128), "the prompt has 129 tokens")
        refused(lambda: conversation.say(text), "would have 129 tokens")
        return
    want = engine.generate(text, ctx=128, max_tokens=5, ignore_eos=True)
    assert "".join(conversation.say(text, max_tokens=5, ignore_eos=True)) == want.text
    assert conversation.last.token_ids == want.token_ids and conversation.last.finish_reason == want.finish_reason
    assert want.new_tokens == 129 - tokens and len(conversation.held) == 128
    refused(lambda: conversation.say("the dog"), "the context holds 128")
    assert len(conversation.messages) == 2


def test_a_prompt_cache_that_fills_the_context_begins_a_conversation(engine):
    cache = engine.prefill([{**HI, "content": "a" * 100}, {"role": "assistant", "content": "b" * 200}])
    for over in (0, 1):
        cut = minioscar.PromptCache.of(engine, *held(engine, cache.ids[: 128 + over]), messages=cache.messages)
        if over:
            refused(lambda cut=cut: Conversation(engine, cache=cut, ctx=128), "129 tokens, but the context holds 128")
        else:
            assert Conversation(engine, cache=cut, ctx=128).held == cache.ids[:128]


def held(engine, ids):
    cache = engine.new_cache(1, 256)
    engine.model.forward(np.array(ids), cache, cache.batch_for([0], [len(ids)]))
    return cache, ids


# --- prompts and caches of every kind together

CACHES = {
    None: lambda e: None,
    "text": lambda e: e.prefill("the cat sat ", chat=False),
    "ids": lambda e: e.prefill([9, 8, 7]),
    "chat": lambda e: e.prefill("the cat"),
    "messages": lambda e: e.prefill([SYSTEM, HI]),
    "answered": lambda e: e.prefill([HI, ANSWER]),
}
PROMPTS = {
    "text": "on the mat",
    "ids": [5, 6],
    "foreign": [{"role": "user", "content": "and so"}],
    "open": [SYSTEM, {"role": "user", "content": "the cat\n\nand so"}],
    "next": [HI, ANSWER, {"role": "user", "content": "so"}],
}
BEGIN = {("messages", "open"), ("chat", "next"), ("answered", "next")}  # the messages that repeat those of a cache


def full_prompt(engine, cached, cache, name, given) -> list[int] | None:
    """The ids of the whole prompt, or None where these do not go together: case by case."""
    prompt, (chat, system, template) = PROMPTS[name], given.values()
    if system is not None and (cached or name != "text" or chat is False):
        return None
    if name == "ids":
        return None if chat or template else [*(cache.ids if cached else []), *prompt]
    if name != "text":
        good = chat is not False and (not cached or (cached, name) in BEGIN)
        return engine.render(prompt, template) if good else None
    if cached == "ids" or cached == "text" and chat or cached not in (None, "text") and chat is False:
        return None
    if cached == "text" or not cached and chat is False:
        text = f"the cat sat {prompt}" if cached else prompt
        return None if template else engine.tokenizer.encode(text, add_special_tokens=True)
    user, first = {"role": "user", "content": prompt}, [] if system is None else [{"role": "system", "content": system}]
    behind = {"role": "user", "content": f"the cat\n\n{prompt}"}
    chats = {None: [*first, user], "chat": [behind], "messages": [SYSTEM, behind], "answered": [HI, ANSWER, user]}
    return engine.render(chats[cached], template)


@pytest.mark.parametrize("cached", CACHES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt_behind_every_cache_is_answered_as_without_it_or_refused(engine, cached, prompt):
    cache = CACHES[cached](engine)
    for chat, system, template in itertools.product((None, True, False), (None, "the dog"), (None, {"tone": "mat"})):
        given = {"chat": chat, "system": system, "template": template}
        want = full_prompt(engine, cached, cache, prompt, given)
        if want is None:
            refused(lambda given=given: engine.generate(PROMPTS[prompt], cache=cache, **given))
            continue
        answer = engine.generate(PROMPTS[prompt], cache=cache, max_tokens=1, logprobs=50, **given)
        straight = engine.generate(want, max_tokens=1, logprobs=50)
        assert answer.prompt_tokens == len(want), given
        assert near(answer, straight)


def near(a, b) -> bool:
    """The same first token, but for the rounding of what the cache holds: BF16, where one pass attends in float32."""
    one, two = ({entry.token_id: entry.logprob for entry in result.logprobs[0].top} for result in (a, b))
    both = one.keys() & two.keys()
    return len(both) > 40 and all(abs(one[token] - two[token]) < 0.02 for token in both)


def test_parts_of_messages_begin_as_a_cache_does_where_their_text_does(engine):
    cache, text = engine.prefill([SYSTEM, HI]), [{"type": "text", "text": "the cat"}]
    for content in (text, [*text, {"type": "text", "text": "so?"}], "the cat", "the cat so"):
        messages = [{**SYSTEM, "content": [{"type": "text", "text": "the dog"}]}, {"role": "user", "content": content}]
        answer = engine.generate(messages, cache=cache, max_tokens=1, logprobs=50)
        assert near(answer, engine.generate(messages, max_tokens=1, logprobs=50))
        assert answer.prefilled_tokens < answer.prompt_tokens
    for content in ([], [{"type": "text", "text": "the dog"}], text[0]["text"][:-1]):
        messages = [SYSTEM, {"role": "user", "content": content}]
        refused(lambda messages=messages: engine.generate(messages, cache=cache), "do not begin")
    refused(lambda: engine.generate([SYSTEM], cache=cache), "do not begin")


@pytest.mark.parametrize("change", ["template", "tokenizer"])
@pytest.mark.parametrize("chat", [True, False])
def test_a_cache_under_another_tokenizer_or_template_is_read_again_where_it_differs(engine, tmp_path, change, chat):
    """The weights are the same, so the cache is this model's; its ids are compared with those that the text has now."""
    text = "the cat sat on the mat, and the dog saw that. "
    engine.prefill(text, chat=chat).save(tmp_path / "c")
    template = TONE.replace("<|end|>", "<|end|>,") if change == "template" else TONE
    other = write_talker(tmp_path / "m", 5, template=template)
    if change == "tokenizer":
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        tokenizer["model"]["merges"] = []  # single bytes
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    new = talker(other)
    cache = new.load_cache(tmp_path / "c")
    answer = new.generate("so?", cache=cache, max_tokens=1, logprobs=50)
    straight = new.generate(f"{text}\n\nso?" if chat else f"{text}so?", chat=chat, max_tokens=1, logprobs=50)
    assert near(answer, straight) and answer.prompt_tokens == straight.prompt_tokens


def test_a_cache_of_a_template_with_variables_is_read_on_with_them(engine):
    tone = {"tone": "mat " * 10}
    cache = engine.prefill("the cat", template=tone)
    same, other = (engine.generate("so", cache=cache, template=template, max_tokens=1) for template in (tone, None))
    assert same.prefilled_tokens == same.prompt_tokens - len(cache) and other.prefilled_tokens == other.prompt_tokens
    refused(lambda: engine.prefill("the cat", chat=False, template=tone), "template")
    refused(lambda: engine.prefill([5], template=tone), "template")
    conversation = Conversation(engine, cache=cache, template=tone, ctx=256)
    list(conversation.say("so", max_tokens=1))
    assert conversation.last.prefilled_tokens == same.prefilled_tokens


# --- several at once


def test_runs_of_one_engine_do_not_know_of_each_other(engine):
    """Interleaved, one inside the other's loop, broken off in the middle: each is what it is alone."""
    prompts = ["the cat sat", "and the dog saw that " * 8]
    options = {"max_tokens": 40, "temperature": 1.0, "ignore_eos": True}
    want = [engine.generate(prompt, **options).text for prompt in prompts]
    a, b = (engine.stream(prompt, **options) for prompt in prompts)
    pairs = list(itertools.zip_longest(a, b, fillvalue=""))
    assert ["".join(pieces) for pieces in zip(*pairs, strict=True)] == want
    inside = ""
    for i, piece in enumerate(engine.stream(prompts[0], **options)):
        inside += piece
        if i % 10 == 5:
            assert engine.generate(prompts[1], **options).text == want[1]
            broken = engine.stream(prompts[1], **options)
            next(broken)
            if i == 5:
                broken.close()
    assert inside == want[0]
    conversation = Conversation(engine, ctx=256)
    said = "".join(piece for piece in conversation.say(prompts[0], **options) if engine.generate([5], max_tokens=1))
    alone = engine.generate(prompts[0], **options)
    assert said == complete(engine.tokenizer.stream, alone.text, alone.token_ids)  # without half a character at its end


@pytest.mark.skipif(simt.missing() is not None, reason=str(simt.missing()))
def test_runs_whose_steps_are_queued_do_not_know_of_each_other_either(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIOSCAR_BACKEND", "tests.simt.backend:Simt")
    engine = load(write_model(tmp_path / "m", 4, head_dim=64, num_hidden_layers=1), "int2", "auto")
    options = Options(max_tokens=6)
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    want = [engine.generate(prompt, max_tokens=6).token_ids for prompt in prompts]
    runs = [engine.start([prompt], options=options) for prompt in prompts]
    steps = [iter(run) for run in runs]
    for _ in range(3):
        for step in steps:
            next(step)
        next(iter(engine.start(prompts)))  # broken off
    for step in steps:
        list(step)
    assert [run.results[0].token_ids for run in runs] == want


def test_threads_share_an_engine(engine):
    found: list = [None] * 4

    def answers(i: int) -> None:
        prompt, options = f"the cat {i % 2} sat", {"max_tokens": 20, "temperature": 1.0}
        found[i] = [engine.generate(prompt, seed=seed, **options).token_ids for seed in range(3)]

    threads = [Thread(target=answers, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[2] and found[1] == found[3]
    answers(0)
    assert found[0] == found[2]


def test_a_run_is_iterated_once(engine):
    run = engine.start(["the cat"], options=Options(max_tokens=2))
    next(iter(run))
    refused(lambda: list(run), "start another")


def test_without_a_tokenizer_text_is_refused_and_ids_are_not(folder):
    silent = load(folder)
    for call in (silent.generate, silent.stream, silent.prefill, lambda p: silent.start([p])):
        refused(lambda call=call: call("the cat"), "without a tokenizer")
        refused(lambda call=call: call([HI]), "without a tokenizer")
    refused(lambda: Conversation(silent), "without a tokenizer")
    refused(lambda: silent.generate([5], stop=["x"]), "without a tokenizer")
    assert silent.generate([5], max_tokens=2).new_tokens == 2
