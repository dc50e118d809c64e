"""lm-evaluation-harness against our server, over HTTP as its users run it: `nice python -m tools.harness --harness
VENV/bin/python > docs/results/lm-eval-smollm2-135m.json`.

Needed: a Python with `lm-eval[api]`, transformers (for its tokenizer) and wonderwords (for RULER). No data set is: the
questions of small tasks stand here, and RULER makes its own needles. For each scheme a server is started, both of the
harness's API models ask it, and the log-probabilities that it gets are held against those of a model that is loaded
here and reads the same tokens in the same pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minioscar.engine import Engine, load
from minioscar.errors import Failure
from minioscar.evaluation.fidelity import default_text
from minioscar.serve.pieces import SCORED_PIECE
from minioscar.storage.hub import resolve
from minioscar.tables import markdown
from minioscar.version import __version__
from tools import committed

CONTEXT, LENGTH, SECONDS = 2048, 1024, 900
BEFORE = 1500  # characters of another text in front of the questions: more tokens than one piece, some of them packed
QUESTIONS = (
    ("The capital of France is", " Paris", " Rome"), ("The capital of Italy is", " Rome", " Madrid"),
    ("Two and two are", " four", " seven"), ("The opposite of hot is", " cold", " blue"),
    ("The sun rises in the", " east", " night"), ("A week has seven", " days", " hours"),
    ("Water is made of hydrogen and", " oxygen", " iron"), ("The first month of the year is", " January", " June"),
)  # fmt: skip
TASKS = {
    "minioscar_choices": ("multiple_choice", "acc"), "minioscar_choices_long": ("multiple_choice", "acc"),
    "minioscar_words": ("generate_until", "exact_match"),
}  # fmt: skip
RULER = ("niah_single_1", "niah_multikey_2")  # whose haystacks are made, not read from a data set


def write_tasks(folder: Path) -> None:
    """In the harness's own form: a YAML file each over lines of JSON."""
    for name, (kind, metric) in TASKS.items():
        is_long = name.endswith("long")
        before = f"{default_text()[:BEFORE]}\n\n" if is_long else ""
        asked = QUESTIONS[:: 2 if is_long else 1]
        lines = [{"text": before + text, "choices": choices} for text, *choices in asked]
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, lines)))
        task: dict[str, Any] = {
            "task": name, "dataset_path": "json", "test_split": "test", "output_type": kind, "doc_to_text": "{{text}}",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.json")}},
            "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        if kind == "multiple_choice":
            task |= {"doc_to_choice": "{{choices}}", "doc_to_target": 0, "target_delimiter": ""}
        else:
            task |= {"doc_to_target": "{{choices[0].strip()}}", "generation_kwargs": {"until": ["\n", ".", ","],
                     "max_gen_toks": 8, "do_sample": False}, "filter_list": [{"name": "first", "filter": [
                         {"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]}]}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML


@contextmanager
def serving(model: str, kv: str, device: str) -> Iterator[str]:
    """The URL of a server that answers. Raises Failure where it ends or takes too long."""
    options = ["--kv", kv, "--device", device, "--slots", "2", "--ctx", str(CONTEXT), "--port", "0", "--json"]
    command = [sys.executable, "-m", "minioscar", "serve", model, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=committed.ROOT) as process:
        try:
            url, end = json.loads(process.stdout.readline())["url"], time.monotonic() + SECONDS
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise Failure(f"the server at {url} did not become ready")
                time.sleep(1)
            yield url
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def run(python: str, kind: str, url: str, model: str, tasks: list[str], folder: Path, *more: str) -> dict[str, Any]:
    """What `lm_eval run` makes of these tasks; its samples lie in `folder`. kind: of API model."""
    path, out = ("chat/completions" if "chat" in kind else "completions"), Path(tempfile.mkdtemp(dir=folder))
    given = {
        "model": Path(model).name, "base_url": f"{url}/v1/{path}", "tokenizer": str(resolve(model)),
        "num_concurrent": 2, "max_length": CONTEXT, "timeout": SECONDS,
    }  # fmt: skip
    command = [
        python, "-m", "lm_eval", "run", "--model", kind, "--model_args", ",".join(f"{k}={v}" for k, v in given.items()),
        "--tasks", ",".join(tasks), "--include_path", str(folder), "--output_path", str(out), "--log_samples", *more,
    ]  # fmt: skip
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **offline}, cwd=folder)
    return collected(out, tasks)


def collected(out: Path, tasks: Sequence[str]) -> dict[str, Any]:
    """What the harness wrote: its results, and the samples of each task."""
    [found] = out.rglob("results_*.json")
    samples = {}
    for task in tasks:
        [path] = out.rglob(f"samples_{task}_2*.jsonl")  # a date follows
        samples[task] = list(map(json.loads, path.read_text().splitlines()))
    return {**json.loads(found.read_text()), "samples": samples}


def logprob(engine: Engine, context: str, continuation: str) -> float:
    """Of a continuation's tokens, read in the pieces in which the server reads a prompt that it scores."""
    ids, known = (engine.tokenizer.encode(text) for text in (context + continuation, context))
    cache, logits = engine.new_cache(1, len(ids)), []
    for i in range(0, len(ids), SCORED_PIECE):
        piece = np.array(ids[i : i + SCORED_PIECE])
        logits.append(engine.model.forward(piece, cache, cache.batch_for([0], [len(piece)]), every=True))
    x = np.concatenate(logits)[len(known) - 1 : -1].astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return float((x - np.log(np.exp(x).sum(axis=1, keepdims=True)))[range(len(x)), ids[len(known) :]].sum())


def apart(engine: Engine, samples: list[dict[str, Any]]) -> float:
    """The largest difference between a log-probability that the harness got and ours."""
    found = []
    for sample in samples:
        for given, [[value, _]] in zip(sample["arguments"].values(), sample["resps"], strict=True):
            found.append(abs(float(value) - logprob(engine, given["arg_0"], given["arg_1"])))
    return max(found)


def measured(args: argparse.Namespace, kv: str, folder: Path) -> Iterator[dict[str, Any]]:
    limit, lengths = ["--limit", str(args.limit)], ["--metadata", json.dumps({"max_seq_lengths": [LENGTH]})]
    choices, words = list(TASKS)[:2], list(TASKS)[2:]
    with serving(args.model, kv, args.device) as url:
        local = run(args.harness, "local-completions", url, args.model, [*choices, *words], folder)
        chat = run(args.harness, "local-chat-completions", url, args.model, words, folder, "--apply_chat_template")
        needles = run(args.harness, "local-completions", url, args.model, list(RULER), folder, *limit, *lengths)
    yield from rows_of(load(args.model, kv, args.device), local, chat, needles)


def rows_of(
    engine: Engine, local: dict[str, Any], chat: dict[str, Any], needles: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A row for each task of these runs. engine: of their model and scheme."""
    choices, words = list(TASKS)[:2], list(TASKS)[2:]
    plain, by_chat = "local-completions", "local-chat-completions"
    runs = (plain, local, [*choices, *words]), (by_chat, chat, words), (plain, needles, RULER)
    for kind, result, tasks in runs:
        for task in tasks:
            metric = str(LENGTH) if task in RULER else TASKS[task][1]
            value = next(x for key, x in result["results"][task].items() if key.partition(",")[0] == metric)
            row = {"kv": engine.scheme.name, "model": kind, "task": task, "metric": metric, "value": value}
            row["questions"] = len(result["samples"][task])
            if task in choices:
                row["apart"] = apart(engine, result["samples"][task])
            print(json.dumps(row), file=sys.stderr, flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--harness", default=sys.executable, help="a Python that has lm-eval")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kv", default="bf16,int2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, default=4, help="needles of each kind")
    args = parser.parse_args()
    names = ("lm_eval", "transformers", "datasets")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    versions = json.loads(subprocess.run([args.harness, "-c", code], check=True, capture_output=True).stdout)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        for kv in args.kv.split(","):
            rows += measured(args, kv, Path(folder))
    report = {"model": args.model, "device": args.device, "versions": {**versions, "minioscar": __version__}}
    print(json.dumps({**report, "length": LENGTH, "context": CONTEXT, "rows": rows}, indent=1))


def table() -> str:
    """What ran, for docs/benchmarks.md."""
    report = committed.load("lm-eval-smollm2-135m")
    rows = [
        [f"`{row['task']}`", f"`{row['model']}`", f"`{row['kv']}`", f"{row['questions']}", f"{row['value']:.3f}",
         f"{row['apart']:.1e}" if "apart" in row else ""] for row in report["rows"]
    ]  # fmt: skip
    head = "task", "lm-eval's `--model`", "`--kv`", "questions", "score", "log-probabilities apart from ours, nats"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    note = f"{report['model']} on {report['device']}, needles in {report['length']:,} tokens. {versions}."
    return "\n".join([*markdown(head, rows), "", note])


TABLES = {"lm_eval": table}

if __name__ == "__main__":
    main()
