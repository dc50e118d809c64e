"""What can be asked of a prompt: where its answer ends, penalties, log-probabilities, several answers, each prompt its
own options; and what happens when memory or numbers run out."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minioscar import engine as engine_module
from minioscar.answers import StopText, likeliest
from minioscar.cache import Cache
from minioscar.errors import Failure, UserError
from minioscar.generation import Options
from minioscar.sampling import Sampling, sample

from .tiny import load, talker, write_model, write_talker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("talker") / "model", 5)


@pytest.fixture(scope="module")
def engine(folder):
    return talker(folder)


# --- stop strings


def first_stop(text: str, stops: list[str]) -> str | None:
    """The definition: the text before the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [end - len(s) for s in stops if text[:end].endswith(s)]
        if found:
            return text[: min(found)]
    return None


@settings(max_examples=500, deadline=None, print_blob=True)
@given(
    pieces=st.lists(st.text("abc\n€", max_size=5), max_size=12),
    stops=st.lists(st.text("abc\n€", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces, stops):
    stop, out = StopText(stops), ""
    for piece in pieces:
        out += stop.add(piece)
        if stop.hit:
            break
    whole, wanted = "".join(pieces), first_stop("".join(pieces), stops)
    assert stop.hit == (wanted is not None)
    assert whole.startswith(out) and (out == wanted if stop.hit else out + stop.flush() == whole)


def test_text_that_cannot_be_a_stop_string_is_not_held_back():
    stop = StopText(["END", "\n\n"])
    assert [stop.add(piece) for piece in ("a\n", "b", "cE", "xEN", "y", "EN")] == ["a", "\nb", "c", "Ex", "ENy", ""]
    assert stop.flush() == "EN" and not stop.hit
    assert [stop.add(piece) for piece in ("E", "NDx")] == ["", ""] and stop.hit


def test_generation_ends_at_a_stop_string_and_says_so(engine):
    plain = engine.generate("the cat", max_tokens=40)
    assert len(plain.text) > 10
    middle = plain.text[6:9]
    stopped = engine.generate("the cat", max_tokens=40, stop=[middle, "never so"])
    assert stopped.text == plain.text[: plain.text.index(middle)] and stopped.finish_reason == "stop"
    assert stopped.token_ids == plain.token_ids[: stopped.new_tokens] and stopped.new_tokens < plain.new_tokens
    assert "".join(engine.stream("the cat", max_tokens=40, stop=[middle])) == stopped.text


def test_a_stop_string_in_one_answer_leaves_the_others_alone(engine):
    prompts = ["the cat", "the dog saw"]
    plain = [engine.generate(p, max_tokens=30) for p in prompts]
    middle = plain[0].text[4:7]
    first, second = engine.generate(prompts, max_tokens=30, stop=[middle])
    assert first.finish_reason == "stop" and middle not in first.text
    if middle not in plain[1].text:
        assert second.text == plain[1].text


# --- end tokens, stop ids, min_tokens


def answers(engine, prompts, options, **more):
    run = engine.start(prompts, options=options, **more)
    for _ in run:
        pass
    return run.results


@pytest.fixture
def ending(engine, monkeypatch):
    """The engine with an end token that its greedy answer to "the cat" has, and how many tokens that answer has before
    it."""
    plain = engine.generate("the cat", max_tokens=30, ignore_eos=True).token_ids
    at = next(i for i, token in enumerate(plain) if i > 3 and token not in plain[:i])
    # some files name an end token that the model has not
    monkeypatch.setattr(engine.tokenizer, "eos_ids", frozenset({plain[at], 10**6}))
    return engine, at


def test_an_answer_ends_at_an_end_token_unless_it_is_to_ignore_them(ending):
    engine, at = ending
    stopped, ignoring = (engine.generate("the cat", max_tokens=20, ignore_eos=ignore) for ignore in (False, True))
    assert (stopped.finish_reason, stopped.new_tokens) == ("stop", at) and stopped.token_ids == ignoring.token_ids[:at]
    assert (ignoring.finish_reason, ignoring.new_tokens) == ("length", 20)


def test_stop_ids_end_an_answer_with_and_without_a_tokenizer(engine, tmp_path):
    plain = engine.generate("the cat", max_tokens=20)
    token = plain.token_ids[5]
    for ignore_eos in (False, True):
        stopped = engine.generate("the cat", max_tokens=20, stop_ids=[319, token], ignore_eos=ignore_eos)
        assert stopped.finish_reason == "stop" and stopped.token_ids == plain.token_ids[: plain.token_ids.index(token)]
    bare = load(write_model(tmp_path / "m", 1))
    plain = bare.generate([1, 2], max_tokens=9).token_ids
    assert bare.generate([1, 2], max_tokens=9, stop_ids=plain[4:5]).token_ids == plain[: plain.index(plain[4])]


@pytest.mark.parametrize("wrong", [320, 10**9, 2**63])
def test_a_stop_id_that_the_model_does_not_have_is_refused(engine, wrong):
    with pytest.raises(UserError, match=f"stop id {wrong} is not a token of this model; its tokens are 0 ... 319"):
        engine.generate("the cat", stop_ids=[3, wrong])


@pytest.mark.parametrize("stop", ["<|user|>", "<|end|>"])
@pytest.mark.parametrize("others", [[], ["never so", "<|user|>x", "x<|end|>", "<|nobody|>", "\ud800"]])
def test_a_stop_string_that_is_a_special_token_ends_there(engine, monkeypatch, stop, others):
    """Its text is never seen, so only the token can match; what is not a special token, or has other text, breaks
    nothing."""
    special = engine.tokenizer.special_id(stop)
    monkeypatch.setattr(engine.tokenizer, "eos_ids", frozenset())
    # random logits have it seldom: it is put in the way
    drawn, forward = iter([40, 41, special, 42]), engine.model._logits

    def scripted(*args, **options):
        logits = np.array(forward(*args, **options))
        logits[:, next(drawn)] = 1e4
        return logits

    monkeypatch.setattr(engine.model, "_logits", scripted)
    result = engine.generate("the cat", max_tokens=4, stop=[*others, stop])
    assert (result.token_ids, result.finish_reason) == ([40, 41], "stop")
    drawn = iter([40, 41, special, 42])
    assert engine.generate("the cat", max_tokens=4, stop=[*others, "never"]).token_ids == [40, 41, special, 42]


def test_the_reason_tells_text_from_max_tokens_from_a_full_context(engine):
    plain = engine.generate("the cat", max_tokens=40, ctx=30)
    assert plain.finish_reason == "context" and plain.prompt_tokens + plain.new_tokens == 31
    last = plain.token_ids[-1]
    if last not in plain.token_ids[:-1]:
        assert engine.generate("the cat", max_tokens=40, ctx=30, stop_ids=[last]).finish_reason == "stop"
    end = plain.text[-3:]
    stopped = engine.generate("the cat", max_tokens=40, ctx=30, stop=[end])
    assert stopped.finish_reason == "stop" and end not in stopped.text
    assert engine.generate("the cat", max_tokens=plain.new_tokens, ctx=30).finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_answer_ends_before_min_tokens(ending, temperature):
    engine, at = ending
    for more in (1, 8):
        options = {"max_tokens": at + 12, "min_tokens": at + more, "temperature": temperature, "seed": 5}
        result = engine.generate("the cat", **options)
        assert result.new_tokens >= at + more
        assert not engine.tokenizer.eos_ids & set(result.token_ids)
    assert engine.generate("the cat", max_tokens=20, min_tokens=at).new_tokens == at  # it may end right behind them


def test_stop_strings_are_looked_for_behind_min_tokens(engine):
    plain = engine.generate("the cat", max_tokens=40)
    text = plain.text[6:8]
    result = engine.generate("the cat", max_tokens=40, min_tokens=20, stop=[text])
    assert result.new_tokens > 20 and result.token_ids == plain.token_ids[: result.new_tokens]
    assert result.text.startswith(engine.tokenizer.decode(plain.token_ids[:20])[:-1])


# --- penalties


def test_penalties_change_what_is_drawn_and_not_the_log_probabilities(engine):
    """A frequency penalty on greedy tokens draws each the oftener the seldomer; logprobs stay the model's."""
    plain = engine.generate("the cat", max_tokens=60, ignore_eos=True)
    result = engine.generate(
        "the cat", max_tokens=60, frequency_penalty=2.0, presence_penalty=2.0, ignore_eos=True, logprobs=3
    )
    assert len(set(result.token_ids)) > len(set(plain.token_ids))
    assert all(
        [top.logprob for top in one.top] == sorted((top.logprob for top in one.top), reverse=True)
        for one in result.logprobs
    )
    assert any(one.token_id != one.top[0].token_id for one in result.logprobs)
    again = engine.generate("the cat", max_tokens=60, repetition_penalty=100.0, ignore_eos=True)
    assert len(set(again.token_ids)) > len(set(plain.token_ids))


def test_repetition_counts_the_prompt_also_where_a_prompt_cache_holds_it(engine):
    """A penalty of 0.01 is a reward: the answer has no tokens but the prompt's."""
    ids, options = list(range(40, 80)), {"max_tokens": 12, "ignore_eos": True}
    rewarded = engine.generate(ids, repetition_penalty=0.01, **options).token_ids
    assert set(rewarded) <= set(ids) and not set(engine.generate(ids, **options).token_ids) <= set(ids)
    cache = engine.prefill(ids[:39])
    assert engine.generate(ids[39:], cache=cache, repetition_penalty=0.01, **options).token_ids == rewarded


# --- options of each prompt


def test_each_prompt_may_have_options_of_its_own(engine):
    prompts = ["the cat", "the dog saw", "a", "the cat"]
    options = [
        Options(5, logprobs=2), Options(9, Sampling(1.0, seed=4), n=2),
        Options(12, Sampling(1.0, seed=3, presence_penalty=1.0), stop=["e"]), Options(7, stop_ids=[7], min_tokens=3),
    ]
    together, first = answers(engine, prompts, options), [0, 1, 3, 4]
    for i, (prompt, one) in enumerate(zip(prompts, options, strict=True)):
        alone = answers(engine, [prompt], one, sequences=range(first[i], first[i] + one.n))
        mine = together[first[i] : first[i] + one.n]
        assert [
            (r.text, r.token_ids, r.finish_reason) for r in alone
        ] == [(r.text, r.token_ids, r.finish_reason) for r in mine]
        assert all((r.logprobs is None) == (one.logprobs is None) for r in mine)
    assert len(together) == 5 and together[0].new_tokens == 5 and max(r.new_tokens for r in together[1:3]) <= 9


@pytest.mark.parametrize("wrong", [[Options()], [Options()] * 3, [Options(), None], "ab", Sampling(), [{}, {}], []])
def test_options_that_are_not_one_for_each_prompt_are_refused(engine, wrong):
    with pytest.raises(UserError, match="options"):
        engine.start(["a", "b"], options=wrong)


# --- log-probabilities


def test_logprobs_are_those_of_the_models_own_logits(engine):
    result = engine.generate("the cat", max_tokens=12, logprobs=3)
    ids = engine.encode("the cat")
    # below 128 tokens nothing is quantized
    logits = engine.logits(ids + result.token_ids)[len(ids) - 1 : -1].astype(np.float64)
    want = logits - np.log(
        np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)
    ) - logits.max(1, keepdims=True)
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    for entry, row in zip(result.logprobs, want, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=0.05)  # BF16 in the window
        assert [top.logprob for top in entry.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=0.05)
        assert entry.top[0].token_id == entry.token_id and entry.token == engine.tokenizer.decode([entry.token_id])


def test_asking_for_logprobs_changes_no_token(engine):
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=4)
    plain, asked = (engine.generate(["the cat", "a"], max_tokens=30, sampling=sampling, logprobs=k) for k in (None, 0))
    assert [r.token_ids for r in plain] == [r.token_ids for r in asked]
    assert plain[0].logprobs is None and all(entry.top == () for entry in asked[0].logprobs)


