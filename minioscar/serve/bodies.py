"""Bodies of requests -> jobs for the scheduler, everything checked before any of them is taken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import shown
from ..ops.sample import MAX_BIASES, MAX_ENDS
from ..options import Options
from ..sampling import Sampling
from ..tokenizer import Tokenizer
from ..towers.media import Tower, expanded, media_of, opened
from . import fields, messages, parsing
from .errors import ApiError, of_field, wrong
from .jobs import Job
from .structured import Grammars

MAX_STOPS, MAX_STOP, MAX_TOP, MAX_PROMPTS = 16, 256, 20, 1024
SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
REFUSED = {  # what changes an answer and is not there: name -> the values that ask for nothing
    "best_of": (1,), "suffix": ("",), "audio": (), "functions": ([],), "function_call": ("none", "auto"),
    "chat_template": (), "web_search_options": (), "prediction": (), "documents": ([],),
    # of vLLM and SGLang
    "guided_json": (), "guided_regex": ("",), "guided_choice": ([],), "guided_grammar": ("",), "regex": ("",),
    "ebnf": ("",), "structured_outputs": ({},), "structural_tag": ("",), "bad_words": ([],), "stop_regex": ("", []),
    "use_beam_search": (False,), "length_penalty": (1,), "prompt_logprobs": (), "logprob_token_ids": ([],),
    "truncate_prompt_tokens": (), "prompt_embeds": ([],), "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,), "return_tokens_as_token_ids": (False,), "logits_processors": ([],),
    "custom_logit_processor": ("",), "thinking_token_budget": (-1,),
    # of llama.cpp and those who speak to it
    "grammar": ("",), "mirostat": (0,), "typical_p": (1,), "tfs_z": (1,), "dynatemp_range": (0,),
    "dry_multiplier": (0,), "xtc_probability": (0,), "repeat_penalty": (1,), "n_predict": (-1,), "n_probs": (0,),
    "t_max_predict_ms": (0, -1), "lora": ([],),
}  # fmt: skip


@dataclass
class Service:
    """What requests are checked against. defaults: how tokens are drawn where a request does not say. context, slots:
    tokens and rows of the cache. strict: refuse other names of models. kv: the cache's scheme; bytes_of: of a row of so
    many tokens, in this scheme and in BF16."""

    name: str
    tokenizer: Tokenizer
    vocab: int
    context: int
    slots: int
    defaults: Sampling
    strict: bool = False
    kv: str = "bf16"
    bytes_of: Callable[[int], tuple[int, int]] = lambda tokens: (0, 0)
    towers: Mapping[str, Tower] = field(default_factory=dict)  # what reads pictures, videos and sound
    images: Path | None = None  # the folder whose pictures and videos requests may name
    media_tokens: int | None = None  # the most of a picture, a sound, or what is read of a video at a time

    def __post_init__(self) -> None:
        self.grammars = Grammars(self.tokenizer, self.vocab)
        self.seeds = itertools.count(2**63)  # of requests that bring none: the same ones on every fresh server


@dataclass
class Asked:
    """A request that can be answered. prompts: their texts, for echo; parsers: what makes a parser of one answer."""

    jobs: list[Job]
    chat: bool
    stream: bool = False
    usage: bool = False
    echo: bool = False
    token_ids: bool = False
    prompts: Sequence[str] = ()
    thinking: bool | None = None
    calls: str | None = None
    one_call: bool = False

    @property
    def n(self) -> int:
        return self.jobs[0].options.n

    def parser(self) -> parsing.Parser:
        return parsing.Parser(self.thinking, self.calls)


def chat(body: fields.Body, service: Service) -> Asked:
    """Of /v1/chat/completions. Raises ApiError."""
    _check(body, service)
    if fields.switch(body, "echo"):
        raise wrong("echo", "echo is of /v1/completions; leave it out")
    said, tools = messages.messages_of(body, service.images), messages.tools_of(body)
    with of_field("messages"):
        said = opened(said, service.towers, service.media_tokens)
    media = media_of(said)
    choice, callable = messages.choice_of(body, tools)
    end, given = messages.end_of(body), variables(body, service)
    text = messages.rendered(service.tokenizer, said, tools if choice != "none" else (), given, end)
    with of_field("messages"):
        ids = expanded(service.tokenizer.rendered_ids(text, bool(service.towers)), media, service.towers)
    knows = service.tokenizer.token_id(parsing.THINK) is not None
    thinking = parsing.is_thinking(text) if knows else None
    form = messages.form_of(service.tokenizer.template) if choice != "none" else None
    is_named = isinstance(body.get("tool_choice"), dict)  # with OpenAI, one call of that function
    several = fields.switch(body, "parallel_tool_calls", True) and not is_named
    grammar = None
    if choice == "required":
        grammar = service.grammars.calls(callable, form, several, bool(thinking))
    elif schema := schema_of(body):
        grammar = service.grammars.json(*schema, bool(thinking))
    k = fields.whole(body, "top_logprobs", 0, MAX_TOP)
    has_logprobs = fields.switch(body, "logprobs")
    if k is not None and not has_logprobs:
        raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
    most = most_tokens(body, None, 1)
    options = options_of(body, service, ids, most, (k or 0) if has_logprobs else None)
    cached = fields.switch(body, "cache_prompt", True)
    goes_on = end == "continue"
    job = Job(ids, options, bias=bias_of(body, service), matcher=grammar, cache_prompt=cached)
    job.continued, job.media = goes_on, media
    checked([job], service)
    return Asked([job], True, *streaming(body), thinking=thinking, calls=form, one_call=not several)


def completion(body: fields.Body, service: Service) -> Asked:
    """Of /v1/completions. Raises ApiError."""
    _check(body, service)
    prompts = prompts_of(body, service)
    echo, k = fields.switch(body, "echo"), fields.whole(body, "logprobs", 0, MAX_TOP)
    most = most_tokens(body, 16, 0 if echo else 1)
    schema, jobs = schema_of(body), []
    grammar = service.grammars.json(*schema, False) if schema else None
    bias, cached = bias_of(body, service), fields.switch(body, "cache_prompt", True)
    for prompt in prompts:
        options = options_of(body, service, prompt, most or 1, k)
        if jobs:  # the prompts of a request draw from one seed, as sequences of their own
            options = replace(options, sampling=jobs[0].options.sampling)
        jobs.append(Job(
            prompt, options, sequence=len(jobs) * options.n, bias=bias, matcher=grammar, continued=True,
            cache_prompt=cached, prompt_logprobs=k if echo else None, reads_only=most == 0,
        ))  # fmt: skip
    checked(jobs, service)
    texts = [service.tokenizer.decode(prompt) for prompt in prompts] if echo else ()
    token_ids = fields.switch(body, "return_token_ids")
    return Asked(jobs, False, *streaming(body), echo=echo, token_ids=token_ids, prompts=texts)


def _check(body: fields.Body, service: Service) -> None:
    for name, nothing in REFUSED.items():
        if body.get(name) is not None and body[name] not in nothing:
            raise wrong(name, f"{name} is not supported; leave it out")
    if body.get("modalities") not in (None, ["text"]):
        raise wrong("modalities", 'modalities must be ["text"]; this model writes text alone')
    model = fields.text(body, "model")
    if service.strict and model not in (None, service.name):
        raise ApiError(404, f"there is no model {shown(model)}; this is {service.name}", "model", "model_not_found")


def variables(body: fields.Body, service: Service) -> dict[str, Any]:
    """What the chat template is given beside the messages."""
    found = fields.mapping(body, "chat_template_kwargs")
    effort = fields.text(body, "reasoning_effort")
    if effort and messages.reads(service.tokenizer, "reasoning_effort"):
        found.setdefault("reasoning_effort", effort)
    elif effort == "none" and messages.reads(service.tokenizer, "enable_thinking"):
        found.setdefault("enable_thinking", False)
    return found


def streaming(body: fields.Body) -> tuple[bool, bool]:
    """stream, and stream_options.include_usage."""
    stream, options = fields.switch(body, "stream"), fields.mapping(body, "stream_options")
    if body.get("stream_options") is not None and not stream:
        raise wrong("stream_options", "stream_options needs stream: true")
    return stream, fields.switch(options, "include_usage")


def prompts_of(body: fields.Body, service: Service) -> list[list[int]]:
    given, tokenizer = body.get("prompt"), service.tokenizer
    several = isinstance(given, list) and bool(given) and isinstance(given[0], str | list)
    if several and len(given) > MAX_PROMPTS:
        raise wrong("prompt", f"prompt has {len(given)} entries; at most {MAX_PROMPTS} can be")
    prompts = []
    for one in given if several else [given]:
        if isinstance(one, str):
            with of_field("prompt"):
                ids = tokenizer.prompt_ids(one)
            if not ids:
                raise wrong("prompt", "the prompt is empty, or becomes no tokens; give it some text")
            prompts.append(ids)
        elif isinstance(one, list):
            prompts.append(fields.token_ids(one, "prompt", service.vocab))
        else:
            raise wrong("prompt", "prompt must be text, a list of texts, token ids, or a list of lists of them")
    return prompts


def most_tokens(body: fields.Body, default: int | None, least: int) -> int | None:
    """max_tokens, which is max_completion_tokens, too; None or -1: as many as there is room for."""
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            most = fields.whole(body, name, -1, 2**63)
            if most != -1 and most < least:
                raise wrong(name, f"{name} {most} is out of range; it must be at least {least}")
            return None if most == -1 else most
    return default


def options_of(
    body: fields.Body, service: Service, ids: Sequence[int], most: int | None, logprobs: int | None
) -> Options:
    """max_tokens beyond the context is cut to what there is room for."""
    room = service.context - len(ids) + 1  # the last token need not be in the cache
    if room < 1:
        raise ApiError(
            400, f"the prompt has {len(ids)} tokens, but the context holds {service.context}; shorten it", "messages"
            if "messages" in body else "prompt", "context_length_exceeded", n_prompt_tokens=len(ids),
            n_ctx=service.context,
        )  # fmt: skip
    most = room if most is None else min(most, room)
    n = fields.whole(body, "n", 1, service.slots, 1)
    stops = body.get("stop")
    stops = [stops] if isinstance(stops, str) else fields.items(body, "stop", MAX_STOPS)
    if any(not isinstance(stop, str) or not stop or len(stop) > MAX_STOP for stop in stops):
        raise wrong("stop", f"stop must be text of 1 to {MAX_STOP} characters, or a list of up to {MAX_STOPS} of them")
    ids = body.get("stop_token_ids") or ()
    ids = fields.token_ids(ids, "stop_token_ids", service.vocab) if ids else ()
    least = fields.whole(body, "min_tokens", 0, 2**31 - 1, 0)
    with of_field():
        options = Options(
            max_tokens=most, sampling=sampling_of(body, service), stop=stops, logprobs=logprobs, n=n, stop_ids=ids,
            min_tokens=min(least, most), ignore_eos=fields.switch(body, "ignore_eos"),
        )
        ends = options.ends(service.tokenizer, service.vocab)
    if options.min_tokens and len(ends) > MAX_ENDS:
        raise wrong("stop_token_ids", f"with min_tokens there can be {MAX_ENDS} end tokens; these are {len(ends)}")
    return options


def sampling_of(body: fields.Body, service: Service) -> Sampling:
    """What the request says, else what the model's authors recommend; temperature 0 is greedy, whatever they say."""
    given: dict[str, Any] = {name: value for name in SAMPLING if (value := fields.number(body, name)) is not None}
    top_k = fields.whole(body, "top_k", -1, 2**31 - 1)
    if top_k is not None:
        given["top_k"] = max(top_k, 0)
    if given.get("top_p") == 0:  # the likeliest token alone
        given["top_p"] = 1e-9
    seed = fields.whole(body, "seed", -(2**63), 2**64 - 1)
    given["seed"] = next(service.seeds) if seed is None else seed % 2**64
    with of_field():
        return Sampling(**given) if given.get("temperature") == 0 else replace(service.defaults, **given)


