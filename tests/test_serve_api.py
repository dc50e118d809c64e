"""The server's protocol, with an engine that says what it is told to: what goes in, what comes out, what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from minioscar.answers import Logprob
from minioscar.errors import Failure
from minioscar.sampling import Sampling
from minioscar.serve.app import App
from minioscar.serve.bodies import Service
from minioscar.serve.jobs import Busy, Event, Job
from minioscar.serve.metrics import Metrics
from minioscar.tokenizer import Tokenizer

from .asgi import Client, request
from .tiny import TEMPLATE, write_talker

HELLO = [{"role": "user", "content": "the cat"}]


class Fake:
    """Says `script` to every prompt: (text, token id, log-probability) or an error, again and again."""

    dead: str | None = None

    def __init__(self, app: App):
        self.app, self.metrics, self.jobs, self.cancelled = app, Metrics(), [], []
        self.script: list[Any] = ["the", " cat"]
        self.reason: str | None = "stop"
        self.busy = False
        app.engine = self

    def submit(self, jobs: list[Job]) -> None:
        if self.busy:
            raise Busy("9 prompts wait already; try again later")
        self.jobs += jobs
        for job in jobs:
            job.scored = [None, *(self._logprob(i, -0.5) for i in job.ids[1:])]
            for index in range(job.options.n):
                self.app.post([(job, one) for one in self._events(job, index)])

    def _events(self, job: Job, index: int) -> list[Event]:
        found = []
        for i, piece in enumerate([] if job.reads_only else self.script):
            if isinstance(piece, Exception):
                return [*found, Event(index, error=piece)]
            has_logprobs = job.options.logprobs is not None
            found.append(Event(index, piece, 100 + i, self._logprob(100 + i, -0.25) if has_logprobs else None))
        return [*found, Event(index, finish_reason=self.reason)] if self.reason else found

    def _logprob(self, token: int, value: float) -> Logprob:
        words = self.app.service.tokenizer
        others = [Logprob(i, words.token_text(i), v) for i, v in ((token, value), (7, -9999.0))]
        return Logprob(token, words.token_text(token), value, tuple(others))

    def cancel(self, jobs: list[Job]) -> None:
        self.cancelled += jobs

    def close(self) -> None:
        pass

    def slots(self) -> list[dict]:
        return []

    def gauges(self) -> dict:
        return {"waiting": (3, "prompts that wait")}


def service(folder, template: str | None = TEMPLATE, **more) -> Service:
    write_talker(folder, 1, template, num_hidden_layers=1)
    return Service("tiny", Tokenizer(folder), 320, 64, 4, Sampling(1.0), **more)


@pytest.fixture
def app(tmp_path) -> App:
    return App(service(tmp_path / "m"))


@pytest.fixture
def engine(app) -> Fake:
    return Fake(app)


@pytest.fixture
def client(app, engine) -> Client:
    return Client(app)


def test_a_chat_is_answered_whole(client, engine):
    got = client.post("/v1/chat/completions", {"messages": HELLO, "model": "gpt-3.5-turbo"})
    assert got.status == 200 and got.headers["content-type"] == "application/json"
    answer = got.json()
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [{
        "index": 0, "message": {"role": "assistant", "content": "the cat", "refusal": None}, "logprobs": None,
        "finish_reason": "stop",
    }]  # fmt: skip
    ids = engine.jobs[0].ids
    assert client.app.service.tokenizer.decode(ids) == "the cat" and answer["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": 2, "total_tokens": len(ids) + 2,
        "prompt_tokens_details": {"cached_tokens": 0}, "cache": {"bytes": 0, "bf16_bytes": 0},
    }  # fmt: skip


@pytest.mark.parametrize("usage", [False, True])
def test_a_chat_is_streamed_in_chunks_with_one_id_and_one_end(client, usage):
    more = {"stream_options": {"include_usage": True}} if usage else {}
    got = client.post("/chat/completions", {"messages": HELLO, "stream": True, "n": 2, **more})
    assert got.headers["content-type"].startswith("text/event-stream")
    chunks = got.events()
    assert len({chunk["id"] for chunk in chunks}) == 1 and {c["object"] for c in chunks} == {"chat.completion.chunk"}
    said = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in range(2):
        mine = [choice for choice in said if choice["index"] == index]
        assert [choice["delta"] for choice in mine] == [
            {"role": "assistant", "content": ""}, {"content": "the"}, {"content": " cat"}, {},
        ]  # fmt: skip
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "stop"]
    if usage:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
    else:
        assert all("usage" not in chunk and len(chunk["choices"]) == 1 for chunk in chunks)


@pytest.mark.parametrize("prompt", ["the cat", ["the cat"], [1, 2], [[1, 2], [3]], ["the", "cat"]])
@pytest.mark.parametrize("stream", [False, True])
def test_completions_take_every_kind_of_prompt(client, engine, prompt, stream):
    body = {"prompt": prompt, "n": 2, "max_tokens": 5, "logprobs": 1, "stream": stream, "return_token_ids": True}
    got = client.post("/v1/completions", body)
    jobs, text = engine.jobs, {}
    assert len(jobs) == (2 if prompt in ([[1, 2], [3]], ["the", "cat"]) else 1)
    assert [job.sequence for job in jobs] == [2 * i for i in range(len(jobs))]
    assert len({job.options.sampling for job in jobs}) == 1 and all(job.continued for job in jobs)
    for chunk in got.events() if stream else [got.json()]:
        assert chunk["object"] == "text_completion"
        for choice in chunk["choices"]:
            text[choice["index"]] = text.get(choice["index"], "") + choice["text"]
            assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"])
    assert text == dict.fromkeys(range(2 * len(jobs)), "the cat")


def test_echo_gives_the_prompt_and_its_log_probabilities_as_lm_evaluation_harness_reads_them(client, engine):
    """Its local-completions sends ids with echo, logprobs=1 and max_tokens=1, and leaves out the last entry."""
    for most in (1, 0):
        engine.script = ["X"] if most else []
        engine.reason = "length"
        body = {"prompt": [[10, 11, 12]], "echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0, "seed": 1}
        choice = client.post("/v1/completions", body).json()["choices"][0]
        logprobs, words = choice["logprobs"], client.app.service.tokenizer
        assert choice["text"] == words.decode([10, 11, 12]) + "X" * most
        assert logprobs["token_logprobs"] == [None, -0.5, -0.5, *[-0.25] * most]
        assert logprobs["tokens"][:3] == [words.token_text(i) for i in (10, 11, 12)]
        assert logprobs["text_offset"][:3] == [0, 1, 2] and logprobs["top_logprobs"][0] is None
        assert max(logprobs["top_logprobs"][1].values()) == -0.5
        assert engine.jobs[-1].reads_only == (most == 0) and engine.jobs[-1].prompt_logprobs == 1


def test_log_probabilities_of_a_chat_have_the_bytes_of_their_tokens(client, engine):
    words = client.app.service.tokenizer
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    for stream in (False, True):
        got = client.post("/v1/chat/completions", body | {"stream": stream})
        if stream:
            choices = [chunk["choices"][0] for chunk in got.events()]
            entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        else:
            entries = got.json()["choices"][0]["logprobs"]["content"]
        assert [entry["logprob"] for entry in entries] == [-0.25, -0.25]
        for i, entry in enumerate(entries):
            assert bytes(entry["bytes"]) == words.token_bytes(100 + i) and len(entry["top_logprobs"]) == 2
            assert entry["top_logprobs"][1]["logprob"] == -9999.0
    high = next(i for i in range(320) if words.token_text(i) == "\ufffd")
    assert len(words.token_bytes(high)) == 1 and words.token_bytes(high)[0] >= 0x80
    assert words.token_bytes(0) == b""  # <|end|>


def test_sampling_is_the_requests_else_the_models(app, client, engine):
    app.service.defaults = Sampling(0.6, top_k=20, top_p=0.95)
    for given, want in (
        ({}, Sampling(0.6, 20, 0.95)), ({"temperature": 0}, Sampling()), ({"top_k": -1, "top_p": 0}, (0.6, 0, 1e-9)),
        ({"temperature": 1.5, "frequency_penalty": 0.5}, Sampling(1.5, 20, 0.95, frequency_penalty=0.5)),
    ):  # fmt: skip
        client.post("/v1/chat/completions", {"messages": HELLO, "seed": 7, **given})
        got = engine.jobs[-1].options.sampling
        if isinstance(want, tuple):
            assert (got.temperature, got.top_k, got.top_p) == want
        else:
            assert got == Sampling(**{**vars(want), "seed": 7})
    client.post("/v1/chat/completions", {"messages": HELLO, "seed": -1})
    assert engine.jobs[-1].options.sampling.seed == 2**64 - 1
    client.post("/v1/chat/completions", {"messages": HELLO})
    client.post("/v1/chat/completions", {"messages": HELLO})
    assert engine.jobs[-1].options.sampling.seed != engine.jobs[-2].options.sampling.seed


def test_max_tokens_is_cut_to_what_there_is_room_for(client, engine):
    size = None
    for most in (10**9, 10**18, None, -1, 3):
        client.post("/v1/chat/completions", {"messages": HELLO, "max_completion_tokens": most})
        size = len(engine.jobs[-1].ids)
        assert engine.jobs[-1].options.max_tokens == (3 if most == 3 else 64 - size + 1)
    client.post("/v1/completions", {"prompt": "the"})
    assert engine.jobs[-1].options.max_tokens == 16


def test_a_prompt_that_does_not_fit_is_refused_before_the_first_byte(client, engine):
    for stream in (False, True):
        body = {"messages": [{"role": "user", "content": "the cat " * 60}], "stream": stream}
        got = client.post("/v1/chat/completions", body)
        error = got.json()["error"]
        assert got.status == 400 and error["code"] == "context_length_exceeded" and error["param"] == "messages"
        assert error["n_ctx"] == 64 < error["n_prompt_tokens"] and error["type"] == "invalid_request_error"
    assert not engine.jobs


CHAT, TEXT = {"messages": HELLO}, {"prompt": "the cat"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [5]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"), ({"messages": [{"role": "user", "content": 5}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": None}]}]}, "messages"),
    *(({**CHAT, **more}, name) for name, more in (
        ("temperature", {"temperature": -1}), ("temperature", {"temperature": "hot"}), ("top_p", {"top_p": -1}),
        ("top_p", {"top_p": 2}), ("top_k", {"top_k": 1.5}), ("top_k", {"top_k": -2}), ("min_p", {"min_p": 3}),
        ("presence_penalty", {"presence_penalty": 1e31}), ("presence_penalty", {"presence_penalty": 9}),
        ("seed", {"seed": 2**64}), ("seed", {"seed": "x"}), ("n", {"n": 0}), ("n", {"n": 5}), ("n", {"n": True}),
        ("max_tokens", {"max_tokens": 0}), ("max_tokens", {"max_tokens": -5}), ("max_tokens", {"max_tokens": 10**30}),
        ("max_completion_tokens", {"max_completion_tokens": "9"}), ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {"include_usage": True}}), ("top_logprobs", {"top_logprobs": 2}),
        ("stream_options", {"stream": True, "stream_options": 3}), ("logprobs", {"logprobs": 5}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}), ("stop", {"stop": [""]}), ("stop", {"stop": 5}),
        ("stop", {"stop": ["x"] * 17}), ("stop", {"stop": "x" * 257}), ("stop_token_ids", {"stop_token_ids": [320]}),
        ("logit_bias", {"logit_bias": {"320": 1}}), ("logit_bias", {"logit_bias": {"-1": 1}}),
        ("logit_bias", {"logit_bias": {"x": 1}}), ("logit_bias", {"logit_bias": {"5": 101}}),
        ("logit_bias", {"logit_bias": {"5": "x"}}), ("logit_bias", {"logit_bias": 5}),
        ("logit_bias", {"logit_bias": {"9" * 5000: 1}}), ("logit_bias", {"logit_bias": {"²": 1}}),
        ("logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}), ("min_tokens", {"min_tokens": -1}),
        ("chat_template", {"chat_template": "{% for i in range(10**10) %}{% endfor %}"}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"chat_template": "x"}}),
        ("messages", {"chat_template_kwargs": {"messages": []}}), ("chat_template_kwargs", {"chat_template_kwargs": 5}),
        ("messages", {"chat_template_kwargs": {"add_generation_prompt": False}}),
        ("messages", {"chat_template_kwargs": {"unknown": 1}}), ("reasoning_effort", {"reasoning_effort": 5}),
        ("response_format", {"response_format": {"type": "yaml"}}), ("response_format", {"response_format": "json"}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
        ("tools", {"tools": [5]}), ("tools", {"tools": [{"type": "function"}]}), ("tools", {"tools": "x"}),
        ("tools", {"tools": [{"type": "retrieval", "function": {"name": "f"}}]}),
        ("tools", {"tools": [{"function": {"name": "f", "parameters": 5}}]}),
        ("tool_choice", {"tool_choice": "required"}), ("tool_choice", {"tool_choice": "maybe"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "g"}}}),
        ("tool_choice", {"tool_choice": {"function": 5}}), ("parallel_tool_calls", {"parallel_tool_calls": 1}),
        ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
        ("continue_final_message", {"continue_final_message": True, "messages": [{"role": "assistant"}]}),
        ("add_generation_prompt", {"add_generation_prompt": "no"}), ("json_schema", {"json_schema": 5}),
        ("echo", {"echo": True}), ("mirostat", {"mirostat": 2}), ("bad_words", {"bad_words": ["x"]}),
        ("skip_special_tokens", {"skip_special_tokens": False}), ("prompt_logprobs", {"prompt_logprobs": 0}),
        ("modalities", {"modalities": ["audio"]}), ("audio", {"audio": {}}), ("functions", {"functions": [{}]}),
        ("cache_prompt", {"cache_prompt": "no"}), ("ignore_eos", {"ignore_eos": 1}), ("model", {"model": 5}),
    )),
]  # fmt: skip
WRONG_TEXT: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"), ({"prompt": [320]}, "prompt"), ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"), ({"prompt": ["x", 1]}, "prompt"), ({"prompt": [True]}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"), ({**TEXT, "logprobs": 21}, "logprobs"), ({**TEXT, "logprobs": True}, "logprobs"),
    ({**TEXT, "max_tokens": 0}, "max_tokens"), ({**TEXT, "best_of": 2}, "best_of"), ({**TEXT, "suffix": "x"}, "suffix"),
    ({**TEXT, "echo": 1}, "echo"), ({"prompt": ["x"] * 1025}, "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("chat/completions", *case) for case in WRONG] + [("completions", *case) for case in WRONG_TEXT],
)
def test_what_cannot_be_is_refused_by_name_and_nothing_is_asked_of_the_engine(client, engine, path, body, param):
    got = client.post(f"/v1/{path}", body)
    error = got.json()["error"]
    assert got.status == 400 and set(error) >= {"message", "type", "param", "code"}, error
    named = error["param"] or error["message"]
    assert param in named and error["message"] and "\n" not in error["message"] and not engine.jobs


def test_what_asks_for_nothing_is_answered_and_unknown_names_are_let_through(client, engine):
    """Clients send the fields of other servers with the values that turn them off."""
    nothing = {"mirostat": 0, "typical_p": 1.0, "bad_words": [], "use_beam_search": False, "grammar": "", "echo": False}
    nothing |= {"skip_special_tokens": True, "repeat_penalty": 1.0, "n_predict": -1, "store": True, "user": "x"}
    assert client.post("/v1/chat/completions", {**CHAT, **nothing}).status == 200 and len(engine.jobs) == 1


def test_a_last_message_is_gone_on_with_where_that_is_asked_for(client, engine):
    said = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": " sat on "}]}]
    for more, end in (
        ({}, " sat on <|end|><|assistant|>"), ({"add_generation_prompt": False}, " sat on <|end|>"),
        ({"continue_final_message": True}, " sat on "),
        ({"continue_final_message": True, "add_generation_prompt": False}, " sat on "),
    ):
        assert prompt_of(client, {"messages": said, **more}) == "<|user|>the cat<|end|><|assistant|>" + end
        assert client.post("/v1/chat/completions", {"messages": said, **more}).status == 200
        words, job = client.app.service.tokenizer, engine.jobs[-1]
        assert job.ids == words.encode("<|user|>the cat<|end|><|assistant|>" + end)
        assert job.continued == ("continue_final_message" in more)


def test_a_body_that_never_comes_is_refused_in_time(app):
    async def asked() -> list[int]:
        sent: list[int] = []

        async def send(message) -> None:
            sent.append(message.get("status"))

        async def receive() -> dict:
            await asyncio.sleep(60)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await app(scope, receive, send)
        return sent

    app.patience = 0.01
    assert asyncio.run(asked())[0] == 408


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"[]", 400), (b"5", 400), (b'{"a": NaN}', 400), (b'{"temperature": 1e999}', 400),
        (b"\xff\xfe\x00", 400), (b"[" * 100_000, 400), (b'{"messages": "' + b"x" * (16 << 20) + b'"}', 413),
        (b'{"seed": ' + b"1" * 5000 + b"}", 400),
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(client, body, status):
    for parts in (1, 7):
        got = client.post("/v1/chat/completions", body, parts=parts)
        assert got.status == status and got.json()["error"]["message"]


def test_other_content_types_are_refused(client):
    got = client.post("/v1/chat/completions", CHAT, headers={"content-type": "text/plain"})
    assert got.status == 415


def test_paths_and_methods_that_are_not_there(client):
    assert client.get("/v1/nothing").status == 404 and client.get("/v1/models/gpt-4").json()["error"]["code"]
    got = client.get("/v1/chat/completions")
    assert got.status == 405 and got.headers["allow"] == "POST" and client.post("/v1/models", {}).status == 405


def test_models_health_and_metrics(client, engine):
    models = client.get("/v1/models").json()
    assert models["data"] == [client.get("/models/tiny").json()] and models["data"][0]["max_model_len"] == 64
    assert client.get("/health").json() == {"status": "ok"}
    text = client.get("/metrics").body.decode()
    assert "minioscar_waiting 3\n" in text and 'minioscar_step_seconds_bucket{le="+Inf"} 0\n' in text
    engine.dead = "the engine has failed"
    assert client.get("/health").status == 503


def test_other_names_of_models_are_refused_where_that_is_asked_for(tmp_path):
    app = App(service(tmp_path / "m", strict=True))
    Fake(app)
    got = Client(app).post("/v1/chat/completions", {**CHAT, "model": "gpt-4"})
    assert got.status == 404 and got.json()["error"]["code"] == "model_not_found"
    assert Client(app).post("/v1/chat/completions", {**CHAT, "model": "tiny"}).status == 200


def test_a_key_is_asked_for_everywhere_but_at_health(app, engine):
    app.key = "sésame"
    client = Client(app)
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "sésame"}, {"x-api-key": "SÉSAME"}):
        got = client.post("/v1/chat/completions", CHAT, headers=headers)
        assert got.status == 401 and got.json()["error"]["type"] == "authentication_error"
    for headers in ({"authorization": "Bearer sésame"}, {"x-api-key": "sésame"}):
        assert client.post("/v1/chat/completions", CHAT, headers=headers).status == 200
    assert client.get("/health").status == 200 and client.get("/v1/models").status == 401


def test_pages_of_this_machine_may_ask_and_others_only_where_that_is_allowed(app, engine):
    def allowed(origin: str) -> bool:
        got = Client(app).get("/health", origin=origin)
        assert got.status == 200
        return got.headers.get("access-control-allow-origin") == origin

    assert allowed("http://localhost:3000") and allowed("https://127.0.0.1") and allowed("http://[::1]:8080")
    assert not any(map(allowed, ("https://evil.example", "http://localhost.evil.example", "null", "file://localhost")))
    app.origins = ("https://good.example",)
    assert allowed("https://good.example") and not allowed("https://evil.example")
    app.origins = ("*",)
    assert allowed("https://evil.example")
    asked = {"origin": "http://localhost", "access-control-request-headers": "x-stainless-os"}
    got = asyncio.run(request(app, "OPTIONS", "/v1/chat/completions", headers=asked))
    assert got.status == 200 and got.headers["access-control-allow-headers"] == "x-stainless-os"


def test_a_full_queue_says_when_to_come_back(client, engine):
    engine.busy = True
    for stream in (False, True):
        got = client.post("/v1/chat/completions", {**CHAT, "stream": stream})
        assert got.status == 503 and int(got.headers["retry-after"]) > 0
        assert "wait already" in got.json()["error"]["message"]


def test_an_error_behind_the_first_byte_is_an_event_and_before_it_a_status(client, engine):
    engine.script = ["the", Failure("out of memory")]
    chunks = client.post("/v1/chat/completions", {**CHAT, "stream": True}).events()
    assert chunks[-1]["error"]["message"] == "out of memory" and chunks[1]["choices"][0]["delta"] == {"content": "the"}
    got = client.post("/v1/chat/completions", CHAT)
    assert got.status == 500 and got.json()["error"]["type"] == "server_error"
    assert engine.cancelled


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_answers(client, engine, stream):
    engine.reason = None  # it never ends
    got = client.post("/v1/completions", {**TEXT, "stream": stream}, leaves=lambda r: not stream or len(r.pieces) > 1)
    assert not got.is_whole and engine.cancelled == engine.jobs and len(engine.jobs) == 1


def test_a_silent_stream_gets_comments(app, engine):
    app.ping, engine.script, engine.reason = 0.02, [], None
    body = {**CHAT, "stream": True}
    got = Client(app).post("/v1/chat/completions", body, leaves=lambda r: r.pieces.count(b":\n\n") > 2)
    assert got.pieces.count(b":\n\n") == 3


def test_a_request_keeps_its_number(client):
    assert client.get("/health", x_request_id="abc").headers["x-request-id"] == "abc"


def test_tokens_without_text_are_told_of_in_a_stream(client, engine):
    engine.script = ["the", "", "", " cat"]
    body = {"prompt": "x", "stream": True, "return_token_ids": True}
    choices = [chunk["choices"][0] for chunk in client.post("/v1/completions", body).events()]
    assert [i for choice in choices for i in choice["token_ids"]] == [100, 101, 102, 103]


def test_text_becomes_tokens_and_back(client):
    words = client.app.service.tokenizer
    ids = client.post("/tokenize", {"content": "the cat"}).json()["tokens"]
    assert ids == words.encode("the cat") and client.post("/detokenize", {"tokens": ids}).json()["content"] == "the cat"
    pieces = client.post("/tokenize", {"content": "the cat", "with_pieces": True}).json()["tokens"]
    assert "".join(piece["piece"] for piece in pieces) == "the cat"
    assert client.post("/detokenize", {"tokens": []}).json() == {"content": ""}
    assert client.post("/detokenize", {"tokens": [10**9]}).status == client.post("/tokenize", {}).status == 400
    prompt = client.post("/apply-template", {"messages": HELLO}).json()["prompt"]
    assert prompt == "<|user|>the cat<|end|><|assistant|>"


# --- messages, tools and thoughts

TOOL_TEMPLATE = (
    "{% for t in tools or [] %}<tool_call>{{ t.function | tojson }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% elif enable_thinking is defined %}<think>{% endif %}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "look", "description": None, "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'


@pytest.fixture
def thinker(tmp_path) -> tuple[Client, Fake]:
    from tokenizers import Tokenizer as Library

    folder = tmp_path / "thinker"
    made = service(folder, TOOL_TEMPLATE)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_tokens(["<think>", "</think>"])
    library.save(str(folder / "tokenizer.json"))
    app = App(Service("tiny", Tokenizer(folder), made.vocab, 900, 4, Sampling()))
    return Client(app), Fake(app)


def prompt_of(client: Client, body: dict[str, Any]) -> str:
    return client.post("/apply-template", body).json()["prompt"]


def test_messages_of_every_year_become_what_templates_know(thinker):
    client, _ = thinker
    call = {"id": None, "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}
    said = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm", "refusal": None},
        {"role": "tool", "tool_call_id": "x", "content": "here"},
        {"role": "assistant", "content": None, "reasoning_content": "so"},
    ]
    assert prompt_of(client, {"messages": said}) == (
        "<|system|>be brief<|end|><|user|>the\ncat<|end|><|assistant|><think>hm</think>look{\"at\": \"é\"}<|end|>"
        "<|tool|>here<|end|><|assistant|><think>so</think><|end|><|assistant|>"
    )
    broken = {"function": {"name": "look", "arguments": '{"at": '}}
    assert '"{\\"at\\": "' in prompt_of(client, {"messages": [{"role": "assistant", "tool_calls": [broken]}]})
    told = prompt_of(client, {"messages": HELLO, "tools": TOOLS})
    assert told.startswith('<tool_call>{"description": "", "parameters"')


def test_a_template_that_knows_no_tools_is_told_of_them(client):
    call = {"function": {"name": "look", "arguments": "{}"}}
    said = [{"role": "system", "content": "be brief"}, *HELLO, {"role": "assistant", "tool_calls": [call]}]
    prompt = prompt_of(client, {"messages": [*said, {"role": "tool", "content": "here"}], "tools": TOOLS})
    assert prompt.startswith("<|system|>be brief\n\nYou may call") and '"name": "look"' in prompt
    assert '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>' in prompt
    assert "<|user|><tool_response>\nhere\n</tool_response><|end|><|assistant|>" in prompt


def test_a_template_that_refuses_says_why(tmp_path):
    app = App(service(tmp_path / "m", "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}"
                                      "{% endif %}{{ messages[0].content }}"))  # fmt: skip
    Fake(app)
    got = Client(app).post("/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}]})
    assert got.status == 400 and "roles must alternate" in got.json()["error"]["message"]
    Fake(broken := App(service(tmp_path / "b", "{% if %}")))
    for more in ({}, {"tools": TOOLS}, {"reasoning_effort": "none"}):
        got = Client(broken).post("/v1/chat/completions", {**CHAT, **more})
        assert got.status == 400 and "the chat template failed" in got.json()["error"]["message"]
    Fake(bare := App(service(tmp_path / "n", None)))
    got = Client(bare).post("/v1/chat/completions", CHAT)
    assert got.status == 400 and "/v1/completions" in got.json()["error"]["message"]


def pieces_of(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_and_thoughts_are_told_from_text_however_it_is_cut(thinker, size):
    client, engine = thinker
    engine.script = pieces_of(f"<think>\nhm</think>\n\nLook: {CALL}\n{CALL}\n", size)
    body = {"messages": HELLO, "tools": TOOLS}
    choice = client.post("/v1/chat/completions", body).json()["choices"][0]
    message = choice["message"]
    assert message["reasoning_content"].strip() == "hm" and message["content"] == "Look:"
    calls = [call["function"] for call in message["tool_calls"]]
    assert calls == [{"name": "look", "arguments": '{"at": "é"}'}] * 2 and choice["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    chunks = [chunk["choices"][0] for chunk in client.post("/v1/chat/completions", {**body, "stream": True}).events()]
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "Look:"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    streamed = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in streamed] == [0, 1] and [call["function"] for call in streamed] == calls
    assert [chunk["finish_reason"] for chunk in chunks][-1] == "tool_calls"
    one = client.post("/v1/chat/completions", {**body, "parallel_tool_calls": False}).json()["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1 and one["finish_reason"] == "tool_calls" and engine.cancelled


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<tool_call>{broken</tool_call> x", "<tool_call>{broken</tool_call> x"), ("a <tool_ca", "a <tool_ca"),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>'), ("a  \n", "a  \n"),
        ('<tool_call>{"na', '<tool_call>{"na'), ("1 < 2 <", "1 < 2 <"), ("<thin", "<thin"), ("  ", "  "),
    ],
)  # fmt: skip
def test_what_only_looks_like_a_call_or_a_thought_is_text(thinker, text, content, size):
    client, engine = thinker
    engine.script = pieces_of(text, size)
    choice = client.post("/v1/chat/completions", {"messages": HELLO, "tools": TOOLS}).json()["choices"][0]
    assert choice["message"]["content"] == content and choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]


def test_thoughts_begin_where_the_prompt_says_so(thinker):
    client, engine = thinker
    for enable, script, want in (
        (True, ["hm", "</think>", "yes"], ("hm", "yes")), (False, ["yes"], (None, "yes")),
        (True, ["hm"], ("hm", "")), (None, ["<think>", "</think>", "yes"], (None, "yes")),
    ):  # fmt: skip
        engine.script = script
        kwargs = {} if enable is None else {"chat_template_kwargs": {"enable_thinking": enable}}
        message = client.post("/v1/chat/completions", {"messages": HELLO, **kwargs}).json()["choices"][0]["message"]
        assert (message.get("reasoning_content"), message["content"]) == want
    client.post("/v1/chat/completions", {"messages": HELLO, "reasoning_effort": "none"})
    words = client.app.service.tokenizer
    assert words.decode(engine.jobs[-1].ids[-2:]) == "<think></think>"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_llama_calls_are_the_whole_answer(tmp_path, size):
    template = '{% if tools %}{"name": , "parameters": {{ tools | tojson }} ipython{% endif %}{{ messages[0].content }}'
    app = App(service(tmp_path / "m", template.replace('{"name": , "parameters": ', '{{ \'"parameters"\' }}')))
    app.service.context = 900
    engine, client = Fake(app), Client(app)
    for text, names, content in (
        ('{"name": "look", "parameters": {}}', ["look"], None), ("{not a call", [], "{not a call"),
        ("so {", [], "so {"),
        ('{"name": "look", "parameters": {}}; {"name": "go", "parameters": {"x": 1}}', ["look", "go"], None),
        ('{"a": 1}', [], '{"a": 1}'), ('{"name": "look"}', ["look"], None),
    ):  # fmt: skip
        engine.script = pieces_of(text, size)
        choice = client.post("/v1/chat/completions", {"messages": HELLO, "tools": TOOLS}).json()["choices"][0]
        calls = [call["function"] for call in choice["message"].get("tool_calls", ())]
        assert [call["name"] for call in calls] == names
        assert all(call["arguments"] == ("{}" if call["name"] == "look" else '{"x": 1}') for call in calls)
        assert choice["message"]["content"] == content
        assert choice["finish_reason"] == ("tool_calls" if names else "stop")


def test_tool_choice_none_leaves_the_tools_out(thinker):
    client, engine = thinker
    engine.script = [CALL]
    body = {"messages": HELLO, "tools": TOOLS, "tool_choice": "none"}
    assert client.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == CALL
    assert "look" not in client.app.service.tokenizer.decode(engine.jobs[-1].ids)


def test_who_opens_the_address_of_the_api_is_told_where_the_page_is(client):
    for path in ("/v1", "/v1/"):
        got = client.get(path)
        assert got.status == 404 and "the page is at /" in got.json()["error"]["message"]
    assert client.get("/").headers["content-type"].startswith("text/html")


def test_a_server_that_ends_takes_nothing_more(app, engine, client):
    app.is_ending = True
    assert client.get("/health").status == 503 and client.post("/v1/chat/completions", CHAT).status == 503


def test_numbers_of_events_are_what_json_has(client, engine):
    """-inf is clipped before it gets here (`answers.likeliest`); a stream has no NaN either way."""
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "stream": True}
    for chunk in client.post("/v1/chat/completions", body).events():
        for choice in chunk["choices"]:
            for entry in (choice["logprobs"] or {}).get("content", ()):
                assert math.isfinite(entry["logprob"])
                assert json.dumps(entry)
