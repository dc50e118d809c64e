"""What the commands do: stdout carries the result and nothing else, progress and statistics go to stderr.

Everything heavy is imported by the command that needs it, so that --help and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..storage import strict_json as json
from ..storage.files import check_writable, descriptor, expand, read_lines, read_text
from .wake import wake

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..answers import Generation
    from ..engine import Engine
    from ..options import Options
    from ..oscar import Scheme
    from ..prompt_cache import Message, PromptCache

GENERATE_KEYS = (
    "text", "token_ids", "prompt_tokens", "new_tokens", "finish_reason", "kv", "kv_bytes", "device", "prefill_s",
    "decode_s", "tokens_per_s",
)  # fmt: skip


def run_generate(args: argparse.Namespace) -> None:
    sources = [source for source in (args.prompt, args.prompt_file, args.prompts_file) if source is not None]
    if len(sources) > 1 or not (sources or args.cache):
        raise UserError("give one of PROMPT (- is standard input), --prompt-file and --prompts-file")
    if args.logprobs is not None and not (args.json or args.prompts_file):
        raise UserError("--logprobs needs --json: they are part of the JSON output")
    if args.stream and not (args.json or args.prompts_file):
        raise UserError("--stream is for JSON output, text comes as it is written anyway; add --json or leave it out")
    if args.system is not None and (args.chat is False or args.cache):
        why = "a prompt cache has its own beginning" if args.cache else "--raw continues a plain text"
        raise UserError(f"--system has no place here: {why}; leave one of them out")
    media = media_parts(args)
    if media and (args.chat is False or args.prompts_file):
        why = "--raw continues a plain text" if args.chat is False else "lines of --prompts-file name their own"
        raise UserError(f"--{media[0]['type']} has no place here: {why}; leave one of them out")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch} is out of range; it must be at least 1")
    template = template_of(args)
    wake(args.device)
    from .prompts import prepared, with_media

    options = wanted(args)
    media = prepared(media, args.model)
    if args.prompts_file is not None:
        return run_prompts(args, options)
    file = args.prompt_file if args.prompt_file is not None else "-" if args.prompt == "-" else None
    prompt = args.prompt or "" if file is None else read_text(file)
    if not (prompt or args.cache):
        raise UserError("the prompt is empty; give it some text")
    engine, cache = loaded(args)
    options = sampled(options, args, engine)
    prompt = with_system(args.system, with_media(media, prompt, cache) if media else prompt, engine)
    run = engine.start([prompt], ctx=args.ctx, chat=args.chat, options=options, cache=cache, template=template)
    for index, piece in run:
        if args.stream and piece:
            print_piece({}, index if options.n > 1 else None, piece)
        elif not args.json and options.n == 1:
            print(piece, end="", flush=True)
    found = [answer_object(result) for result in run.results]
    if args.json:
        print(json.dumps(found[0] if options.n == 1 else {"n": options.n, "answers": found}))
        return
    print("\n---\n".join(answer["text"] for answer in found) if options.n > 1 else "")
    result, new = run.results[0], sum(result.new_tokens for result in run.results)
    rate = sum(result.tokens_per_s for result in run.results)
    cached = f", {result.prompt_tokens - result.prefilled_tokens} more from the cache" if cache else ""
    window = ": it is the model's sliding window" if run.cache.context == engine.config.window else ""
    full = f" (the context of {run.cache.context} is full{window})" if result.finish_reason == "context" else ""
    print(
        f"[{result.prefilled_tokens} tokens{cached} in {result.prefill_s:.2f} s, {new} new in {result.decode_s:.2f} s "
        f"({rate:.1f} tokens/s), {result.finish_reason}{full}; {result.kv} cache "
        f"{result.kv_bytes / 1e6:.1f} MB, {result.device}]",
        file=sys.stderr,
    )


def run_prompts(args: argparse.Namespace, options: Options) -> None:
    from dataclasses import replace

    from tqdm import tqdm

    from . import prompts

    raw = read_lines(args.prompts_file)
    lines, template = list(prompts.parse(raw)), template_of(args)
    if not lines or all(line.error for line in lines) and any(b"\0" in line for line in raw):
        what = "has no prompts" if not lines else "holds zero bytes and no prompts"
        raise UserError(f"{args.prompts_file} {what}; a line is a JSON string or an object with \"prompt\", in UTF-8")
    engine, cache = loaded(args)
    options = sampled(options, args, engine)
    system = args.system
    lines = [line if line.error else replace(line, prompt=with_system(system, line.prompt, engine)) for line in lines]
    lines = [replace(line, settings=line_settings(line.settings, args, engine)) for line in lines]

    def piece(line: prompts.Line, index: int, text: str) -> None:
        print_piece(line.head(), index if line.options.n > 1 else None, text)

    failed, bar = [], tqdm(
        total=len(lines), desc="prompts", unit="line", leave=False, disable=None if sys.stderr.isatty() else True
    )
    with bar:
        how = {"ctx": args.ctx, "chat": args.chat, "cache": cache, "template": template}
        told = piece if args.stream else None
        for line, results in prompts.answers(engine, lines, batch=args.batch, options=options, piece=told, **how):
            for index, result in enumerate(results):
                numbered = {"index": index} if line.options.n > 1 else {}
                print(json.dumps(line.head() | numbered | answer_object(result)), flush=True)
            if line.error is not None:
                failed.append(line.number)
                print(json.dumps(line.head() | {"error": line.error}), flush=True)
            bar.update()
    if failed:
        which = f"line{'s' * (len(failed) > 1)} {', '.join(map(str, failed[:5]))}{', ...' * (len(failed) > 5)}"
        raise UserError(
            f"{args.prompts_file}: {len(failed)} of {len(lines)} prompts failed ({which}); their \"error\" on stdout "
            "says why"
        )


def line_settings(settings: Mapping[str, Any], args: argparse.Namespace, engine: Engine) -> Mapping[str, Any]:
    """Of a line, and where it says how to draw, what the model's file recommends beside that: as on the command
    line."""
    from ..sampling import Sampling
    from .prompts import SAMPLING
    from .recommended import recommended

    own = {name: settings[name] for name in SAMPLING if name in settings}
    try:
        return {**settings, **vars(recommended(engine.folder, given(args, Sampling) | own)[0])} if own else settings
    except UserError:  # said of the line, in its place
        return settings


def print_piece(head: dict[str, Any], index: int | None, piece: str) -> None:
    """A line of --stream."""
    print(json.dumps(head | ({} if index is None else {"index": index}) | {"piece": piece}), flush=True)


def run_chat(args: argparse.Namespace) -> None:
    wake(args.device)
    from ..arguments import OPTIONS
    from . import chat
    from .conversation import Conversation

    options, template = wanted(args), template_of(args)
    engine, cache = loaded(args)
    conversation = Conversation(engine, system=args.system, cache=cache, ctx=args.ctx, template=template)
    options = sampled(options, args, engine)
    asked = {name: getattr(options, name) for name in ("sampling", *OPTIONS)}
    chat.talk(conversation, asked, quiet=args.json)
    if args.json:
        print(json.dumps(chat.summary(conversation)))


def run_cache(args: argparse.Namespace) -> None:
    import time

    wake(args.device)
    from ..cache import cache_bytes
    from ..prompt_cache import check_storable

    schemes = known_schemes()
    if args.kv in schemes:
        check_storable(schemes[args.kv])
    stream = descriptor(args.out)
    if stream == 1 and args.json:
        raise UserError(f"--out {args.out} writes the cache to standard output; leave --json out")
    template = template_of(args)
    check_writable(args.out, inputs=[args.prompt_file])
    if stream is not None and os.isatty(stream):
        raise UserError(f"--out {args.out} would write the cache to a terminal; redirect it to a file")
    text = read_text(args.prompt_file)
    if not text:
        raise UserError(f"{args.prompt_file} is empty; give it some text")
    engine, _ = loaded(args)
    target = check_writable(args.out, inputs=engine.model_files)
    before = time.perf_counter()
    cache = engine.prefill(text, args.chat, template)
    seconds = time.perf_counter() - before
    cache.save(args.out)
    report = {
        "file": str(expand(args.out)), "tokens": len(cache), "kv": engine.scheme.name, "kv_bytes": cache.nbytes,
        "file_bytes": target.stat().st_size if stream is None else cache.nbytes,
        "bf16_bytes": cache_bytes(engine.config, schemes["bf16"], 1, len(cache)), "device": engine.ops.name,
        "prefill_s": seconds,
    }
    if stream != 1:
        print(json.dumps(report) if args.json else report["file"])
    if not args.json:
        sizes = (
            f"{report['file_bytes'] / 1e6:.1f} MB, {report['bf16_bytes'] / report['kv_bytes']:.2f}x less cache than "
            "in bf16"
        )
        print(f"[{len(cache)} tokens in {seconds:.2f} s; {report['kv']}, {sizes}, {report['device']}]", file=sys.stderr)


def media_parts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Parts of a message, of --image, --audio and --video."""
    media = [{"type": kind, kind: file} for kind in ("image", "audio", "video") for file in getattr(args, kind)]
    if args.fps is None:
        return media
    if not args.video:
        raise UserError("--fps is for --video, which is not given; leave it out")
    return [part | ({"fps": args.fps} if part["type"] == "video" else {}) for part in media]