def test_likeliest_is_sorted_normalized_and_ties_go_to_the_lower_id():
    logits = np.array([1, 3, 2, 3, 0], np.float32)
    token, *top = likeliest(logits, 4, 3)
    assert [i for i, _ in top] == [1, 3, 2] and token[0] == 4
    assert np.exp([value for _, value in likeliest(logits, 0, 5)[1:]]).sum() == pytest.approx(1)
    assert likeliest(logits, 2, 0) == [(2, pytest.approx(2 - np.log(np.exp(logits.astype(float)).sum())))]


# --- several answers


@pytest.mark.parametrize("kv", ["bf16", "int2"])
def test_n_answers_are_those_of_as_many_equal_prompts(folder, kv):
    engine, sampling = talker(folder, kv), Sampling(temperature=1.0, seed=11)
    prompts = ["the cat sat on the mat " * 12, "the dog"]
    run = engine.start(prompts, options=Options(max_tokens=20, sampling=sampling, n=3))
    for _ in run:
        pass
    want = engine.generate([p for p in prompts for _ in range(3)], max_tokens=20, sampling=sampling)
    assert [r.token_ids for r in run.results] == [r.token_ids for r in want]
    assert len({tuple(r.token_ids) for r in run.results[:3]}) == 3


def test_n_answers_read_their_prompt_once(engine, monkeypatch):
    seen, forward = [], engine.model._logits
    monkeypatch.setattr(engine.model, "_logits", lambda ids, *rest: seen.append(len(ids)) or forward(ids, *rest))
    for _ in engine.start(["the cat"], options=Options(max_tokens=3, n=4, sampling=Sampling(temperature=1.0))):
        pass
    assert seen[0] == len(engine.encode("the cat")) and seen[1] <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": "text"}, "list of strings"),
        ({"stop": [3]}, "list of strings"),
        ({"logprobs": -1}, "logprobs -1"),
        ({"logprobs": 101}, "logprobs 101"),
        ({"n": 0}, "n 0 is out of range"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        Options(**options)


def test_a_stop_string_needs_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="without a tokenizer"):
        load(write_model(tmp_path / "m", 1)).generate([1, 2], stop=["x"])


