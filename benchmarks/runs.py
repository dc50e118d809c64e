"""What bench.py is asked to do with a model, all of it checked before anything long begins."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks import presets, quantized
from benchmarks.memory import budgets, enforceable
from minioscar import arguments, engine, memory
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.errors import UserError
from minioscar.ops.reference import Reference
from minioscar.oscar import WINDOW, Scheme
from minioscar.pages import check_scheme
from minioscar.parallel import cards
from minioscar.storage.hub import resolve
from minioscar.tables import size

USUAL = {"decode": (512, 2048), "throughput": (4096,), "memory": (4096,)}  # contexts
USUAL_CPU = USUAL | {"throughput": (1024,)}
QUICK = {"decode": (128,), "throughput": (256,), "memory": (256,)}
ROOM, QUICK_ROOM = 64 * 10**6, 16 * 10**6  # bytes of cache in a CPU's budget: NumPy takes a second a step for them
POSITIONS = 1 << 20  # of random weights, which no context is too long for


@dataclass(frozen=True)
class Runs:
    model: str
    config: Config
    load: Callable[[Scheme], Engine]
    schemes: list[Scheme]
    contexts: dict[str, list[int]]  # by command
    batches: list[int]
    prompts: list[int]
    budgets: list[int]
    steps: int
    ops: Reference  # of all GPUs where there are several


def parse_runs(args: argparse.Namespace, commands: tuple[str, ...], ops: Reference) -> Runs:
    """Raises UserError for whatever cannot work."""
    schemes = asked_schemes(args.kv or "bf16,int2")
    batches = numbers("--batch", args.batch)
    prompts = numbers("--tokens", args.tokens or ("64" if args.quick else "512,2048"))
    steps = args.steps if args.steps is not None else 3 if args.quick else 20
    if steps < 1:
        raise UserError(f"--steps {steps} is out of range; it must be at least 1")
    config, load = model_of(args)
    for scheme in schemes:
        check_scheme(config, scheme)
    ops = cards.over(arguments.gpus_of(args.gpus), ops, config, schemes[0])
    contexts = contexts_of(args, commands, config, ops)
    weights = ops.weight_bytes(config)
    limits = budgets_of(args, ops, weights) if "throughput" in commands else []
    prompts = prompts if "prefill" in commands else []
    name = f"{args.random_weights or args.model}{f', {args.weights}' if args.weights else ''}"
    runs = Runs(name, config, load, schemes, contexts, batches, prompts, limits, steps, ops)
    check_sizes(runs, config, ops, weights)
    return runs


def asked_schemes(names: str) -> list[Scheme]:
    """Raises UserError for a name that is none."""
    return [arguments.scheme_named(name.strip()) for name in names.split(",")]


def numbers(option: str, text: str | None, multiple_of: int = 1) -> list[int]:
    """The list that an option gives; empty where it is not given."""
    try:
        found = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0]
    if any(n < 1 or n % multiple_of for n in found):
        what = "positive whole numbers" if multiple_of == 1 else f"multiples of {multiple_of}"
        raise UserError(f"{option} {text!r} is not a list of {what}, such as {option} {multiple_of},{2 * multiple_of}")
    return found


def model_of(args: argparse.Namespace) -> tuple[Config, Callable[[Scheme], Engine]]:
    quantized.check(args.weights, args.random_weights is not None)
    if args.random_weights:
        config = replace(presets.config_of(args.random_weights), max_positions=POSITIONS, window=None)
        config = quantized.config_with(config, args.weights)
        return config, lambda scheme: presets.load(config, scheme.name, args.device, gpus=args.gpus)
    config = quantized.config_with(Config.from_folder(resolve(args.model)), args.weights)
    how = {"tokenizer": False, "weights": args.weights, "gpus": args.gpus}
    return config, lambda scheme: engine.load(args.model, scheme.name, args.device, **how)


def contexts_of(
    args: argparse.Namespace, commands: tuple[str, ...], config: Config, ops: Reference
) -> dict[str, list[int]]:
    """Of every command that has a cache: those given, or the usual ones as far as the model's context goes."""
    given = numbers("--context", args.context, multiple_of=WINDOW)
    usual = QUICK if args.quick else USUAL if ops.name == "cuda" else USUAL_CPU
    longest = (config.max_context - 1) // WINDOW * WINDOW  # the step's own token has its place behind it
    wanted = [name for name in usual if name in commands]
    if wanted and not longest:
        raise UserError(f"{wanted[0]} needs a context of at least {WINDOW + 1}: {config.limit}")
    return {name: given or sorted({min(n, longest) for n in usual[name]}) for name in wanted}


def budgets_of(args: argparse.Namespace, ops: Reference, weights: int) -> list[int]:
    enforceable(ops.name)
    free = ops.free_bytes()
    if args.budget:
        found = budgets(args.budget)
    elif ops.name == "cuda":
        found = [min(24 * 10**9, free)]
    else:
        found = [weights + (QUICK_ROOM if args.quick else ROOM)]
    for budget in found:
        if budget <= weights:
            raise UserError(
                f"--budget {size(budget)} does not even hold the weights, {size(weights)}; give a "
                "larger one"
            )
        if budget > free:
            raise UserError(
                f"--budget {size(budget)} is more than the {size(free)} of {ops.name} memory that "
                "are free"
            )
    return found


def check_sizes(runs: Runs, config: Config, ops: Reference, weights: int) -> None:
    held = [n + 1 for contexts in runs.contexts.values() for n in contexts]
    if max(held + runs.prompts, default=0) > config.max_context:
        asked = max(held + runs.prompts)
        raise UserError(f"a context of {asked} is too long, give a shorter --context or --tokens: {config.limit}")
    most = max((n + 1 for name, contexts in runs.contexts.items() if name != "throughput" for n in contexts), default=0)
    sizes = [(max(runs.batches), most, max(runs.batches))] * bool(most) + [(1, n, n) for n in runs.prompts]
    sizes += [(max(runs.batches), n + 1, n) for n in runs.contexts.get("memory", ())]
    try:
        for scheme in runs.schemes:
            for batch, context, tokens in sizes:
                memory.check(config, scheme, ops, batch, context, tokens, weights)
    except UserError as error:
        raise UserError(str(error).replace("--ctx", "--context")) from None
