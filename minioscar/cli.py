"""The command line: its options, its exit codes, and every error in one line. What the commands do is in commands.py."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from . import __version__, streams
from .commands import COMMANDS
from .errors import ChatTemplateError, Failure, UserError, said

SCHEMES = (
    "bf16, kivi, quarot, rotation, scaling, ott, turboquant, oscar, int2, int2-compact, int2-shaped, int2-compact-shaped, int4"
)
EXAMPLES = """examples:
  python -m minioscar generate smollm2-135m "The capital of France is" --raw
  python -m minioscar chat Qwen/Qwen3-0.6B
  python -m minioscar cache Qwen/Qwen3-0.6B --prompt-file book.txt --out book.kv.safetensors
  python -m minioscar generate Qwen/Qwen3-0.6B "Who is the narrator?" --cache book.kv.safetensors
  python -m minioscar eval smollm2-135m --kv oscar,int2 --prefill 2048 --decode 1024
  python -m minioscar inspect smollm2-135m --out report
  python -m minioscar info smollm2-135m --ctx 8192 --batch 4

MODEL is a folder, a name under weights/, or a Hugging Face id; smollm2-135m is built in. COMMAND --help has examples of each."""
MORE_EXAMPLES = {
    "generate": """examples:
  python -m minioscar generate smollm2-135m "Tell me about Paris" --temperature 0.7 --top-p 0.9 --seed 3
  cat question.txt | python -m minioscar generate Qwen/Qwen3-0.6B -
  python -m minioscar generate smollm2-135m "1, 2, 3," --raw --stop 10 --json --logprobs 3
  python -m minioscar generate smollm2-135m --prompts-file prompts.jsonl --batch 16 > answers.jsonl
  python -m minioscar generate smollm2-135m "And the second chapter?" --cache book.kv.safetensors

A line of prompts.jsonl is a JSON string or {"prompt": "...", "id": ...} or {"messages": [{"role": "user", "content": "..."}]}, with
"system" and settings of its own: "max_tokens", "temperature", "seed", "stop", "n" and so on, as the options are called. A line that
fails becomes {"line": N, "error": "..."} and the others go on.""",
    "chat": """examples:
  python -m minioscar chat smollm2-135m --system "Answer in one sentence."
  python -m minioscar chat smollm2-135m --cache book.kv.safetensors
  printf 'Hello\\nWhat did I say?\\n' | python -m minioscar chat smollm2-135m

In the conversation, /help lists the commands: /retry, /undo, /reset, /save FILE, /stats, /exit.
Ctrl-C stops an answer and keeps the conversation.""",
    "cache": """examples:
  python -m minioscar cache Qwen/Qwen3-0.6B --prompt-file book.txt --out book.kv.safetensors
  python -m minioscar generate Qwen/Qwen3-0.6B "Who is the narrator?" --cache book.kv.safetensors
  python -m minioscar chat Qwen/Qwen3-0.6B --cache book.kv.safetensors

