"""The command line: stdout carries the result and nothing else, progress and statistics go to stderr.

Everything heavy is imported by the command that needs it, so that --help and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import NoReturn

from . import __version__
from .errors import Failure, UserError

SCHEMES = (
    "bf16, kivi, quarot, rotation, scaling, ott, turboquant, oscar, int2, int2-compact, int2-shaped, int2-compact-shaped, int4"
)
EXAMPLES = """examples:
  python -m minioscar generate smollm2-135m "The capital of France is" --raw
  python -m minioscar generate Qwen/Qwen3-0.6B --prompt-file question.txt --max-tokens 500 --temperature 0.7
  python -m minioscar eval smollm2-135m --kv oscar,int2 --prefill 2048 --decode 1024
  python -m minioscar inspect smollm2-135m --out report
  python -m minioscar info smollm2-135m --ctx 8192 --batch 4

MODEL is a folder, a name under weights/, or a Hugging Face id; smollm2-135m is built in."""


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
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("model", metavar="MODEL", help="folder, name under weights/, or Hugging Face id")
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    def device(sub: Parser) -> None:
        sub.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: the GPU if there is one")

    generate = command("generate", "continue a prompt, or answer it")
    generate.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text; or use --prompt-file")
    generate.add_argument("--prompt-file", metavar="F", help="read the prompt from a UTF-8 file")
    generate.add_argument("--kv", default="int2", metavar="SCHEME", help=f"how the KV cache is kept: {SCHEMES} (int2)")
    generate.add_argument("--max-tokens", type=int, default=256, metavar="N", help="stop after so many new tokens (256)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1: off)")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0: off)")
    generate.add_argument("--min-p", type=float, default=0.0, metavar="P", help="only tokens P times as likely as the likeliest (0: off)")
    generate.add_argument("--seed", type=int, default=0, metavar="S", help="of the random numbers (0)")
    generate.add_argument("--ctx", type=int, metavar="N", help="capacity of the cache in tokens (what prompt and --max-tokens need)")
    device(generate)
    mode = generate.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", default=None, help="render the chat template (default for a model that has one)")
    mode.add_argument("--raw", action="store_false", dest="chat", help="plain continuation")

    command("pull", "fetch a model into weights/")

    info = command("info", "shapes, parameters, bytes per token and scheme, the longest context that fits")
    info.add_argument("--ctx", type=int, metavar="N", help="context of the cache sizes (the model's)")
    info.add_argument("--batch", type=int, default=1, metavar="B", help="sequences in the cache (1)")
    device(info)

    evaluate = command("eval", "fidelity of the schemes on a text: NLL, KL and top-1 agreement against the unquantized run")
    evaluate.add_argument("--text", metavar="F", help="a UTF-8 text file (the topics of Python's help)")
    evaluate.add_argument("--prefill", type=int, default=1024, metavar="P", help="tokens of the prompt (1024)")
    evaluate.add_argument("--decode", type=int, default=512, metavar="T", help="tokens decoded, teacher-forced (512)")
    evaluate.add_argument("--windows", type=int, default=1, metavar="N", help="stretches of the text, one after the other (1)")
    evaluate.add_argument("--kv", default="kivi,oscar,int2,int2-compact", metavar="A,B,C", help=f"schemes: {SCHEMES}")
    needle = "also retrieve passkeys from so many tokens of the text (512,1024,2048)"
    evaluate.add_argument("--needle", nargs="?", const="512,1024,2048", metavar="N,N", help=needle)
    evaluate.add_argument("--drift", type=int, default=0, metavar="N", help="also follow a greedy continuation for N tokens (0: no)")
    device(evaluate)

    inspect = command("inspect", "token norms, spread inside groups, sinks and errors per scheme: a report with figures")
    inspect.add_argument("--text", metavar="F", help="a UTF-8 text file (the topics of Python's help)")
    inspect.add_argument("--tokens", type=int, default=1024, metavar="N", help="of the text's beginning, a multiple of 128 (1024)")
    inspect.add_argument("--kv", default="kivi,rotation,scaling,oscar,int2,int2-shaped", metavar="A,B,C", help=f"schemes: {SCHEMES}")
    inspect.add_argument("--out", default="report", metavar="DIR", help="folder for report.html and report.json (report)")
    device(inspect)
    return main


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (failure), 2 (wrong use or input), 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parser().parse_args(argv)
        COMMANDS[args.command](args)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader of stdout left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:
        if "--debug" in argv:
            import traceback

            traceback.print_exc()
        code, message = explained(error)
        print(f"minioscar: {' '.join(message.split())}", file=sys.stderr)
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


def run_generate(args: argparse.Namespace) -> None:
    from .sampling import Sampling

    if (args.prompt is None) == (args.prompt_file is None):
        raise UserError("give either PROMPT or --prompt-file")
    prompt = args.prompt if args.prompt_file is None else read_text(args.prompt_file)
    if not prompt:
        raise UserError("the prompt is empty; give it some text")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)

    from .engine import load

    engine = load(args.model, args.kv, args.device, ctx=args.ctx, progress=sys.stderr.isatty())
    run = engine.start([prompt], max_tokens=args.max_tokens, ctx=args.ctx, chat=args.chat, sampling=sampling)
    for _, piece in run:
        if not args.json:
            print(piece, end="", flush=True)
    result = run.results[0]
    if args.json:
        print(json.dumps({key: getattr(result, key) for key in GENERATE_KEYS}))
        return
    print()
    print(
        f"[{result.prompt_tokens} tokens in {result.prefill_s:.2f} s, {result.new_tokens} new in {result.decode_s:.2f} s "
        f"({result.tokens_per_s:.1f} tokens/s), {result.finish_reason}; {result.kv} cache {result.kv_bytes / 1e6:.1f} MB, {result.device}]",
        file=sys.stderr,
    )


def run_pull(args: argparse.Namespace) -> None:
    from .hub import pull

    folder = pull(args.model)
    print(json.dumps({"model": args.model, "folder": str(folder)}) if args.json else folder)


def run_info(args: argparse.Namespace) -> None:
    from . import info

    report = info.describe(args.model, args.ctx, args.batch, args.device)
    print(json.dumps(report) if args.json else info.text(report))


def run_eval(args: argparse.Namespace) -> None:
    from . import evaluate

    text = None if args.text is None else read_text(args.text)
    schemes = [name.strip() for name in args.kv.split(",")]
    report = evaluate.evaluate(
        args.model, schemes, text=text, prefill=args.prefill, decode=args.decode, windows=args.windows, needles=lengths(args.needle),
        continued=args.drift, device=args.device, progress=sys.stderr.isatty(),
    )
    print(json.dumps(report) if args.json else evaluate.table(report))


def run_inspect(args: argparse.Namespace) -> None:
    from pathlib import Path

    from . import inspection, report

    report.check(Path(args.out))
    text = None if args.text is None else read_text(args.text)
    schemes = [name.strip() for name in args.kv.split(",")]
    found = inspection.inspect(args.model, schemes, text=text, tokens=args.tokens, device=args.device, progress=sys.stderr.isatty())
    files = report.write(found, Path(args.out))
    print(json.dumps(found) if args.json else files[-1])


def lengths(option: str | None) -> list[int]:
    """The numbers of --needle. Raises UserError for anything else."""
    try:
        return [int(n) for n in option.split(",")] if option else []
    except ValueError:
        raise UserError(f"--needle {option!r} is not a list of lengths; write --needle 512,1024") from None


def read_text(path: str) -> str:
    """A UTF-8 file. Raises UserError where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}); give a text file") from None


GENERATE_KEYS = "text token_ids prompt_tokens new_tokens finish_reason kv kv_bytes device prefill_s decode_s tokens_per_s".split()
COMMANDS = {"generate": run_generate, "pull": run_pull, "info": run_info, "eval": run_eval, "inspect": run_inspect}