def wanted(args: argparse.Namespace) -> Options:
    """The options that are given, checked."""
    from ..options import Options
    from ..sampling import Sampling

    graph = not getattr(args, "no_graph", False)
    return Options(sampling=Sampling(**given(args, Sampling)), graph=graph, **given(args, Options))


def template_of(args: argparse.Namespace) -> dict[str, Any]:
    """The variables of --template-arg. Raises UserError for one that has no name, or two values."""
    found: dict[str, Any] = {}
    for one in args.template_arg:
        name, sign, value = one.partition("=")
        if not (name and sign):
            raise UserError(f"--template-arg {one!r} must be NAME=VALUE, such as enable_thinking=false")
        if name in found:
            raise UserError(f"--template-arg {name} is given twice; leave one of them out")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):  # text needs no quotes
            found[name] = value
    if found and getattr(args, "chat", None) is False:
        raise UserError(
            f"--template-arg {next(iter(found))} is for the chat template, which --raw leaves out; give one of the two"
        )
    return found


def given(args: argparse.Namespace, of: type) -> dict[str, Any]:
    """The fields of a dataclass that are options of the command line and were given there."""
    from dataclasses import fields

    return {field.name: value for field in fields(of) if (value := getattr(args, field.name, None)) is not None}


def sampled(options: Options, args: argparse.Namespace, engine: Engine) -> Options:
    """The options with the sampling of the model's generation_config.json where none is given, which is said."""
    from dataclasses import replace

    from ..sampling import Sampling
    from .recommended import recommended

    sampling, lines = recommended(engine.folder, given(args, Sampling))
    for line in lines:
        print(f"[{line}]", file=sys.stderr)
    return replace(options, sampling=sampling)


