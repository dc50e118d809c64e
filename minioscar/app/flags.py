"""What can be given to each command: names, types and help of its options, and its examples. cli.py makes a parser of
them."""

from __future__ import annotations

from typing import Any

Flag = tuple[str, dict[str, Any]]  # its name and what argparse is to know of it

SCHEMES = (
    "bf16, kivi, quarot, rotation, scaling, oscar, int2, int2-compact, int2-long, k3v2, k3v3, k4v2, k4v4, int4, ott, "
    "turboquant, kvarn-2, kvarn-k4v2, oscar-cov, q4_0"
)
EXAMPLES = """examples:
  python -m minioscar generate smollm2-135m "The capital of France is" --raw
  python -m minioscar chat Qwen/Qwen3-0.6B
  python -m minioscar cache Qwen/Qwen3-0.6B --prompt-file book.txt --out book.kv.safetensors
  python -m minioscar generate Qwen/Qwen3-0.6B "Who is the narrator?" --cache book.kv.safetensors
  python -m minioscar eval smollm2-135m --kv oscar,int2 --prefill 2048 --decode 1024
  python -m minioscar inspect smollm2-135m --out report
  python -m minioscar info smollm2-135m --ctx 8192 --batch 4

MODEL is a folder, a name under weights/, or a Hugging Face id; smollm2-135m is built in.
COMMAND --help has examples of each."""
MORE_EXAMPLES = {
    "generate": """examples:
  python -m minioscar generate smollm2-135m "Tell me about Paris" --temperature 0.7 --top-p 0.9 --seed 3
  cat question.txt | python -m minioscar generate Qwen/Qwen3-0.6B -
  python -m minioscar generate smollm2-135m "1, 2, 3," --raw --stop 10 --json --logprobs 3
  python -m minioscar generate smollm2-135m --prompts-file prompts.jsonl --batch 16 > answers.jsonl
  python -m minioscar generate smollm2-135m "And the second chapter?" --cache book.kv.safetensors
  python -m minioscar generate Qwen/Qwen3-VL-4B-Instruct "What does the sign say?" --image sign.jpg

A line of prompts.jsonl is a JSON string or {"prompt": "...", "id": ...} or {"messages": [{"role": "user", "content":
"..."}]}, with "system" and settings of its own: "max_tokens", "temperature", "seed", "stop", "n" and so on, as the
options are called. Content may be parts, {"type": "text", "text": "..."}, {"type": "image", "image": "a.png"},
{"type": "audio", "audio": "a.wav"} and {"type": "video", "video": "a.mp4", "fps": 2}. A line that fails becomes
{"line": N, "error": "..."} and the others go on.""",
    "chat": """examples:
  python -m minioscar chat smollm2-135m --system "Answer in one sentence."
  python -m minioscar chat smollm2-135m --cache book.kv.safetensors
  printf 'Hello\\nWhat did I say?\\n' | python -m minioscar chat smollm2-135m

In the conversation, /help lists the commands: /image FILE, /audio FILE, /video FILE, /retry, /undo, /reset, /save
FILE, /stats, /exit.
Ctrl-C stops an answer and keeps the conversation.""",
    "cache": """examples:
  python -m minioscar cache Qwen/Qwen3-0.6B --prompt-file book.txt --out book.kv.safetensors
  python -m minioscar generate Qwen/Qwen3-0.6B "Who is the narrator?" --cache book.kv.safetensors
  python -m minioscar chat Qwen/Qwen3-0.6B --cache book.kv.safetensors

The text is read once; what --cache goes on with is read behind it: in the same message of a chat, or (--raw) in the
same text. The file is bound to the model, its weights and --kv, not to the device.""",
    "serve": """examples:
  python -m minioscar serve smollm2-135m
  python -m minioscar serve Qwen/Qwen3-8B --slots 48 --ctx 4096 --host 0.0.0.0 --api-key secret
  curl http://127.0.0.1:8080/v1/chat/completions -H 'content-type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "Hello"}]}'

It needs the extra `serve`; structured output and forced tool calls need `structured`. It is ready when one line on
stderr says so and /health answers 200. SIGTERM lets running answers end.""",
    "pull": "example:\n  python -m minioscar pull Qwen/Qwen3-0.6B",
    "info": "example:\n  python -m minioscar info Qwen/Qwen3-0.6B --ctx 32768 --batch 8",
    "eval": """examples:
  python -m minioscar eval smollm2-135m --kv oscar,int2 --prefill 2048 --decode 1024 --windows 3 --json
  python -m minioscar eval smollm2-135m --kv int2 --needle 512,1024 --tools 1024 --drift 256
  python -m minioscar eval reader --kv oscar,int2 --images 300,1000""",
    "inspect": """examples:
  python -m minioscar inspect smollm2-135m --out report
  python -m minioscar inspect Qwen/Qwen3-VL-4B-Instruct --image page.png --tokens 2048""",
}


