"""Answers that follow a grammar, from a model of random weights: whatever it would say, it cannot say anything else."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from minioscar.sampling import Sampling
from minioscar.serve import server
from minioscar.serve.messages import Tool
from minioscar.serve.structured import calls_grammar

from .asgi import Client
from .test_serve_api import TOOL_TEMPLATE
from .tiny import talker, write_talker

pytest.importorskip("llguidance")
HELLO = [{"role": "user", "content": "the cat"}]
PERSON = {
    "type": "object", "required": ["name", "age", "kind"], "additionalProperties": False, "$defs": {
        "kind": {"enum": ["cat", "dog"]},
    }, "properties": {
        "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"$ref": "#/$defs/kind"},
    },
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "meet", "parameters": PERSON}},
    {"type": "function", "function": {"name": "go", "parameters": {
        "type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"],
        "additionalProperties": False,
    }}},
    {"type": "function", "function": {"name": "stay"}},
]  # fmt: skip


def client_of(folder, template: str = TOOL_TEMPLATE, thinks: bool = False) -> Iterator[Client]:
    write_talker(folder, 7, template, num_hidden_layers=1, max_position_embeddings=2048)
    if thinks:
        from tokenizers import Tokenizer as Library

        library = Library.from_file(str(folder / "tokenizer.json"))
        library.add_tokens(["<think>", "</think>"])
        library.save(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        assert library.get_vocab_size() <= config["vocab_size"] + 2
    engine = talker(folder)
    app, scheduler = server.assemble(engine, server.Plan(3, 1024, 256, None, "tiny"), Sampling(1.0))
    scheduler.start()
    yield Client(app)
    scheduler.close()


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Client]:
    yield from client_of(tmp_path_factory.mktemp("m") / "m")


def answer(client: Client, **body) -> dict:
    got = client.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 300, **body})
    assert got.status == 200, got.body
    return got.json()["choices"][0]


def is_person(value: dict) -> bool:
    assert set(value) == {"name", "age", "kind"} and value["kind"] in ("cat", "dog") and 0 <= value["age"] <= 99
    return len(value["name"]) <= 8


def schema(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_an_answer_follows_its_schema(client, temperature):
    for seed in range(4):
        choice = answer(client, response_format=schema(PERSON), temperature=temperature, seed=seed)
        assert is_person(json.loads(choice["message"]["content"])) and choice["finish_reason"] == "stop"
    got = client.post("/v1/completions", {"prompt": "x", "response_format": schema({"enum": ["cat", "dog"]}), "n": 3})
    assert {choice["text"] for choice in got.json()["choices"]} <= {'"cat"', '"dog"'}
    assert answer(client, json_schema={"const": "cat"})["message"]["content"] == '"cat"'  # as llama.cpp takes it


def test_any_object_is_an_object(client):
    choice = answer(client, response_format={"type": "json_object"}, max_tokens=1000, seed=1)
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)


def test_free_answers_beside_it_are_what_they_are_alone(client):
    """A step with a mask runs alone; that changes nothing for the others."""
    import asyncio

    from .asgi import request

    free = {"messages": HELLO, "max_tokens": 40, "seed": 3, "ignore_eos": True, "cache_prompt": False, "logprobs": True}
    bound = {"messages": HELLO, "max_tokens": 300, "response_format": schema(PERSON), "cache_prompt": False}
    want = client.post("/v1/chat/completions", free).json()["choices"]

    async def both() -> list:
        bodies = [free, bound, bound, free, bound]
        ask = (request(client.app, "POST", "/v1/chat/completions", json.dumps(body).encode()) for body in bodies)
        return [got.json()["choices"] for got in await asyncio.gather(*ask)]

    found = asyncio.run(both())
    assert all(is_person(json.loads(found[i][0]["message"]["content"])) for i in (1, 2, 4))
    for choices in (found[0], found[3]):
        assert choices[0]["message"] == want[0]["message"]


@pytest.mark.parametrize("form", ["hermes", "llama3"])
def test_a_call_that_is_required_comes_and_its_arguments_follow_their_schema(client, tmp_path, form):
    if form == "llama3":
        told = "{% if tools %}{{ '\"parameters\"' }} ipython{{ tools | tojson }}{% endif %}"
        template = told + "{{ messages[0].content }}"
        makes = client_of(tmp_path / "m", template)
        client = next(makes)
    names = set()
    for seed in range(12):
        how = {"parallel_tool_calls": False, "seed": seed, "temperature": 3.0}
        choice = answer(client, tools=TOOLS, tool_choice="required", **how)
        call = choice["message"]["tool_calls"][0]["function"]
        names.add(call["name"])
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        arguments = json.loads(call["arguments"])
        assert call["name"] != "meet" or is_person(arguments)
        assert call["name"] != "go" or set(arguments) == {"far"}
    named = {"type": "function", "function": {"name": "go"}}
    for stream in (False, True):
        body = {"messages": HELLO, "tools": TOOLS, "tool_choice": named, "stream": stream, "max_tokens": 300}
        got = client.post("/v1/chat/completions", {**body, "parallel_tool_calls": False})
        if stream:
            deltas = [chunk["choices"][0]["delta"] for chunk in got.events()]
            calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        else:
            calls = got.json()["choices"][0]["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == ["go"]
    assert len(names) > 1
    if form == "llama3":
        makes.close()


def test_a_function_that_is_named_is_called_once(client):
    named = {"type": "function", "function": {"name": "go"}}
    for seed in range(12):
        choice = answer(client, tools=TOOLS, tool_choice=named, seed=seed, temperature=3.0, max_tokens=900)
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["go"]
        assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"


def test_several_calls_may_follow_one_another(client):
    choice = answer(client, tools=TOOLS[1:2], tool_choice="required", seed=3, max_tokens=900)
    assert len(choice["message"]["tool_calls"]) >= 1
    for call in choice["message"]["tool_calls"]:
        assert set(json.loads(call["function"]["arguments"])) == {"far"}


def test_thoughts_are_free_and_what_follows_is_not(tmp_path):
    makes = client_of(tmp_path / "m", thinks=True)
    client = next(makes)
    end = client.app.service.tokenizer.token_id("</think>")
    thoughts = ""
    for i in range(3):
        body = {"response_format": schema(PERSON), "chat_template_kwargs": {"enable_thinking": True}, "seed": i}
        choice = answer(client, **body, logit_bias={str(end): 3}, ignore_eos=True, max_tokens=700)
        message = choice["message"]
        thoughts += message.get("reasoning_content", "")
        assert is_person(json.loads(message["content"]))
    assert thoughts
    makes.close()


@pytest.mark.parametrize(
    "bad",
    [
        {"type": 123}, {"type": "hiccup"}, 123, "x", [], {"$ref": "#/nowhere"}, {"pattern": "(", "type": "string"},
        {"type": "object", "properties": 5}, {"enum": ["x" * 70_000]}, {"allOf": [False, True]},
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_and_disturbs_nobody(client, bad):
    got = client.post("/v1/chat/completions", {"messages": HELLO, "response_format": schema(bad)})
    assert got.status == 400, got.body
    assert got.json()["error"]["param"] == "response_format"
    assert answer(client, max_tokens=2)


def test_a_schema_without_end_is_refused(client):
    deep: dict = {"type": "string"}
    for _ in range(500):
        deep = {"type": "array", "items": deep}
    got = client.post("/v1/chat/completions", {"messages": HELLO, "response_format": schema(deep)})
    assert got.status == 400 and "nested" in got.json()["error"]["message"]
    one = {"type": "string", "pattern": "(a|b)*c{1,400}"}
    wide = {"type": "object", "properties": {f"p{i}": one for i in range(900)}}
    got = client.post("/v1/chat/completions", {"messages": HELLO, "response_format": schema(wide), "max_tokens": 2})
    assert got.status == 400 and "too complex" in got.json()["error"]["message"]
    assert answer(client, max_tokens=2)


def test_a_bias_bans_and_forces_tokens(client):
    words = client.app.service.tokenizer
    the = words.encode("the")[0]
    choice = answer(client, logit_bias={str(the): 100}, max_tokens=5, temperature=0)
    assert choice["message"]["content"] == "the" * 5
    choice = answer(client, logit_bias={str(the): -100}, max_tokens=40, seed=1, ignore_eos=True)
    ids = client.post("/v1/completions", {
        "prompt": [5, 6], "logit_bias": {str(i): -100 for i in range(300)}, "max_tokens": 30, "return_token_ids": True,
    }).json()["choices"][0]["token_ids"]  # fmt: skip
    assert len(ids) == 30 and np.min(ids) >= 300


def test_each_tool_has_a_rule_and_a_root_of_its_own():
    text = calls_grammar([Tool("a", PERSON), Tool("b", {})], "hermes", True)
    assert text.splitlines()[0] == 'start: call ("\\n" call)*' and text.count("%json") == 2
