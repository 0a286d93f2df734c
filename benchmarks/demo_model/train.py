"""Train the demo model on one CPU thread: ``python -m vllm_kvcompress.bench.demo_model.train``."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from .language import Mix, Row, training_row
from .network import Network, Shape, export
from .tokenizer import (
    MAX_POSITIONS,
    SPELLING_SCALE,
    respellings,
    save_tokenizer,
    trained_tokens,
    vocabulary,
)
from .words import WORDS

RESPELL_RATE = 0.04  # of the input words read in another spelling
CONTEXT_SHARE, CONTEXT_WEIGHT = 0.06, 0.1  # loss on tokens that are not answers
WARMUP_STEPS = 80
SAVE_EVERY_S = 120.0


@dataclass(frozen=True)
class Phase:
    """One stage of the curriculum. A batch holds rows of one length, ``batch_tokens`` in all."""

    name: str
    tokens: int
    lengths: tuple[int, ...]
    batch_tokens: int
    lr: tuple[float, float]  # falls along half a cosine from the first to the second
    mix: Mix
    max_jump: int  # random gaps in the position ids, in all


CURRICULUM = (
    Phase(
        "copying",
        tokens=1_250_000,
        lengths=(48, 64),
        batch_tokens=1024,
        lr=(2.5e-3, 2.5e-3),
        mix=Mix((0.0, 0.1), (4, 8), 8, recital_rate=0.3),
        max_jump=0,
    ),
    Phase(
        "short and dense",
        tokens=3_000_000,
        lengths=(64, 96, 128),
        batch_tokens=2048,
        lr=(2.5e-3, 1.8e-3),
        mix=Mix((0.0, 0.2), (4, 8), 8, recital_rate=0.05),
        max_jump=0,
    ),
    Phase(
        "haystacks",
        tokens=4_000_000,
        lengths=(256, 512, 512, 1024),
        batch_tokens=4096,
        lr=(1.8e-3, 8e-4),
        mix=Mix((0.2, 0.95), (1, 64), 12),
        max_jump=6000,
    ),
    Phase(
        "long",
        tokens=1_600_000,
        lengths=(256, 512, 1024, 1024, 2048, 4096),
        batch_tokens=4096,
        lr=(8e-4, 2e-5),
        mix=Mix((0.3, 0.97), (1, 64), 12),
        max_jump=MAX_POSITIONS,
    ),
)


@dataclass
class Batch:
    ids: Tensor  # [B, T]
    scale: Tensor  # [B, T], of the embedding
    positions: Tensor  # [B, T]
    wanted: Tensor  # [B, T], predict the next token here
    targets: Tensor  # [n]
    is_answer: Tensor  # [n]


class Encoder:
    """Rows of pieces -> tensors, in the vocabulary of trained tokens."""

    def __init__(self) -> None:
        vocab = vocabulary()
        origin = dict(respellings())
        self.lookup = {piece: (vocab[origin.get(piece, piece)], piece in origin) for piece in vocab}
        self.first_word = len(trained_tokens()) - len(WORDS)

    def __call__(self, rows: list[Row], max_jump: int, generator: torch.Generator) -> Batch:
        pairs = torch.tensor([[self.lookup[piece] for piece in row.pieces] for row in rows])
        ids, respelled = pairs[..., 0], pairs[..., 1].bool()
        is_answer = torch.tensor([row.is_answer for row in rows])
        draw = torch.rand(2, *ids.shape, generator=generator)
        respelled |= (draw[0] < RESPELL_RATE) & (ids >= self.first_word) & ~is_answer
        scale = torch.where(respelled, SPELLING_SCALE, 1.0)
        wanted = is_answer | (draw[1] < CONTEXT_SHARE)
        wanted[:, 0] = False
        return Batch(
            ids=ids[:, :-1],
            scale=scale[:, :-1],
            positions=self._positions(rows, max_jump, generator)[:, :-1],
            wanted=wanted[:, 1:],
            targets=ids[wanted],
            is_answer=is_answer[wanted],
        )

    def _positions(self, rows: list[Row], max_jump: int, generator: torch.Generator) -> Tensor:
        """Position ids ``[B, T]``; in half of the rows with one to four gaps in the haystack.

        RoPE only sees distances, so gaps teach long distances at the price of short rows.
        """
        b, t = len(rows), len(rows[0].pieces)
        step = torch.ones(b, t, dtype=torch.long)
        step[:, 0] = 0
        room = min(max_jump, MAX_POSITIONS - t)
        for i, row in enumerate(rows):
            coin, share, cuts = torch.rand(3, generator=generator).tolist()
            if coin < 0.5 or room <= 0:
                continue
            n_cuts = 1 + int(cuts * 4)
            at = torch.randint(1, row.first_question + 1, (n_cuts,), generator=generator)
            step[i].index_add_(0, at, torch.full((n_cuts,), int(room * share) // n_cuts))
        return step.cumsum(1)


class Trainer:
    """Network, optimizer and progress, with everything needed to go on after an interruption."""

    stored = torch.float32

    def __init__(
        self, seed: int, curriculum: tuple[Phase, ...], shape: Shape | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.seed, self.curriculum = seed, curriculum
        self.network = Network(shape or Shape())
        matrices = [p for p in self.network.parameters() if p.dim() > 1]
        vectors = [p for p in self.network.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.97),
        )
        self.encode = Encoder()
        self.progress = {"phase": 0, "step": 0, "seconds": [0.0] * len(curriculum), "accuracy": 0.0}

    def step(self) -> None:
        phase = self.curriculum[self.progress["phase"]]
        step = self.progress["step"]
        started = time.perf_counter()
        batch = self._batch(phase, step)
        lr = self._learning_rate(phase, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        logits = self.network(batch.ids, batch.scale, batch.positions, batch.wanted)
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        weights = torch.where(batch.is_answer, 1.0, CONTEXT_WEIGHT)
        loss = (losses * weights).sum() / weights.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()

        right = (logits.argmax(-1) == batch.targets)[batch.is_answer].float().mean().item()
        self.progress["accuracy"] += 0.05 * (right - self.progress["accuracy"])
        self.progress["seconds"][self.progress["phase"]] += time.perf_counter() - started
        self.progress["step"] = step + 1
        if self.progress["step"] >= self.steps_of(phase):
            self.progress["phase"] += 1
            self.progress["step"] = 0

    @property
    def done(self) -> bool:
        return self.progress["phase"] >= len(self.curriculum)

    @staticmethod
    def steps_of(phase: Phase) -> int:
        return max(1, phase.tokens // phase.batch_tokens)

    def _batch(self, phase: Phase, step: int) -> Batch:
        """The batch of a step depends on seed, phase and step alone: resuming repeats nothing."""
        rng = Random(f"{self.seed}/{phase.name}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        length = rng.choice(phase.lengths)
        n_rows = max(1, phase.batch_tokens // length)
        rows = [training_row(rng, length, phase.mix) for _ in range(n_rows)]
        return self.encode(rows, phase.max_jump, generator)

    def _learning_rate(self, phase: Phase, step: int) -> float:
        first, last = phase.lr
        done = torch.tensor(step / self.steps_of(phase) * torch.pi)
        lr = last + (first - last) * 0.5 * (1 + torch.cos(done).item())
        is_cold = phase is self.curriculum[0]
        return lr * min(1.0, (step + 1) / WARMUP_STEPS) if is_cold else lr

    def save(self, work: Path) -> None:
        tensors = dict(self.network.named_parameters())
        for name, parameter in self.network.named_parameters():
            for moment, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{moment}/{name}"] = value
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        temporary = work / "state.partial"
        save_file(tensors, temporary, metadata={"progress": json.dumps(self.progress)})
        os.replace(temporary, work / "state.safetensors")
        (work / "progress.json").write_text(json.dumps(self.progress, indent=2) + "\n")

    def load(self, work: Path) -> None:
        tensors = load_file(work / "state.safetensors")
        self.progress = json.loads((work / "progress.json").read_text())
        for name, parameter in self.network.named_parameters():
            parameter.data.copy_(tensors[name])
            self.optimizer.state[parameter] = {
                moment: tensors[f"{moment}/{name}"]
                for moment in ("step", "exp_avg", "exp_avg_sq")
                if f"{moment}/{name}" in tensors
            }

    def summary(self) -> dict[str, object]:
        phase, step = self.progress["phase"], self.progress["step"]
        tokens = [self.steps_of(p) * p.batch_tokens for p in self.curriculum[:phase]]
        if not self.done:
            tokens.append(step * self.curriculum[phase].batch_tokens)
        return {
            "finished": self.done,
            "seed": self.seed,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "tokens": sum(tokens),
            "minutes": round(sum(self.progress["seconds"]) / 60, 1),
            "training_answer_accuracy": round(self.progress["accuracy"], 4),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "trained_tokens_in_vocabulary": len(trained_tokens()),
            "phases": [
                {**asdict(p), "minutes": round(seconds / 60, 1)}
                for p, seconds in zip(self.curriculum, self.progress["seconds"], strict=True)
            ],
        }

    def publish(self, folder: Path) -> None:
        """Write the loadable model; every file is replaced at once, so readers never see half."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo_model-") as temporary:
            fresh = Path(temporary)
            save_tokenizer(fresh)
            export(self.network, fresh, self.stored)
            (fresh / "training.json").write_text(json.dumps(self.summary(), indent=2) + "\n")
            for path in fresh.iterdir():
                path.chmod(0o644)
                os.replace(path, folder / path.name)