# --- passes that end midway


def break_at(engine, monkeypatch, call: int, error: type[BaseException], *args) -> None:
    """The given call of the attention operation raises, the ones before and after do what they do."""
    calls, attention = iter(range(10**6)), engine.ops.attention

    def attend(*operands):
        if next(calls) == call:
            raise error(*args)
        return attention(*operands)

    monkeypatch.setattr(engine.ops, "attention", attend)


@pytest.mark.parametrize("kv", ["bf16", "oscar", "int2", "int2-compact"])
@pytest.mark.parametrize("held", [5, 127, 128, 200, 300])
def test_a_pass_that_broke_off_leaves_a_cache_that_goes_on_from_its_last_whole_block(
    folder, kv, held, seed, monkeypatch
):
    """The second layer fails, the first has the new tokens already: what is read later must be as if they had never
    come."""
    engine, rng = talker(folder, kv), np.random.default_rng(seed)
    ids, more = rng.integers(0, 320, held).tolist(), rng.integers(0, 320, 150).tolist()
    cache = Cache(engine.config, engine.scheme, 1, 512, engine.ops)
    engine.model.forward(np.array(ids), cache, cache.batch_for([0], [held]))
    kept = engine.scheme.packed_tokens(held) if engine.scheme.quantized else held
    want = Cache(engine.config, engine.scheme, 1, 512, engine.ops)
    for name, array in cache.arrays.items():
        want.arrays[name][:] = array
    want.lengths[0] = held
    want.rollback(want.batch_for([0], [150]))  # of a pass that did nothing
    with monkeypatch.context() as patch:
        break_at(engine, patch, 1, KeyboardInterrupt)
        batch = cache.batch_for([0], [150])
        with pytest.raises(KeyboardInterrupt):
            engine.model.forward(np.array(more), cache, batch)
        cache.rollback(batch)
    assert cache.lengths[0] == want.lengths[0] == kept
    rest = np.array((ids + more)[kept:])
    got, expected = (engine.model.forward(rest, c, c.batch_for([0], [len(rest)])) for c in (cache, want))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("call", [0, 1, 2, 5])