def flag(name: str, help: str, metavar: str | None = None, **how: Any) -> Flag:
    return name, {"help": help, **({} if metavar is None else {"metavar": metavar}), **how}


def number(name: str, help: str, metavar: str, default: float | None = None, type: type = int) -> Flag:
    return flag(name, help, metavar, type=type, default=default)


def switch(name: str, help: str, **how: Any) -> Flag:
    return flag(name, help, **({"action": "store_true"} | how))


def several(name: str, help: str, metavar: str, **how: Any) -> Flag:
    return flag(name, f"{help}; may be given several times", metavar, action="append", default=[], **how)


EVERY = [
    flag("model", "folder, name under weights/, or Hugging Face id", "MODEL"),
    switch("--json", "print one JSON object on stdout"),
    switch("--debug", "show the traceback of an error; look for NaN in every operation"),
]
DEVICE = flag("--device", "auto: the GPU if there is one", choices=("auto", "cuda", "cpu"), default="auto")
SCHEME = flag("--kv", f"how the KV cache is kept: {SCHEMES} (int2)", "SCHEME")
WEIGHTS = flag(
    "--weights", "quantize matrices of 16 bits while they are loaded (no; files of 4 or 8 bits stay what they are)",
    choices=("int8", "int4"),
)
GPUS = number("--gpus", "split the model over so many GPUs of this machine (1)", "N")
TEXT = flag("--text", "a text file, - for standard input (the topics of Python's help)", "F")
MEDIA = [
    several("--image", "a picture in front of the text, for a model that reads some", "FILE"),
    several("--audio", "a sound in front of the text, for a model that hears", "FILE"),
    several("--video", "a video in front of the text, for a model that reads some", "FILE"),
    number("--fps", "frames of --video that are read a second (the model's)", "F", type=float),
]
RENDERING = [  # argparse lets one of them be given
    switch("--chat", "render the chat template (default for a model that has one)", default=None),
    switch("--raw", "plain continuation", action="store_false", dest="chat"),
]
VARIABLE = "a variable of the chat template, such as enable_thinking=false; the value is JSON, else text"
TEMPLATE = several("--template-arg", VARIABLE, "NAME=VALUE")
SAMPLING = [  # fields of Sampling; what is not given is taken from the model's generation_config.json (recommended.py)
    number("--temperature", "0 is greedy (the model's generation_config.json, else 0)", "T", type=float),
    number("--top-p", "nucleus sampling; 1: off (the model's, else 1)", "P", type=float),
    number("--top-k", "only the K likeliest tokens; 0: off (the model's, else 0)", "K"),
    number("--min-p", "only tokens P times as likely as the likeliest; 0: off (the model's, else 0)", "P", type=float),
    number(
        "--repetition-penalty", "divides the logits of tokens that came before, the prompt's too (the model's, else 1)",
        "R", type=float
    ),
    number("--presence-penalty", "taken from the logits of tokens that the answer has (0)", "X", type=float),
    number("--frequency-penalty", "the same, for each time that it has them (0)", "X", type=float),
    number("--seed", "of the random numbers (0)", "S"),
]


def answering(max_tokens: int, ctx: str) -> list[Flag]:
    """What generate and chat share."""
    return [
        flag("--cache", "go on from a prompt cache that the command cache, or /save in a chat, wrote", "F"),
        flag("--kv", f"{SCHEME[1]['help'][:-1]}, or that of --cache)", "SCHEME"),
        WEIGHTS,
        number("--max-tokens", f"stop after so many new tokens ({max_tokens})", "N", max_tokens),
        *SAMPLING,
        several("--stop", "end before this text, or at the special token of this name", "S"),
        several("--stop-id", "end at this token id", "ID", type=int, dest="stop_ids"),
        number("--min-tokens", "no end before so many new tokens (0)", "N", 0),
        switch("--ignore-eos", "go on behind the model's end tokens, as far as --max-tokens"),
        number("--ctx", f"capacity of the cache in tokens ({ctx})", "N"),
        DEVICE, GPUS, TEMPLATE,
    ]  # fmt: skip