def train(
    out: Annotated[Path, typer.Option(help="Folder of the loadable model.")] = Path(
        "vllm_kvcompress/demo_model"
    ),
    work: Annotated[
        Path, typer.Option(help="Folder of the training state; a run found here is continued.")
    ] = Path("build/demo_model"),
    seed: Annotated[int, typer.Option(help="Decides the first weights and every row.")] = 17,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    stop_after_s: Annotated[
        float, typer.Option(help="Save and stop after so many seconds (run again to go on).")
    ] = float("inf"),
) -> None:
    """Train the demo model from nothing, in four phases of growing length.

    The bar shows the share of answer tokens predicted right, a moving average over fresh rows.
    It stands at 0.2 for most of a million tokens, then climbs within another million to 0.8 as the
    model learns to look keys up, falls at the start of each phase and ends above 0.9 (a tenth of
    the values are numbers in digits, which it does not learn). A loadable model is written to --out
    at the start and after each phase. Interrupt and run again at will: it goes on from the state
    last saved in --work.
    """
    torch.set_num_threads(threads)
    run(Trainer(seed, CURRICULUM), out, work, stop_after_s)


def run(trainer: Trainer, out: Path, work: Path, stop_after_s: float) -> None:
    """Train until the curriculum or the time ends, from the state in `work` if there is one."""
    work.mkdir(parents=True, exist_ok=True)
    if (work / "state.safetensors").exists():
        trainer.load(work)
    trainer.publish(out)
    started = saved = time.monotonic()
    while not trainer.done and time.monotonic() - started < stop_after_s:
        index = trainer.progress["phase"]
        phase = trainer.curriculum[index]
        bar = tqdm(
            total=trainer.steps_of(phase) * phase.batch_tokens,
            initial=trainer.progress["step"] * phase.batch_tokens,
            desc=f"{index + 1}/{len(trainer.curriculum)} {phase.name}",
            unit="tok",
            unit_scale=True,
            mininterval=10,
        )
        while trainer.progress["phase"] == index and time.monotonic() - started < stop_after_s:
            trainer.step()
            bar.update(phase.batch_tokens)
            bar.set_postfix(answers=f"{trainer.progress['accuracy']:.3f}", refresh=False)
            if time.monotonic() - saved > SAVE_EVERY_S:
                trainer.save(work)
                saved = time.monotonic()
        bar.close()
        trainer.save(work)
        trainer.publish(out)


if __name__ == "__main__":
    typer.run(train)