def test_out_of_memory_frees_the_cache_names_a_context_that_fits_and_the_engine_goes_on(engine, monkeypatch, call):
    arrays = []
    real = Cache.__init__

    def watched(self, *args):
        real(self, *args)
        arrays.extend(weakref.ref(array) for array in self.arrays.values())

    monkeypatch.setattr(Cache, "__init__", watched)
    with monkeypatch.context() as patch:
        break_at(engine, patch, call, MemoryError, "Out of memory allocating 1,000 bytes")
        message = r"out of cpu memory \(Out of memory allocating 1,000 bytes, after \d+ tokens.*--ctx 1024 fits"
        with pytest.raises(Failure, match=message) as error:
            engine.generate("the cat", max_tokens=8)
        gc.collect()
        assert arrays and all(ref() is None for ref in arrays), "the cache is still alive while its error is handled"
        assert "\n" not in str(error.value)
    assert engine.generate("the cat", max_tokens=3).new_tokens == 3


def test_a_cache_that_cannot_be_allocated_is_one_line_too(engine, monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr(engine_module, "Cache", refuse)
    with pytest.raises(Failure, match="out of cpu memory"):
        engine.generate("the cat")


def test_logits_that_are_not_finite_are_an_error_and_not_a_token(folder):
    engine = talker(folder)
    engine.model.weights.layers[1].down[3, 5] = np.nan
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(Failure, match="logits are not finite; run again with --debug"):
            engine.generate("the cat", sampling=sampling)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_sampling_draws_from_logits_that_are_not_finite(bad):
    with pytest.raises(Failure, match="not finite"):
        sample(np.array([1, bad, 2], np.float32), Sampling(), 0, 0)
    assert sample(np.array([1, -np.inf, 2], np.float32), Sampling(temperature=1e-310), 0, 0) == 2


def test_min_tokens_with_every_token_a_stop_id_is_refused(engine):
    with pytest.raises(UserError, match="min_tokens 1 leaves no token to draw"):
        engine.generate([1, 2], max_tokens=2, min_tokens=1, stop_ids=range(engine.config.vocab_size))
    assert engine.generate([1, 2], max_tokens=2, stop_ids=range(engine.config.vocab_size)).finish_reason == "stop"
