"""Trains a model of Qwen3-VL's kind with two million parameters to read pages (minioscar/evaluation/pages.py).

    python -m tools.train_reader OUT --seconds 180        (a GPU; torch, safetensors)
    python -m tools.train_reader --compare FOLDER         (how far its numbers are from transformers')

The pages grow: a stage is left when four of five answers are right, for one with larger or fuller pages. All questions
about a page stand behind it, one after another, each with its answer. The tower is also asked, less and less, by
products that are thrown away: DeepStack's features for the symbols that a token shows, the embeddings for the whole
cell it is of. OUT gets the model in BF16 (a checkpoint every half minute), `log.jsonl`, and `report.json`: exact
answers at every stage and size, with the rounded weights. Seeds are fixed; a GPU adds in no fixed order, so that
another run gives other weights of the same kind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minioscar.evaluation import pages
from tools.reader_model import CONFIG, TEXT, VISION, VOCAB, Grid, Reader
from tools.reader_pages import ASCII, NONE, QUESTION, Batch, Maker, Stage, glyphs
from tools.reader_tokenizer import write_tokenizer

STAGES = (
    Stage(((3, 5), (4, 9)), jitter=0.0, least=0.5),
    Stage(((4, 9), (5, 9)), jitter=0.25, least=0.5),
    Stage(((5, 9), (5, 13)), jitter=0.5),
    Stage(((9, 9), (7, 14), (9, 13))),
    Stage(((13, 13), (9, 21), (16, 14))),
    Stage(((15, 21), (12, 26), (21, 15), (18, 18))),
    Stage(((15, 21), (20, 16), (21, 26), (25, 21), (25, 25))),
    Stage(((15, 21), (21, 26), (30, 33), (34, 30), (32, 32), (45, 44), (41, 49))),
)
SIZES = (15, 20), (25, 25), (32, 32), (38, 39), (44, 45)  # of the report: 300, 625, 1024, 1482, 1980 tokens
QUESTIONS, LARGE = (24, 60), 500  # most about a page, and about one of more tokens than these
NEXT, LATEST = 0.8, 0.12  # the share of right answers, or of all the time, with which a stage is left
LABELS = len(pages.LETTERS) * len(pages.DIGITS)
SEED, EXAM_SEED = 2025, 7


def questions_of(shape: tuple[int, int], cells: int) -> int:
    return min(cells, QUESTIONS[math.prod(shape) > LARGE])


def cells_of(shape: tuple[int, int], least: float, rng: random.Random) -> int:
    most = min(math.prod(pages.boxes_of(*shape)), LABELS)
    return max(1, round(most * rng.uniform(least, 1)))


class Training:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.start = args, time.monotonic()
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.reader = Reader().to(self.device)
        self.probes = nn.ModuleList(nn.Linear(TEXT["hidden_size"], n * len(ASCII)) for n in (2, 6)).to(self.device)
        self.maker, self.rng = Maker(glyphs(args.glyphs, self.device), args.seed), random.Random(args.seed)
        matrices = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        self.grids: dict[tuple[int, int, int], Grid] = {}
        self.step, self.stage = 0, 0
        if args.start:
            state = torch.load(args.start / "state.pt", map_location=self.device)
            self.reader.load_state_dict(state["reader"])
            self.probes.load_state_dict(state["probes"])
            self.stage = state["stage"]
        args.out.mkdir(parents=True, exist_ok=True)
        self.log = (args.out / "log.jsonl").open("w")

    def parameters(self) -> list[Tensor]:
        return [*self.reader.parameters(), *self.probes.parameters()]

    @property
    def progress(self) -> float:
        if self.args.steps:
            return self.step / self.args.steps
        return (time.monotonic() - self.start) / self.args.seconds

    def grid(self, shape: tuple[int, int], after: int) -> Grid:
        key = (*shape, after)
        if key not in self.grids:
            self.grids[key] = Grid.of(*key, self.device)
        return self.grids[key]

    def sample(self) -> tuple[Batch, Grid]:
        """Mostly of the stage that is reached."""
        stage = STAGES[self.stage if self.rng.random() < 0.8 else self.rng.randint(0, self.stage)]
        shape = self.rng.choice(stage.shapes)
        cells = cells_of(shape, stage.least, self.rng)
        questions = questions_of(shape, cells)
        tokens = math.prod(shape) + QUESTION * questions
        size = max(4, min(768, self.args.tokens // tokens))
        grid = self.grid(shape, QUESTION * questions)
        jitter = stage.jitter * self.rng.random() ** 0.5
        return self.maker.batch(size, shape, cells, questions, jitter), grid

    def outputs(self, batch: Batch, grid: Grid) -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.reader(batch.pages, batch.ids, grid)

    def learn(self) -> dict[str, Tensor]:
        batch, grid = self.sample()
        logits, seen, deep = self.outputs(batch, grid)
        loss = cross_entropy(logits, batch.targets)
        found = {"loss": loss.detach(), "right": exact(logits, batch).mean()}
        asked = ("here", self.probes[0], deep[0], batch.here), ("cell", self.probes[1], seen, batch.cell)
        for name, probe, tokens, wanted in asked:
            guess = probe(tokens.float()).view(*wanted.shape, len(ASCII))
            hint = cross_entropy(guess, wanted)
            loss = loss + getattr(self.args, f"hint_{name}") * (1 - min(1, self.progress)) ** 2 * hint
            found |= {name: hint.detach(), f"{name}_right": (guess.argmax(-1) == wanted).sum() / (wanted != NONE).sum()}
        loss.backward()
        found["norm"] = nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        fall = 0.01 + 0.99 * math.cos(math.pi / 2 * min(1, self.progress)) ** 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.rate * min(1, (self.step + 1) / 150) * fall
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def run(self) -> None:
        saved, sums, began, every = time.monotonic(), {}, self.progress, 20
        while self.progress < 1 and (not self.args.steps or time.monotonic() - self.start < self.args.seconds):
            for name, value in self.learn().items():
                sums[name] = sums.get(name, 0) + value
            self.step += 1
            if self.step % every:
                continue
            row = {name: float(total) / every for name, total in sums.items()}
            sums = {}
            said = {"step": self.step, "seconds": round(time.monotonic() - self.start, 1), "stage": self.stage}
            self.say(said | {name: round(value, 4) for name, value in row.items()}, self.step % (5 * every) == 0)
            last = self.stage == len(STAGES) - 1
            if not last and (row["right"] >= NEXT or self.progress - began > LATEST):
                self.stage, began = self.stage + 1, self.progress
            if time.monotonic() - saved > 30:
                self.save()
                saved = time.monotonic()

    def say(self, row: dict[str, Any], aloud: bool) -> None:
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        if aloud:
            print(row, file=sys.stderr, flush=True)

    def save(self) -> None:
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in self.reader.state_dict().items()}
        path = self.args.out / "model.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, f"{path}.part", metadata={"format": "pt"})
        Path(f"{path}.part").replace(path)
        state = {"reader": self.reader.state_dict(), "probes": self.probes.state_dict(), "stage": self.stage}
        torch.save(state, self.args.out / "state.pt")

    def report(self) -> dict[str, Any]:
        """Exact answers of pages of other seeds, with the weights as they are saved."""
        with torch.no_grad():
            for tensor in self.reader.parameters():
                tensor.copy_(tensor.to(torch.bfloat16))
        found: dict[str, Any] = {"steps": self.step, "seconds": time.monotonic() - self.start, "stage": self.stage}
        found["parameters"] = sum(p.numel() for p in self.reader.parameters())
        data = (self.args.out / "model.safetensors").read_bytes()
        found |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "torch": torch.__version__}
        found["glyphs"] = hashlib.sha256(np.load(self.args.glyphs).tobytes()).hexdigest()
        found["stages"] = [{"shape": s.shapes[-1], **self.exact(s.shapes[-1], 1, s.jitter)} for s in STAGES]
        found["sizes"] = [{"shape": shape, **self.exact(shape, least)} for shape in SIZES for least in (0.5, 1)]
        return found

    @torch.no_grad()
    def exact(self, shape: tuple[int, int], fill: float, jitter: float = 1.0) -> dict[str, Any]:
        maker, hits = Maker(self.maker.atlas, EXAM_SEED), []
        cells = round(min(math.prod(pages.boxes_of(*shape)), LABELS) * fill)
        questions = questions_of(shape, cells)
        size = max(4, min(64, self.args.tokens // math.prod(shape)))
        for _ in range(-(-self.args.exam // (size * questions))):
            batch = maker.batch(size, shape, cells, questions, jitter)
            hits.append(exact(self.outputs(batch, self.grid(shape, QUESTION * questions))[0], batch).float())
        table = torch.cat(hits)
        first = float(table[:, 0].mean())
        return {"cells": cells, "answers": table.numel(), "exact": float(table.mean()), "exact_first": first}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=NONE)


def exact(logits: Tensor, batch: Batch) -> Tensor:
    """Whether every id of an answer is the likeliest; float32 [batch, questions]."""
    right = (logits.argmax(-1) == batch.targets) | (batch.targets == NONE)
    return right.view(len(right), -1, QUESTION).all(dim=-1).float()


def compare(folder: Path, glyphs_file: Path) -> float:
    """The largest difference of logits from those of transformers, in float32, over the largest logit."""
    from safetensors.torch import load_file
    from transformers import Qwen3VLForConditionalGeneration

    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    ours = Reader().eval()
    ours.load_state_dict({name: x.float() for name, x in load_file(folder / "model.safetensors").items()})
    shape, maker = (9, 14), Maker(glyphs(glyphs_file, "cpu"), 1)
    batch = maker.batch(1, shape, 20, 5)
    grid = Grid.of(*shape, 5 * QUESTION, "cpu")
    places = [CONFIG[f"{name}_token_id"] for name in ("vision_start", *["image"] * math.prod(shape), "vision_end")]
    ids = torch.cat([torch.tensor([places]), batch.ids], dim=1)
    x = batch.pages.view(shape[0], 2, 16, shape[1], 2, 16).permute(0, 3, 1, 4, 2, 5).reshape(-1, 1, 1, 16, 16)
    pixels = x.expand(-1, 3, 2, 16, 16).reshape(len(x), -1)
    with torch.no_grad():
        found = ours(batch.pages, batch.ids, grid)[0][0]
        grids = torch.tensor([[1, 2 * shape[0], 2 * shape[1]]])
        kinds = (ids == CONFIG["image_token_id"]).int()
        all_of_them = theirs(ids, pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=kinds).logits[0]
        wanted = all_of_them[len(places) :]
    return float((found - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--start", type=Path, help="goes on from the OUT of another run (its state.pt)")
    parser.add_argument("--seconds", type=float, default=180, help="of training")
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: as many as the seconds allow")
    parser.add_argument("--tokens", type=int, default=24_000, help="of a step, of pages and questions")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--hint-here", type=float, default=0.5, help="weight of a question to the tower, at first")
    parser.add_argument("--hint-cell", type=float, default=0.5, help="the same of the other")
    parser.add_argument("--exam", type=int, default=6000, help="answers of the report at each size")
    parser.add_argument("--glyphs", type=Path, default=Path("reader-glyphs.npy"))
    args = parser.parse_args()
    if args.compare:
        print(compare(args.compare, args.glyphs))
        return
    training = Training(args)
    for name, content in (("config", CONFIG), ("preprocessor_config", PREPROCESSOR), ("generation_config", GENERATION)):
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    write_tokenizer(args.out, VOCAB)
    training.run()
    training.save()
    report = training.report()
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report), file=sys.stderr, flush=True)


PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast", "size": {"shortest_edge": 1 << 10, "longest_edge": 1 << 22},
    "patch_size": VISION["patch_size"], "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
GENERATION = {"eos_token_id": TEXT["eos_token_id"], "do_sample": False}

if __name__ == "__main__":
    main()
