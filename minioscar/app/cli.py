"""The command line: its options, its exit codes, and every error in one line. What the commands do is in
commands.py."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NoReturn

from ..errors import ChatTemplateError, Failure, UserError, said
from ..version import __version__
from . import commands, streams
from .flags import EVERY, EXAMPLES, FLAGS, MORE_EXAMPLES, RENDERING

Explain = Callable[[BaseException], tuple[int, str]]  # exit code and message of an error
NEEDED = {"numpy", "ml_dtypes", "safetensors", "tokenizers", "huggingface_hub", "filelock", "jinja2", "tqdm"}
EXTRAS = {
    "gguf": "gguf", "matplotlib": "plot", "uvicorn": "serve", "ray": "ray", "llguidance": "structured", "PIL": "vision",
    "soundfile": "audio", "soxr": "audio", "av": "video", "pyarrow": "benchmarks", "nltk": "benchmarks",
}  # fmt: skip


def run_serve(args: argparse.Namespace) -> None:
    from . import serving  # which goes on where commands.py ends

    serving.run(args)


COMMANDS = {**commands.COMMANDS, "serve": run_serve}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> Parser:
    look = argparse.RawDescriptionHelpFormatter
    about = "Llama/Qwen-style models with OScaR's 2-bit KV cache."
    main = Parser(prog="minioscar", description=about, epilog=EXAMPLES, formatter_class=look)
    main.add_argument("--version", action="version", version=__version__)
    commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command, (help, flags) in FLAGS.items():
        epilog = MORE_EXAMPLES.get(command)
        sub = commands.add_parser(command, help=help, description=help, epilog=epilog, formatter_class=look)
        mode = sub.add_mutually_exclusive_group() if RENDERING[0] in flags else sub
        for name, how in (*EVERY, *flags):
            (mode if (name, how) in RENDERING else sub).add_argument(name, **how)
    return main


def parsed(argv: list[str]) -> argparse.Namespace:
    """argparse takes an optional PROMPT only where it stands next to MODEL; anywhere else it is left over, and so is
    the -- in front of one that begins with a hyphen."""
    args, rest = parser().parse_known_args(argv)
    text = rest[1:] if rest[:1] == ["--"] else [word for word in rest if not is_option(word)]
    if len(text) == 1 and rest in (text, ["--", *text]) and getattr(args, "prompt", "") is None:
        args.prompt = text[0]
    elif rest:
        guess = f"{meant(args, rest)}see minioscar {args.command} --help"
        raise UserError(f"unrecognized arguments: {' '.join(rest)}; {guess}")
    return args


def is_option(word: str) -> bool:
    """As argparse sees it."""
    return word.startswith("-") and word != "-" and " " not in word


def meant(args: argparse.Namespace, words: Sequence[str]) -> str:
    """What arguments that nobody takes may have been meant to be, for a message; nothing where there is no guess."""
    names = [name for name, _ in (*EVERY, *FLAGS[args.command][1])]
    option = next((word.partition("=")[0] for word in words if is_option(word)), None)
    if option in names:
        return f"{option} goes behind {args.command}; "
    if option not in (None, "--") and (near := get_close_matches(option, names, 1)):
        return f"did you mean {near[0]}? "
    if not hasattr(args, "prompt"):
        return ""
    return f"a PROMPT {'of several words needs quotes' if option is None else 'that begins with - goes behind --'}; "


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
    # a process of its own, in the foreground
    if argv is None and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
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


def interrupt(*_: object) -> None:
    """Ctrl-C. A library whose import it breaks off may make an ImportError of it; nothing is to be cleaned up by
    then."""
    if any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in list(sys.modules.values())):
        os.write(2, b"minioscar: interrupted\n")
        os._exit(130)
    raise KeyboardInterrupt


def explained(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error."""
    match error:
        case KeyboardInterrupt():
            return 130, "interrupted"
        case UserError():
            return 2, str(error)
        case Failure():
            return 1, str(error)
        case ModuleNotFoundError(name=str(name)) if (package := name.partition(".")[0]) in NEEDED | EXTRAS.keys():
            return 2, missing(package)
        case MemoryError():  # CuPy's is one too
            return 1, f"out of memory ({error}); use a shorter --ctx or a smaller model"
    return 1, f"unexpected {type(error).__name__}: {error}; run again with --debug for the traceback"


def missing(package: str) -> str:
    """What to do where a package is not installed."""
    if package in EXTRAS:
        return f"this needs {package}: pip install 'minioscar[{EXTRAS[package]}]'"
    way_out = "use the Python that minioscar is installed for (.venv/bin/python after make demo), or pip install ."
    return f"{sys.executable} does not have {package}; {way_out}"
