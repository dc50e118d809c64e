"""A chat keeps its cache: only new tokens are read, whatever broke off before, and the model always sees the rendered
history."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from minioscar import memory
from minioscar.app.conversation import Conversation
from minioscar.cache import Cache
from minioscar.errors import Failure, UserError
from minioscar.prompt_cache import common
from minioscar.sampling import Sampling

from .tiny import TEMPLATE, talker, write_talker

FORGETFUL = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | trim if m['role'] == 'user' else '' }}")
QUESTIONS = [
    "the cat sat on the mat", "and the dog?", "the dog saw that the cat sat there. " * 9, "so", "the mat " * 40
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("conversation") / "model", 5)


class Witness:
    """Watches the forward passes of one row: `row` is what its tokens are, by what was fed where; `read` what was fed
    last, in parts."""

    def __init__(self, engine, monkeypatch):
        self.row: list[int] = []
        self.read: list[list[int]] = []
        forward = engine.model._logits

        def logits(ids, cache, batch, *rest):
            assert batch.starts[0] <= len(self.row), "the cache says that it holds tokens which were never fed"
            self.row = [*self.row[: batch.starts[0]], *ids.tolist()]
            self.read.append(ids.tolist())
            return forward(ids, cache, batch, *rest)

        monkeypatch.setattr(engine.model, "_logits", logits)


def say(conversation: Conversation, text: str, pieces: int | None = None, **options) -> str:
    """An answer, broken off after so many pieces."""
    answer: Iterator[str] = conversation.say(
        text, **{"max_tokens": 30, "sampling": Sampling(temperature=1.0, seed=5), **options}
    )
    said = ""
    for n, piece in enumerate(answer, 1):
        said += piece
        if n == pieces:
            answer.close()
            break
    return said


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["remembers", "forgets"])
@pytest.mark.parametrize("kv", ["bf16", "oscar", "int2", "plain-64-64"])
def test_every_answer_is_to_the_rendered_history_and_only_what_is_new_is_read(
    tmp_path, kv, template, monkeypatch, windows
):
    """Random answers split into other tokens than were drawn, and the second template drops them: both cut the
    cache."""
    engine = talker(write_talker(tmp_path / "m", 5, template=template), kv)
    conversation, witness = Conversation(engine, system="the dog", ctx=1024), Witness(engine, monkeypatch)
    for turn, question in enumerate(QUESTIONS):
        before = list(conversation.held)
        history = [*conversation.messages, {"role": "user", "content": question}]
        rendered = engine.render(history)
        witness.read.clear()
        answer = say(conversation, question, pieces=7 if turn == 1 else None)
        assert conversation.messages == [*history, {"role": "assistant", "content": answer}]
        kept = len(rendered) - len(witness.read[0])
        assert rendered[kept:] == witness.read[0] and rendered[:kept] == before[:kept]
        shared = common(rendered, before)
        assert shared - 128 < kept <= shared and (kept == shared or kv != "bf16")  # at most a block is read again
        assert conversation.last.prompt_tokens == len(rendered)
        assert conversation.last.prefilled_tokens == len(rendered) - kept
        held = len(conversation.held)
        assert conversation.held == witness.row[:held] == (rendered + conversation.last.token_ids)[:held]
        assert held == conversation.cache.lengths[0]


def test_a_turn_costs_what_is_new_on_a_real_model():
    from minioscar import engine as module

    engine = module.load("smollm2-135m", "int2", "cpu")
    conversation = Conversation(engine, ctx=1024)
    "".join(conversation.say("What is the capital of France?", max_tokens=12))
    first = conversation.last
    answer = "".join(conversation.say("And of Italy?", max_tokens=12))
    assert "Rome" in answer
    last = conversation.last
    # everything but the end token of the first answer, the new message and the template's words around it was in the
    # cache
    assert last.prefilled_tokens == last.prompt_tokens - first.prompt_tokens - first.new_tokens + (
        first.finish_reason != "stop"
    )
    assert last.prefilled_tokens < 20 < last.prompt_tokens


@pytest.mark.parametrize("kv", ["bf16", "int2", "plain-64-64"])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 9])
def test_ctrl_c_at_any_point_keeps_the_conversation(folder, kv, after, monkeypatch, windows):
    """KeyboardInterrupt out of an operation: in the prefill of a first turn, of a later one, or in a step."""
    engine = talker(folder, kv)
    engine.tokenizer.eos_ids = frozenset()
    conversation, witness = Conversation(engine, ctx=1024), Witness(engine, monkeypatch)
    say(conversation, "the dog saw that the cat sat there. " * 8)
    messages, calls, attention = list(conversation.messages), iter(range(10**6)), engine.ops.attention

    def interrupted(*args):
        if next(calls) == after:
            raise KeyboardInterrupt
        return attention(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.ops, "attention", interrupted)
        with pytest.raises(KeyboardInterrupt):
            say(conversation, "and the cat?", max_tokens=50)
    if after < 2:  # in one of the two layers of the prefill: nothing was said
        assert conversation.messages == messages
    else:
        assert [m["role"] for m in conversation.messages[len(messages) :]] == ["user", "assistant"]
        assert len(conversation.last.token_ids) == after // 2
    assert len(conversation.held) == conversation.cache.lengths[0]
    say(conversation, "so?")
    assert witness.row[: len(conversation.held)] == conversation.held
    fresh = Conversation(engine, ctx=1024)
    fresh.messages = [dict(m) for m in conversation.messages[:-2]]
    say(fresh, "so?", max_tokens=1)
    assert fresh.last.prompt_tokens == conversation.last.prompt_tokens


def test_a_closed_answer_stays_as_it_was_heard_and_the_cache_is_whole(folder):
    engine = talker(folder)
    conversation = Conversation(engine, ctx=1024)
    heard = say(conversation, "the cat", pieces=5)
    assert conversation.messages[-1] == {"role": "assistant", "content": heard}
    assert len(conversation.held) == len(engine.render(conversation.messages[:1])) + 4  # four of the five were fed


def test_an_answer_that_never_began_leaves_no_message(folder):
    conversation = Conversation(talker(folder), ctx=1024)
    conversation.say("the cat")  # not iterated
    assert conversation.messages == []


def test_an_answer_left_standing_ends_where_the_next_message_begins(folder):
    engine = talker(folder)
    engine.tokenizer.eos_ids = frozenset()
    conversation = Conversation(engine, ctx=1024)
    first = conversation.say("the cat", max_tokens=20)
    heard = next(first) + next(first)
    say(conversation, "the dog", max_tokens=2)
    assert [m["content"] for m in conversation.messages[:3]] == ["the cat", heard, "the dog"]
    assert list(first) == []


def test_without_a_context_given_what_fits_is_taken(folder, monkeypatch):
    engine = talker(folder, "bf16")
    whole = memory.needed(engine.config, engine.scheme, engine.ops, 1, 512).total
    monkeypatch.setattr(engine.ops, "free_bytes", lambda: whole * 5 // 4 + 10)
    assert Conversation(engine).context == 512
    monkeypatch.setattr(engine.ops, "free_bytes", lambda: 1000)
    with pytest.raises(UserError, match="context 128 needs .* not even 128 tokens fit"):
        Conversation(engine)


def test_out_of_memory_in_a_turn_frees_the_cache_and_the_conversation_goes_on(folder, monkeypatch):
    engine = talker(folder)
    conversation = Conversation(engine, ctx=1024)
    say(conversation, "the cat")
    arrays = [weakref.ref(array) for array in conversation.cache.arrays.values()]
    messages, attention = list(conversation.messages), engine.ops.attention

    def refused(*_):
        raise MemoryError("no")

    monkeypatch.setattr(engine.ops, "attention", refused)
    with pytest.raises(Failure, match="out of cpu memory"):
        say(conversation, "and the dog?")
    gc.collect()
    assert conversation.cache is None and conversation.held == [] and all(ref() is None for ref in arrays)
    monkeypatch.setattr(engine.ops, "attention", attention)
    assert conversation.messages == messages
    say(conversation, "and the dog?")
    assert conversation.last.prefilled_tokens == conversation.last.prompt_tokens


def test_a_full_context_is_said_and_the_conversation_stays(folder):
    engine = talker(folder)
    conversation = Conversation(engine, ctx=128)
    say(conversation, "the cat", max_tokens=300)
    assert conversation.last.finish_reason in ("length", "context", "stop")
    messages = list(conversation.messages)
    with pytest.raises(
        UserError, match=r"the conversation would have \d+ tokens, the context holds 128; begin anew or raise --ctx"
    ):
        say(conversation, "the dog saw that " * 30)
    assert conversation.messages == messages
    conversation.reset()
    assert conversation.messages == []
    say(conversation, "the dog")


def test_the_context_is_whole_blocks_and_at_most_the_models(folder):
    engine = talker(folder)
    assert Conversation(engine, ctx=200).context == 256
    assert Conversation(engine).context == 1024
    with pytest.raises(UserError, match="--ctx 1025 is out of range; this model has 1024 positions"):
        Conversation(engine, ctx=1025)


def test_another_turn_draws_other_numbers_from_the_same_seed(folder):
    conversation = Conversation(talker(folder), ctx=1024)
    answers = [say(conversation, "the cat", sampling=Sampling(temperature=1.5, seed=1)) for _ in range(2)]
    assert answers[0] != answers[1]
    again = Conversation(talker(folder), ctx=1024)
    assert [say(again, "the cat", sampling=Sampling(temperature=1.5, seed=1)) for _ in range(2)] == answers


# --- saving


@pytest.mark.parametrize("kv", ["bf16", "oscar", "plain-64-64", "plain-128-128"])
@pytest.mark.parametrize("how", ["interrupted", "undone"])
def test_a_conversation_that_lost_its_window_is_saved_whole(folder, tmp_path, kv, how, monkeypatch, windows):
    """Interrupted in the second layer of a long message, whose tokens come round the ring in the first one; or cut by
    an undo: what is missing of the window is read again before it is written."""
    engine = talker(folder, kv)
    conversation, saved = Conversation(engine, system="the dog", ctx=1024), tmp_path / "c.kv.safetensors"
    for question in QUESTIONS[:4]:
        say(conversation, question)
    with monkeypatch.context() as patch:
        if how == "interrupted":
            calls, attention = iter(range(10**6)), engine.ops.attention

            def interrupted(*args):
                if next(calls) == 1:
                    raise KeyboardInterrupt
                return attention(*args)

            patch.setattr(engine.ops, "attention", interrupted)
            with pytest.raises(KeyboardInterrupt):
                say(conversation, "the mat " * 90)
        else:
            conversation.undo()
    kept = len(conversation.held)
    conversation.save(saved)
    assert kept < len(conversation.held) == conversation.cache.lengths[0] or kv == "bf16"
    after = Conversation(engine, cache=engine.load_cache(saved), ctx=1024)
    assert after.held == conversation.held
    after.turns = conversation.turns
    for one, two in zip(conversation.cache.export_row(0), after.cache.export_row(0), strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)
    assert say(conversation, "so?") == say(after, "so?")


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("kv", ["bf16", "int2", "plain-64-64"])
def test_a_saved_conversation_goes_on_bit_for_bit(folder, tmp_path, kv, turns, windows):
    straight, before = (Conversation(talker(folder, kv), system="the dog", ctx=1024) for _ in range(2))
    for conversation in (straight, before):
        for question in QUESTIONS[:turns]:
            say(conversation, question)
    before.save(tmp_path / "c.kv.safetensors")
    engine = talker(folder, kv)
    after = Conversation(engine, cache=engine.load_cache(tmp_path / "c.kv.safetensors"), ctx=512)
    assert after.messages == straight.messages and after.held == straight.held
    after.turns = straight.turns  # the random numbers of the turn
    assert say(straight, "so?") == say(after, "so?")
    assert straight.last.prefilled_tokens == after.last.prefilled_tokens < 60
    for one, two in zip(straight.cache.export_row(0), after.cache.export_row(0), strict=True):
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_document_begins_a_conversation_and_reset_goes_back_to_it(folder):
    engine = talker(folder)
    document = engine.prefill("the dog saw that the cat sat there. " * 9)
    conversation = Conversation(engine, cache=document, ctx=512)
    assert (conversation.messages, conversation.held) == (document.messages, document.ids)
    say(conversation, "where?")
    assert conversation.messages[0]["content"].endswith("there. \n\nwhere?") and conversation.last.prefilled_tokens < 30
    conversation.reset()
    assert conversation.messages == document.messages
    say(conversation, "who?")
    assert conversation.last.prefilled_tokens < 160  # the block in which the document ends is read again at most


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda e: {"system": "a", "cache": e.prefill("b")}, "a system message cannot"),
        (lambda e: {"system": "", "cache": e.prefill("b")}, "a system message cannot"),
        (lambda e: {"cache": e.prefill([5, 6])}, "it holds token ids"),
        (lambda e: {"cache": e.prefill("b", chat=False)}, "it was made with --raw"),
        (
            lambda e: {"cache": e.prefill("the cat " * 200), "ctx": 256},
            r"prompt cache has \d+ tokens, but the context holds 256",
        ),
        (lambda e: {"cache": talker(e.folder).prefill("b")}, "belongs to another loaded model"),
    ],
)
def test_beginnings_that_cannot_be_are_refused(folder, options, message):
    engine = talker(folder)
    with pytest.raises(UserError, match=message):
        Conversation(engine, **options(engine))


def test_a_model_without_a_chat_template_cannot_chat(tmp_path):
    with pytest.raises(UserError, match="no chat template, so it cannot chat; use generate --raw"):
        Conversation(talker(write_talker(tmp_path / "m", 1, template=None)))


def test_an_empty_conversation_and_an_empty_message_are_refused(folder, tmp_path):
    conversation = Conversation(talker(folder), ctx=256)
    with pytest.raises(UserError, match="no conversation yet"):
        conversation.save(tmp_path / "c")
    with pytest.raises(UserError, match="message is empty"):
        say(conversation, " \n")


@pytest.mark.parametrize("system", [None, "Be a cat."])
def test_what_was_taken_back_is_not_saved(folder, tmp_path, system):
    """/undo and /reset back to the beginning: the file would hold the tokens of messages that it does not have."""
    engine = talker(folder)
    for back in (Conversation.undo, Conversation.reset):
        conversation, path = Conversation(engine, ctx=512, system=system), tmp_path / f"{back.__name__}.safetensors"
        say(conversation, "the dog sat on the mat " * 12)
        back(conversation)
        if system is None:
            with pytest.raises(UserError, match="no conversation yet"):
                conversation.save(path)
            continue
        conversation.save(path)
        saved = engine.load_cache(path)
        assert saved.messages == conversation.messages == [{"role": "system", "content": system}]
        assert saved.ids == engine.render([*saved.messages, {"role": "user", "content": "the dog"}])[: len(saved)]
        again = Conversation(engine, ctx=512, cache=saved)
        assert say(again, "the cat", temperature=0, sampling=None) == say(
            conversation, "the cat", temperature=0, sampling=None
        )


@pytest.mark.parametrize("then", ["save", "reset"])
def test_an_answer_left_standing_ends_where_the_conversation_is_saved_or_reset(folder, tmp_path, then):
    engine = talker(folder)
    conversation = Conversation(engine, ctx=256)
    answer = conversation.say("the cat", max_tokens=9)
    next(answer)
    if then == "save":
        conversation.save(tmp_path / "c.safetensors")
        assert engine.load_cache(tmp_path / "c.safetensors").messages == conversation.messages
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    else:
        conversation.reset()
        assert conversation.messages == [] and list(answer) == []
    assert len(conversation.held) == conversation.cache.lengths[0]


def test_a_template_that_refuses_leaves_the_conversation_as_it_was(tmp_path):
    template = "{% if messages | length > 2 %}{{ raise_exception('enough') }}{% endif %}" + TEMPLATE
    conversation = Conversation(talker(write_talker(tmp_path / "m", 5, template=template)), ctx=256)
    say(conversation, "the cat")
    with pytest.raises(UserError, match="the chat template failed .enough"):
        say(conversation, "the dog")
    assert len(conversation.messages) == 2 and isinstance(conversation.cache, Cache)


# --- taking back and trying again

DRAWN = {"max_tokens": 20, "sampling": Sampling(temperature=1.0, seed=30), "ignore_eos": True}  # long answers differ


def test_undo_takes_one_turn_after_another_back_as_if_they_had_not_been(folder, monkeypatch):
    conversation = Conversation(talker(folder, "bf16"), system="the dog", ctx=1024)
    states = []
    for question in QUESTIONS[:3]:
        states.append(conversation.messages)
        say(conversation, question)
    for state in reversed(states):
        conversation.undo()
        assert conversation.messages == state and conversation.last is None
        rendered = conversation.engine.render([*state, {"role": "user", "content": ""}])
        # no more is held
        assert common(rendered, conversation.held) == len(conversation.held) == conversation.cache.lengths[0]
    with pytest.raises(UserError, match="no answer yet to take back"):
        conversation.undo()
    greedy = {"max_tokens": 20, "sampling": Sampling()}
    fresh = Conversation(talker(folder, "bf16"), system="the dog", ctx=1024)
    assert say(conversation, "so", **greedy) == say(fresh, "so", **greedy)


@pytest.mark.parametrize("kv", ["bf16", "int2", "plain-64-64"])
def test_retry_replaces_the_answer_by_others_and_reads_little(folder, kv, windows):
    conversation = Conversation(talker(folder, kv), ctx=1024)
    say(conversation, QUESTIONS[2])
    first = [say(conversation, "so")]
    asked = conversation.messages[:-1]
    for _ in range(3):
        first.append("".join(conversation.retry(**DRAWN)))
        assert conversation.messages == [*asked, {"role": "assistant", "content": first[-1]}]
        assert conversation.last.prefilled_tokens <= (1 if kv == "bf16" else 128)
    assert len(set(first)) == 4
    greedy = ["".join(conversation.retry(max_tokens=20)) for _ in range(2)]
    assert greedy[0] == greedy[1]
    conversation.undo()
    assert conversation.messages == asked[:-1]


def test_a_retry_without_an_answer_leaves_the_old_one(folder, monkeypatch):
    conversation = Conversation(talker(folder), ctx=1024)
    for use in (conversation.retry, conversation.undo):
        with pytest.raises(UserError, match="no answer yet"):
            use()
    say(conversation, "the cat")
    before = conversation.messages
    with monkeypatch.context() as patch:
        patch.setattr(conversation.engine.model, "forward", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(conversation.retry())
        conversation.retry().close()  # not even begun
    assert conversation.messages == before
    answer = conversation.retry(**DRAWN)
    next(answer)
    conversation.undo()  # in the middle of it: what there is of the answer goes, too
    assert conversation.messages == []


def test_the_last_turn_of_a_saved_conversation_can_be_taken_back_and_a_document_cannot(folder, tmp_path):
    engine = talker(folder)
    before = Conversation(engine, system="the dog", ctx=1024)
    said = [say(before, question) for question in QUESTIONS[:2]]
    before.save(tmp_path / "c.kv.safetensors")
    after = Conversation(engine, cache=engine.load_cache(tmp_path / "c.kv.safetensors"), ctx=1024)
    assert "".join(after.retry(**DRAWN)) and after.messages[:-1] == before.messages[:-1]
    after.undo()
    assert after.messages == before.messages[:-2] and after.messages[-1]["content"] == said[0]
    after.reset()
    assert after.messages == before.messages
    after.undo()
    assert after.messages == before.messages[:-2]
    document = Conversation(engine, cache=engine.prefill("the cat sat"), ctx=1024)
    with pytest.raises(UserError, match="no answer yet"):
        document.undo()
    say(document, "who?")
    document.undo()
    assert document.messages == [{"role": "user", "content": "the cat sat"}]