The text is read once; what --cache goes on with is read behind it: in the same message of a chat, or (--raw) in the same text. The file
is bound to the model, its weights and --kv, not to the device.""",
    "pull": "example:\n  python -m minioscar pull Qwen/Qwen3-0.6B",
    "info": "example:\n  python -m minioscar info Qwen/Qwen3-0.6B --ctx 32768 --batch 8",
    "eval": """examples:
  python -m minioscar eval smollm2-135m --kv oscar,int2 --prefill 2048 --decode 1024 --windows 3 --json
  python -m minioscar eval smollm2-135m --kv int2 --needle 512,1024 --drift 256""",
    "inspect": "example:\n  python -m minioscar inspect smollm2-135m --out report",
}
SAMPLING = {  # fields of Sampling: type, metavar, help; what is not given comes from generation_config.json (recommended.py)
    "temperature": (float, "T", "0 is greedy (the model's generation_config.json, else 0)"),
    "top_p": (float, "P", "nucleus sampling; 1: off (the model's, else 1)"),
    "top_k": (int, "K", "only the K likeliest tokens; 0: off (the model's, else 0)"),
    "min_p": (float, "P", "only tokens P times as likely as the likeliest; 0: off (the model's, else 0)"),
    "repetition_penalty": (float, "R", "divides the logits of tokens that came before, the prompt's too (the model's, else 1)"),
    "presence_penalty": (float, "X", "taken from the logits of tokens that the answer has (0)"),
    "frequency_penalty": (float, "X", "the same, for each time that it has them (0)"),
    "seed": (int, "S", "of the random numbers (0)"),
}


Explain = Callable[[BaseException], tuple[int, str]]  # exit code and message of an error


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> Parser:
    main = Parser(
        prog="minioscar", description="Llama/Qwen-style models with OScaR's 2-bit KV cache.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main.add_argument("--version", action="version", version=__version__)
    commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, help: str) -> Parser:
        sub = commands.add_parser(
            name, help=help, description=help, epilog=MORE_EXAMPLES.get(name), formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("model", metavar="MODEL", help="folder, name under weights/, or Hugging Face id")
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error; look for NaN in every operation")
        return sub

    def device(sub: Parser) -> None:
        sub.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: the GPU if there is one")

    def scheme(sub: Parser) -> None:
        sub.add_argument("--kv", metavar="SCHEME", help=f"how the KV cache is kept: {SCHEMES} (int2, or that of --cache)")

    def answering(sub: Parser, max_tokens: int, ctx: str) -> None:
        sub.add_argument("--cache", metavar="F", help="go on from a prompt cache that the command cache, or /save in a chat, wrote")
        scheme(sub)
        sub.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=f"stop after so many new tokens ({max_tokens})")
        for name, (kind, metavar, help) in SAMPLING.items():
            sub.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=help)
        sub.add_argument("--stop", action="append", default=[], metavar="S", help="end before this text; may be given several times")
        stop_id = "end at this token id; may be given several times"
        sub.add_argument("--stop-id", action="append", default=[], type=int, metavar="ID", dest="stop_ids", help=stop_id)
        sub.add_argument("--min-tokens", type=int, default=0, metavar="N", help="no end before so many new tokens (0)")
        sub.add_argument("--ignore-eos", action="store_true", help="go on behind the model's end tokens, as far as --max-tokens")
        sub.add_argument("--ctx", type=int, metavar="N", help=f"capacity of the cache in tokens ({ctx})")
        device(sub)

    def rendering(sub: Parser) -> None:
        mode = sub.add_mutually_exclusive_group()
        mode.add_argument("--chat", action="store_true", default=None, help="render the chat template (default for a model that has one)")
        mode.add_argument("--raw", action="store_false", dest="chat", help="plain continuation")

    def template(sub: Parser) -> None:
        help = "a variable of the chat template, such as enable_thinking=false; the value is JSON, else text; may be given several times"
        sub.add_argument("--template-arg", action="append", default=[], metavar="NAME=VALUE", help=help)

    generate = command("generate", "continue a prompt, or answer it")
    generate.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text, or - for standard input; or use one of the files")
    generate.add_argument("--prompt-file", metavar="F", help="read the prompt from a text file; - is standard input")
    generate.add_argument("--prompts-file", metavar="F", help="many prompts, one a line of JSON; one line of JSON for each on stdout")
    generate.add_argument("--system", metavar="TEXT", help="the system message in front of the prompt, or of every prompt")
    generate.add_argument("--batch", type=int, default=8, metavar="B", help="prompts of --prompts-file that run at a time (8)")
    generate.add_argument("--n", type=int, default=1, metavar="N", help="answers to each prompt, drawn independently (1)")
    generate.add_argument("--logprobs", type=int, metavar="K", help="log-probabilities of new tokens and the K likeliest; in JSON output")
    generate.add_argument("--no-graph", action="store_true", help="on a GPU: a step's kernels one by one, not one graph; the same bits")
    generate.add_argument("--stream", action="store_true", help="with JSON output: a line for each piece of text, then the whole object")
    answering(generate, 256, "what prompt and --max-tokens need, or what fits into memory")
    rendering(generate)
    template(generate)

    chat = command("chat", "a conversation in the terminal, its cache kept between turns")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    answering(chat, 1024, "the model's, or what fits into memory")
    template(chat)

    cache = command("cache", "read a text once, for generate and chat --cache")
    cache.add_argument("--prompt-file", metavar="F", required=True, help="a text file; - is standard input")
    out = "the file to write, such as book.kv.safetensors; - is standard output"
    cache.add_argument("--out", metavar="F", required=True, help=out)
    scheme(cache)
    device(cache)
    rendering(cache)
    template(cache)

    command("pull", "fetch a model into weights/")

    info = command("info", "shapes, parameters, bytes per token and scheme, the longest context that fits")
    info.add_argument("--ctx", type=int, metavar="N", help="context of the cache sizes (the model's)")
    info.add_argument("--batch", type=int, default=1, metavar="B", help="sequences in the cache (1)")
    device(info)

    evaluate = command("eval", "fidelity of the schemes on a text: NLL, KL and top-1 agreement against the unquantized run")
    evaluate.add_argument("--text", metavar="F", help="a text file, - for standard input (the topics of Python's help)")
    evaluate.add_argument("--prefill", type=int, default=1024, metavar="P", help="tokens of the prompt (1024)")
    evaluate.add_argument("--decode", type=int, default=512, metavar="T", help="tokens decoded, teacher-forced (512)")
    evaluate.add_argument("--windows", type=int, default=1, metavar="N", help="stretches of the text, one after the other (1)")
    evaluate.add_argument("--kv", default="kivi,oscar,int2,int2-compact", metavar="A,B,C", help=f"schemes: {SCHEMES}")
    needle = "also retrieve passkeys from so many tokens of the text (512,1024,2048)"
    evaluate.add_argument("--needle", nargs="?", const="512,1024,2048", metavar="N,N", help=needle)
    evaluate.add_argument("--drift", type=int, default=0, metavar="N", help="also follow a greedy continuation for N tokens (0: no)")
    device(evaluate)

    inspect = command("inspect", "token norms, spread inside groups, sinks and errors per scheme: a report with figures")
    inspect.add_argument("--text", metavar="F", help="a text file, - for standard input (the topics of Python's help)")
    inspect.add_argument("--tokens", type=int, default=1024, metavar="N", help="of the text's beginning, a multiple of 128 (1024)")
    inspect.add_argument("--kv", default="kivi,rotation,scaling,oscar,int2,int2-shaped", metavar="A,B,C", help=f"schemes: {SCHEMES}")
    inspect.add_argument("--out", default="report", metavar="DIR", help="folder for report.html and report.json (report)")
    device(inspect)
    return main


def parsed(argv: list[str]) -> argparse.Namespace:
    """argparse takes an optional PROMPT only where it stands next to MODEL; anywhere else it is left over."""
    args, rest = parser().parse_known_args(argv)
    if len(rest) == 1 and getattr(args, "prompt", "") is None and (rest[0] == "-" or not rest[0].startswith("-")):
        args.prompt = rest.pop()
    if rest:
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; see minioscar {args.command} --help")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (failure), 2 (wrong use or input), 130 (Ctrl-C)."""

    def work(argv: list[str]) -> None:
        args = parsed(argv)
        try:
            COMMANDS[args.command](args)
        except ChatTemplateError as error:
            raise UserError(said(error, args.command)) from error

    return run("minioscar", work, argv, explained)


def run(name: str, work: Callable[[list[str]], None], argv: list[str] | None, explain: Explain) -> int:
    """The exit code of a program's work on sys.argv, or on argv; every error in one line on stderr."""
    given = sys.argv[1:] if argv is None else argv
    with streams.prepared():
        try:
            streams.check_stdout()
            try:
                work(given)
            except SystemExit:  # --help and --version
                pass
            sys.stdout.flush()
            return 0
        except BrokenPipeError:  # the reader of stdout left, as `head` does
            return 0
        except (KeyboardInterrupt, Exception) as error:
            if argv is None:  # a second Ctrl-C has nothing left to interrupt
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            if "--debug" in given:
                import traceback

                traceback.print_exc()
            code, message = explain(error)
            print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
            return code


def explained(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error."""
    match error:
        case KeyboardInterrupt():
            return 130, "interrupted"
        case UserError():
            return 2, str(error)
        case Failure():
            return 1, str(error)
        case MemoryError():  # CuPy's is one too
            return 1, f"out of memory ({error}); use a shorter --ctx or a smaller model"
    return 1, f"unexpected {type(error).__name__}: {error}; run again with --debug for the traceback"
