"""The server as users meet it: SmolLM2 behind a socket, asked by OpenAI's own client."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from minioscar import load
from minioscar.serve.server import serve

from .patience import PATIENCE
from .serving import ROOT, Server, server
from .tiny import write_talker

for name in ("uvicorn", "llguidance"):
    pytest.importorskip(name)
openai = pytest.importorskip("openai")
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Server]:
    with server("smollm2-135m", "--slots", "4", "--ctx", "1024", "--chunk", "128") as one:
        yield one


@pytest.fixture
def client(smollm2) -> openai.OpenAI:
    return openai.OpenAI(base_url=smollm2.url, api_key="none", max_retries=0, timeout=PATIENCE)


def test_it_is_ready_when_it_says_so(smollm2):
    assert json.loads(smollm2.get("/health")) == {"status": "ok"}
    assert len([line for line in smollm2.lines if "4 slots of 1024 tokens" in line]) == 1


def test_an_answer_whole_and_streamed_is_the_engines(client):
    how = {"model": "smollm2-135m", "messages": CAPITAL, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**how)
    assert whole.choices[0].message.content == "The capital of France is Paris." and whole.usage.completion_tokens == 7
    with client.chat.completions.stream(**how, stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        last = stream.get_final_completion()
    assert last.choices[0].message.content == whole.choices[0].message.content and last.usage == whole.usage or (
        last.usage.prompt_tokens_details.cached_tokens > 0
    )
    assert last.choices[0].finish_reason == "stop"
    text = client.completions.create(model="x", prompt="The capital of France is", max_tokens=2, temperature=0)
    engine = load("smollm2-135m", device="cpu")
    assert text.choices[0].text == engine.generate("The capital of France is", chat=False, max_tokens=2).text


def test_several_answers_with_log_probabilities_stop_strings_and_seeds(client):
    how = {"model": "x", "messages": CAPITAL, "max_tokens": 30, "seed": 5, "temperature": 1.0, "stop": ["\n", "."]}
    one, two = (client.chat.completions.create(**how, n=3, logprobs=True, top_logprobs=2) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices] and not any("." in text for text in texts)
    for choice in one.choices:
        said = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode()
        assert said.startswith(choice.message.content) and len(choice.logprobs.content[0].top_logprobs) == 2


def test_a_pydantic_model_is_parsed(client):
    from pydantic import BaseModel, Field

    class City(BaseModel):
        name: str = Field(max_length=30)
        inhabitants: int = Field(ge=0, le=99_999_999)
        is_capital: bool

    messages = [{"role": "user", "content": "Describe Paris in JSON."}]
    how = {"model": "x", "messages": messages, "response_format": City, "temperature": 0, "max_tokens": 100}
    city = client.chat.completions.parse(**how).choices[0].message.parsed
    assert isinstance(city, City) and city.name
    with client.chat.completions.stream(**how) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == city


def test_tools_are_called(client):
    tool = {"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
        "additionalProperties": False,
    }}}  # fmt: skip
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    how = {"model": "x", "tools": [tool], "temperature": 0, "max_tokens": 80, "parallel_tool_calls": False}
    choice = client.chat.completions.create(messages=messages, tool_choice="required", **how).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    back = [choice.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sun"}]
    answer = client.chat.completions.create(messages=[*messages, *back], **how).choices[0]
    assert answer.message.content or answer.message.tool_calls


def test_a_second_turn_finds_the_first_in_the_cache(client):
    messages = [{"role": "user", "content": "List the months of the year, one a line. " * 12}]
    how = {"model": "x", "temperature": 0, "max_tokens": 8}
    one = client.chat.completions.create(messages=messages, **how)
    assert one.usage.prompt_tokens > 130
    said = one.choices[0].message.content
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
    two = client.chat.completions.create(messages=messages, **how)
    assert two.usage.prompt_tokens_details.cached_tokens >= 128


def test_errors_are_what_the_client_knows(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="x", messages=[{"role": "user", "content": "word " * 3000}])
    assert error.value.code == "context_length_exceeded" and error.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="x", input="x")
    assert client.models.list().data[0].id == "smollm2-135m"


def test_eight_clients_at_a_time_are_answered(client):
    how = {"model": "x", "temperature": 0, "max_tokens": 12}
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(client.chat.completions.create, messages=CAPITAL, **how) for _ in range(8)]
        texts = [one.result().choices[0].message.content for one in asked]
    assert set(texts) == {"The capital of France is Paris."}


def test_a_client_that_closes_its_stream_frees_the_row(smollm2, client):
    how = {"model": "x", "max_tokens": 900, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(messages=CAPITAL, **how)
    next(iter(stream))
    before = smollm2.metric("cancelled_total")
    stream.close()
    wait_for(lambda: smollm2.metric("cancelled_total") == before + 1 and smollm2.metric("slots_used") == 0)


def wait_for(good, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- a small model from here on: what is tested is the process


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    made = write_talker(tmp_path_factory.mktemp("m") / "tiny", 3, num_hidden_layers=1, max_position_embeddings=8192)
    return str(made)


def test_sigterm_lets_running_answers_end_and_exits_with_0(folder):
    with server(folder, "--slots", "2") as one:
        client = openai.OpenAI(base_url=one.url, api_key="none", max_retries=0, timeout=PATIENCE)
        how = {"model": "x", "prompt": "the cat", "max_tokens": 300, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**how, stream=True)
        first = next(iter(stream))
        one.process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length" and first.id == rest[-1].id
        assert one.process.wait(PATIENCE) == 0
        assert not [line for line in one.lines if "Traceback" in line or "ERROR" in line], one.lines


def test_sigterm_while_it_warms_up_ends_it_too(capsys):
    class Warming:
        dead, is_closed = None, False

        def start(self) -> None:
            signal.raise_signal(signal.SIGTERM)

        def close(self) -> None:
            self.is_closed = True

    scheduler, before = Warming(), signal.getsignal(signal.SIGTERM)
    try:
        with socket.create_server(("127.0.0.1", 0)) as bound:
            serve(None, scheduler, bound, 1, "ready in {:.1f} s".format)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert scheduler.is_closed and "ready" not in capsys.readouterr().err


def test_sigterm_does_not_wait_longer_than_the_grace_time(folder):
    with server(folder, "--slots", "1", "--grace", "1", "--json") as one:
        assert json.loads(one.process.stdout.readline()) == {
            "url": one.url.removesuffix("/v1"), "model": "tiny", "slots": 1, "context": 8192,
        }  # fmt: skip
        client = openai.OpenAI(base_url=one.url, api_key="none", max_retries=0, timeout=PATIENCE)
        how = {"model": "x", "prompt": "the cat", "max_tokens": 8000, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**how, stream=True)
        next(iter(stream))
        one.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the server is shutting down"):  # long before its 8,000 tokens
            list(stream)
        assert one.process.wait(PATIENCE) == 0
        assert not [line for line in one.lines if "Traceback" in line or "ERROR" in line], one.lines


def test_a_second_ctrl_c_leaves_running_answers_no_more_time(folder):
    with server(folder, "--slots", "1") as one:
        client = openai.OpenAI(base_url=one.url, api_key="none", max_retries=0, timeout=PATIENCE)
        how = {"model": "x", "prompt": "the cat", "max_tokens": 8000, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**how, stream=True)
        next(iter(stream))
        waiting = []  # for the one slot, and not streamed
        thread = threading.Thread(target=lambda: waiting.append(answered(one.url, how | {"max_tokens": 9})))
        thread.start()
        while one.metric("waiting") < 1:
            time.sleep(0.01)
        one.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert one.process.poll() is None  # the grace time is 30 seconds
        one.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        thread.join()
        status, retry, body = waiting[0]
        assert (status, retry) == (503, "2") and body["error"]["message"] == "the server is shutting down"
        assert one.process.wait(PATIENCE) == 130
        assert [line for line in one.lines[1:] if line] == ["minioscar: interrupted\n"], one.lines


def answered(url: str, how: dict) -> tuple[int, str | None, dict]:
    """Status, Retry-After and body of a text completion."""
    body = json.dumps({**how, **how["extra_body"]}).encode()
    ask = urllib.request.Request(f"{url}/completions", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(ask, timeout=PATIENCE) as got:
            return got.status, None, json.loads(got.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers["retry-after"], json.loads(error.read())


def test_the_key_may_come_from_the_environment_which_ps_does_not_show(folder):
    with server(folder, "--slots", "1", "--ctx", "256", MINIOSCAR_API_KEY="sesame") as one:
        assert json.loads(one.get("/health")) == {"status": "ok"}
        client = openai.OpenAI(base_url=one.url, api_key="sesame", max_retries=0)
        assert client.models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="x").models.list()


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "minioscar", "serve", "nowhere", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 2 and f"--port {port} cannot be had" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--slots", "0"], "--slots 0"), (["--slots", "257"], "--slots 257"), (["--chunk", "100"], "--chunk 100"),
        (["--queue", "-1"], "--queue -1"), (["--grace", "-1"], "--grace -1"), (["--temperature", "-1"], "temperature"),
        (["--port", "70000"], "--port 70000"), (["--host", "no.such.host.invalid"], "--host no.such"),
        (["--ctx", "999999"], "--ctx 999999"),
        (["--host-cache", "-1"], "--host-cache -1"), (["--host-cache", "1e9"], "this machine has"),
        (["--deadline", "0"], "--deadline 0"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_line(folder, args, why):
    command = [sys.executable, "-m", "minioscar", "serve", folder, "--device", "cpu", "--port", "0", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_random_connections_and_cancellations_mix_nothing_up(folder):
    """200 of them; `make soak` has 2,000."""
    with server(folder, "--slots", "4", "--ctx", "1024", "--chunk", "128", "--queue", "1000") as one:
        assert connect(one, 200, seed=1) > 60


def turns(client: openai.OpenAI, ids: list[int], rng: random.Random, how: dict) -> None:
    """A conversation that goes on with what is cached of it, if that is still there."""
    start = [5, 6, 7] * 30
    for _ in range(rng.randrange(1, 4)):
        ids = [*start, *ids]
        got = client.completions.create(prompt=ids, **how | {"extra_body": {"return_token_ids": True}})
        said, usage = got.choices[0].model_extra["token_ids"], got.usage
        assert len(said) == usage.completion_tokens <= 24 and usage.prompt_tokens == len(ids)
        assert 0 <= usage.prompt_tokens_details.cached_tokens < len(ids)
        start, ids = [], [*ids, *said, *(rng.randrange(4, 250) for _ in range(20))]


def connect(one: Server, times: int, seed: int, different: list | None = None, workers: int = 12) -> int:
    """So many requests, some of which are broken off; how many were answered, each of them rightly: a prompt of its own
    always gets the same answer. different: takes those that are not the same, of a model of so many layers that sums
    which a batch rounds otherwise become other tokens now and then (None: there is none)."""
    rng, client = random.Random(seed), openai.OpenAI(base_url=one.url, api_key="none", max_retries=0, timeout=PATIENCE)
    raw = one.url.removeprefix("http://").removesuffix("/v1").split(":")
    prompts = [[rng.randrange(4, 250) for _ in range(rng.choice([1, 5, 40, 200]))] for _ in range(12)]
    how = {"model": "x", "seed": 1, "max_tokens": 24, "extra_body": {"cache_prompt": False, "return_token_ids": True}}
    want = [client.completions.create(prompt=prompt, **how).choices[0].model_extra["token_ids"] for prompt in prompts]
    answered, lock = [0], threading.Lock()

    def work(number: int) -> None:
        rng = random.Random(f"{seed}:{number}")
        i, kind = rng.randrange(len(prompts)), rng.choice(["whole", "stream", "left", "turns", "cut", "garbage"])
        if kind in ("cut", "garbage"):
            body = json.dumps({"prompt": prompts[i], "max_tokens": 500, "ignore_eos": True}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json"
            head += f"\r\ncontent-length: {len(body)}"
            with socket.create_connection((raw[0], int(raw[1])), 30) as wire:
                sent = head.encode() + b"\r\n\r\n" + body if kind == "cut" else rng.randbytes(300)
                wire.sendall(sent[: rng.randrange(1, len(sent) + 1)] if rng.random() < 0.5 else sent)
                time.sleep(rng.uniform(0, 0.2))
            return
        if kind == "turns":
            turns(client, prompts[i], rng, how)
        if kind in ("whole", "turns"):
            got = client.completions.create(prompt=prompts[i], **how).choices[0].model_extra["token_ids"]
        else:
            got, stop = [], rng.randrange(1, 20) if kind == "left" else 10**9
            with client.completions.create(prompt=prompts[i], stream=True, **how) as stream:
                for chunk in stream:
                    got += chunk.choices[0].model_extra["token_ids"]
                    if len(got) >= stop:
                        break
        is_same = got == want[i][: len(got)] and (kind == "left" or len(got) == len(want[i]))
        assert len(got) <= 24 and (is_same or different is not None), (kind, i)
        with lock:
            answered[0] += kind != "left"
            if not is_same:
                different.append((kind, i))

    with ThreadPoolExecutor(workers) as threads:
        for done in [threads.submit(work, number) for number in range(times)]:
            done.result()
    wait_for(lambda: one.metric("slots_used") == one.metric("waiting") == 0)
    assert one.metric("failed_total") == 0 and json.loads(one.get("/health"))
    return answered[0]