FLAGS: dict[str, tuple[str, list[Flag]]] = {
    "generate": ("continue a prompt, or answer it", [
        flag("prompt", "the text, or - for standard input; or use one of the files", "PROMPT", nargs="?"),
        flag("--prompt-file", "read the prompt from a text file; - is standard input", "F"),
        flag("--prompts-file", "many prompts, one a line of JSON; one line of JSON for each on stdout", "F"),
        *MEDIA,
        flag("--system", "the system message in front of the prompt, or of every prompt", "TEXT"),
        number("--batch", "prompts of --prompts-file that run at a time (8)", "B", 8),
        number("--n", "answers to each prompt, drawn independently (1)", "N", 1),
        number("--logprobs", "log-probabilities of new tokens and the K likeliest; in JSON output", "K"),
        switch("--no-graph", "on a GPU: a step's kernels one by one, not one graph; the same bits"),
        switch("--stream", "with JSON output: a line for each piece of text, then the whole object"),
        *answering(256, "what prompt and --max-tokens need, or what fits into memory"),
        *RENDERING,
    ]),
    "chat": ("a conversation in the terminal, its cache kept between turns", [
        flag("--system", "the system message", "TEXT"),
        *answering(1024, "the model's, or what fits into memory"),
    ]),
    "serve": ("answer many requests at a time, in the manner of OpenAI's API", [
        flag("--host", "address to listen at; 0.0.0.0 is every network (127.0.0.1)", "ADDRESS", default="127.0.0.1"),
        number("--port", "port to listen at; 0: any free one (8080)", "N", 8080),
        number("--slots", "answers that run at a time (8)", "N", 8),
        number("--ctx", "tokens of each slot (the model's, or what fits into memory)", "N"),
        SCHEME,
        WEIGHTS,
        number("--chunk", "tokens of prompts read between two steps, a multiple of 128 (1024)", "N", 1024),
        number("--queue", "prompts that may wait for a slot; more are refused with 503 (4 for each slot)", "N"),
        number("--deadline", "seconds after which an answer ends, a prompt gets 503 (none)", "S", type=float),
        number("--host-cache", "GB of the host's memory for cached prompts the card gives up (0)", "GB", 0.0, float),
        flag("--api-key", "what clients have to send ($MINIOSCAR_API_KEY, else none)", "KEY"),
        several("--cors", "a page from this origin may ask, * is any (only those of this machine)", "ORIGIN"),
        flag("--name", "the model's name in the API (the last part of MODEL)", "NAME"),
        switch("--strict-model", "refuse requests for models of another name"),
        flag("--images", "a folder whose pictures and videos requests may name (none; data: URLs always)", "DIR"),
        number("--media-tokens", "most tokens of a picture, sound or video (4096); memory is left for them", "N", 4096),
        flag("--replicas", "so many copies over a Ray cluster, or N:M as the load needs (extra `ray`)", "N[:M]"),
        number("--grace", "seconds for running answers when the server is told to end (30)", "N", 30),
        *SAMPLING[:5],
        DEVICE,
        GPUS,
    ]),
    "cache": ("read a text once, for generate and chat --cache", [
        flag("--prompt-file", "a text file; - is standard input", "F", required=True),
        flag("--out", "the file to write, such as book.kv.safetensors; - is standard output", "F", required=True),
        SCHEME, WEIGHTS, DEVICE, GPUS, *RENDERING, TEMPLATE,
    ]),
    "pull": ("fetch a model into weights/", []),
    "info": ("shapes, parameters, bytes per token and scheme, the longest context that fits", [
        number("--ctx", "context of the cache sizes (the model's)", "N"),
        number("--batch", "sequences in the cache (1)", "B", 1),
        WEIGHTS,
        DEVICE,
        GPUS,
    ]),
    "eval": ("fidelity of the schemes on a text: NLL, KL and top-1 agreement against the unquantized run", [
        TEXT,
        number("--prefill", "tokens of the prompt (1024)", "P", 1024),
        number("--decode", "tokens decoded, teacher-forced (512)", "T", 512),
        number("--windows", "stretches of the text, one after the other (1)", "N", 1),
        flag("--kv", f"schemes: {SCHEMES}", "A,B,C", default="kivi,oscar,int2,int2-compact"),
        flag(
            "--needle", "also retrieve passkeys from so many tokens of the text (512,1024,2048)", "N,N", nargs="?",
            const="512,1024,2048"
        ),
        flag(
            "--tools", "also copy tool calls from so many tokens of the text (1024,4096,8064)", "N,N", nargs="?",
            const="1024,4096,8064"
        ),
        flag("--window", "the same BF16 window for all schemes: tokens packed at a time / kept (their own)", "F/W"),
        flag(
            "--images", "instead of a text: values read from drawn pages of so many tokens (300,600,1000,2000)", "N,N",
            nargs="?", const="300,600,1000,2000"
        ),
        number("--pages", "of each size, with up to 16 questions each (4)", "N", 4),
        switch("--emptied", "also KL without kept tokens: 64 are packed as soon as they are there"),
        flag("--pieces", "also read prompts in pieces of N tokens, each over a past in the scheme (whole)", "N,N"),
        number("--drift", "also follow a greedy continuation for N tokens (0: no)", "N", 0),
        flag("--weights", "also with matrices quantized so, each with --kv bf16 and with the schemes", "int8,int4"),
        DEVICE,
        GPUS,
    ]),
    "inspect": ("token norms, spread inside groups, sinks and errors per scheme: a report with figures", [
        TEXT,
        *MEDIA,
        number("--tokens", "of the beginning of media and text, a multiple of 128 (1024)", "N", 1024),
        flag("--kv", f"schemes: {SCHEMES}", "A,B,C", default="kivi,rotation,scaling,oscar,int2"),
        flag("--out", "folder for report.html and report.json (report)", "DIR", default="report"),
        DEVICE,
    ]),
}  # fmt: skip