def bias_of(body: fields.Body, service: Service) -> tuple[tuple[int, float], ...]:
    given = body.get("logit_bias")
    if isinstance(given, list):  # [[id, bias], ...], as llama.cpp takes it, too
        given = dict(given) if all(isinstance(one, list) and len(one) == 2 for one in given) else 0
    if given is not None and not isinstance(given, Mapping):
        raise wrong("logit_bias", "logit_bias must be an object, token id -> bias")
    if len(given or ()) > MAX_BIASES:
        raise wrong("logit_bias", f"logit_bias has {len(given)} entries; at most {MAX_BIASES} can be")
    found: dict[int, float] = {}
    for token, bias in (given or {}).items():
        digits = str(token)
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 9 or int(digits) >= service.vocab:
            last = service.vocab - 1
            raise wrong("logit_bias", f"logit_bias names {shown(token)}; this model's tokens are 0 ... {last}")
        if bias is False:  # llama.cpp: never
            bias = -100
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise wrong("logit_bias", f"logit_bias of {token} is {shown(bias)}; it must be from -100 to 100")
        found[int(digits)] = float(bias)
    return tuple(sorted(found.items()))


def schema_of(body: fields.Body) -> tuple[Any, str] | None:
    """The schema that an answer is to follow, and the field that has it."""
    if body.get("json_schema") is not None:  # as llama.cpp takes it
        return body["json_schema"], "json_schema"
    form = fields.mapping(body, "response_format")
    if not form or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return form.get("schema") or {"type": "object"}, "response_format"
    if form.get("type") == "json_schema":
        named = form.get("json_schema")
        if not isinstance(named, dict) or "schema" not in named:
            raise wrong("response_format", 'response_format must hold "json_schema": {"name": ..., "schema": ...}')
        return named["schema"], "response_format"
    known = "text, json_object and json_schema"
    raise wrong("response_format", f"response_format has the type {shown(form.get('type'))}; there are {known}")


def checked(jobs: Sequence[Job], service: Service) -> None:
    if not all(job.ids for job in jobs):
        raise wrong("messages", "the prompt becomes no tokens; give it some text")