def with_system(system: str | None, prompt: str | list[Message], engine: Engine) -> str | list[Message]:
    """A text, or messages without a system message of their own, behind the one of --system."""
    if system is None or (not isinstance(prompt, str) and prompt[0]["role"] == "system"):
        return prompt
    if not engine.tokenizer.has_chat_template:
        why = f"{engine.folder.name} has no chat template to put a system message into"
        raise UserError(f"--system: {why}; write it into the prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *messages]


def loaded(args: argparse.Namespace) -> tuple[Engine, PromptCache | None]:
    """The model, and the prompt cache if --cache names one, which is checked before the weights are read."""
    from ..engine import load

    known_schemes()
    file, ctx = getattr(args, "cache", None), getattr(args, "ctx", None)
    if file is not None and getattr(args, "chat", None) is not None:
        raise UserError("--chat and --raw were decided when the prompt cache was made; leave them out")
    how = {"progress": sys.stderr.isatty(), "debug": args.debug, "weights": args.weights, "gpus": args.gpus}
    engine = load(args.model, args.kv, args.device, ctx=ctx, cache=file, **how)
    return engine, engine.load_cache(file) if file is not None else None


def known_schemes() -> Mapping[str, Scheme]:
    """What --kv can be: the schemes of oscar.py, and the published baselines, which register when they are imported."""
    from ..evaluation import baselines  # noqa: F401
    from ..oscar import SCHEMES

    return SCHEMES


def answer_object(result: Generation) -> dict:
    """The object of `generate --json`."""
    from dataclasses import asdict

    found = {key: getattr(result, key) for key in GENERATE_KEYS}
    if result.logprobs is None:
        return found
    found["logprobs"] = [asdict(logprob) for logprob in result.logprobs]
    for likely in (one for logprob in found["logprobs"] for one in logprob["top"]):
        del likely["top"]  # theirs is always empty
    return found


def run_pull(args: argparse.Namespace) -> None:
    from ..storage.hub import pull

    folder = pull(args.model)
    print(json.dumps({"model": args.model, "folder": str(folder)}) if args.json else folder)


def run_info(args: argparse.Namespace) -> None:
    from . import info

    known_schemes()
    report = info.describe(args.model, args.ctx, args.batch, args.device, args.weights, args.gpus)
    print(json.dumps(report) if args.json else info.text(report))


def run_eval(args: argparse.Namespace) -> None:
    from ..evaluation import fidelity

    text = None if args.text is None else read_text(args.text)
    known_schemes()
    schemes = [name.strip() for name in args.kv.split(",")]
    if args.images is not None:
        return eval_images(args, schemes)
    report = fidelity.evaluate(
        args.model, schemes, text=text, prefill=args.prefill, decode=args.decode, windows=args.windows,
        needles=lengths("--needle", args.needle), tools=lengths("--tools", args.tools), continued=args.drift,
        device=args.device, progress=sys.stderr.isatty(),
        weights=[mode.strip() for mode in args.weights.split(",")] if args.weights else [],
        window=window(args.window), emptied=args.emptied, pieces=lengths("--pieces", args.pieces),
        gpus=args.gpus,
    )
    print(json.dumps(report) if args.json else fidelity.table(report))


def eval_images(args: argparse.Namespace, schemes: list[str]) -> None:
    from ..evaluation import reading

    of_text = ("text", "needle", "tools", "drift", "pieces", "emptied", "weights")
    if others := [f"--{name}" for name in of_text if getattr(args, name)]:
        raise UserError(f"--images is instead of a text; leave {', '.join(others)} out")
    report = reading.evaluate(
        args.model, schemes, lengths("--images", args.images), count=args.pages, device=args.device,
        window=window(args.window), progress=sys.stderr.isatty(), gpus=args.gpus,
    )
    print(json.dumps(report) if args.json else reading.table(report["images"]))


def run_inspect(args: argparse.Namespace) -> None:
    from ..evaluation import inspection, report
    from .prompts import prepared

    report.check(args.out, args.text)
    media = prepared(media_parts(args), args.model)
    text = None if args.text is None else read_text(args.text)
    known_schemes()
    schemes = [name.strip() for name in args.kv.split(",")]
    found = inspection.inspect(
        args.model, schemes, text=text, tokens=args.tokens, device=args.device, progress=sys.stderr.isatty(),
        media=media,
    )
    files = report.write(found, args.out)
    print(json.dumps(found) if args.json else files[-1])


def lengths(option: str, given: str | None) -> list[int]:
    """The numbers of an option such as --needle. Raises UserError for anything else."""
    try:
        return [int(n) for n in given.split(",")] if given else []
    except ValueError:
        raise UserError(f"{option} {given!r} is not a list of lengths; write {option} 512,1024") from None


def window(given: str | None) -> tuple[int, int] | None:
    """Flush and keep. Raises UserError for anything but two numbers."""
    if given is None:
        return None
    flush, _, keep = given.partition("/")
    if not (flush.isdecimal() and keep.isdecimal()):
        raise UserError(f"--window {given!r} is not FLUSH/KEEP; write --window 64/64")
    return int(flush), int(keep)


COMMANDS = {
    "generate": run_generate, "chat": run_chat, "cache": run_cache, "pull": run_pull, "info": run_info,
    "eval": run_eval, "inspect": run_inspect,
}
