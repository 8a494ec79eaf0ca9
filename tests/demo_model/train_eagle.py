"""Train the speculation head: `python train_eagle.py --run DIR --model CHECKPOINT`; it resumes.

First the corpus, in shards, then the head, and whenever the state is saved, the head's official
file as well: a run that is stopped leaves one that serves. Another checkpoint begins another
corpus and head. One process, one thread.

Shape letters: B sequences, Q rows that draft, V vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train import ENVIRONMENT

if TYPE_CHECKING:
    import torch
    from eagle import EagleHead
    from eagle_batches import HeadBatch
    from eagle_corpus import Heard, Target
    from encoding import Encoder

NUM_DRAFTS = 3  # that training goes through
_SAVE_EVERY = 100  # steps
_UNREACHED = 0.1  # weight of a draft that follows a wrong one: it would never be looked at


def head_loss(
    head: EagleHead, target: Target, batch: HeadBatch, num_drafts: int = NUM_DRAFTS
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Cross-entropy of each draft to the target's distribution, a row's drafts one on another.

    Returns:
        The mean over all drafts that could be made, and per place (right, made), where right means
        that it and all before it are the tokens that follow.
    """
    import torch
    from eagle_batches import drafts

    reached_BQ = batch.is_row_BQ
    loss, weight, counts = torch.zeros(()), torch.zeros(()), []
    for draft in itertools.islice(drafts(head, batch), num_drafts):
        made_BQ = draft.made_BQ
        with torch.no_grad():
            wanted = (draft.hidden_BQD[made_BQ] @ target.head_VD.T).softmax(-1)
        said = (draft.out_BQD[made_BQ] @ target.head_VD.T).log_softmax(-1)
        scale = torch.where(reached_BQ[made_BQ], 1.0, _UNREACHED)
        loss = loss - (scale * (wanted * said).sum(-1)).sum()
        weight = weight + scale.sum()
        right_BQ = torch.zeros_like(made_BQ)
        right_BQ[made_BQ] = said.argmax(-1) == draft.token_BQ[made_BQ]
        reached_BQ = reached_BQ & right_BQ
        counts.append((int(reached_BQ.sum()), int(made_BQ.sum())))
    return loss / weight, counts


class HeadTrainer:
    """The head, its optimisers and what they have seen."""

    def __init__(self, target: Target, num_steps: int, seed: int, **sizes: int) -> None:
        import torch
        import torch.distributed as dist
        from eagle import EagleHead
        from optimizers import head_optimizers

        if not dist.is_initialized():  # Muon shares its work out among workers; there is one
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        torch.manual_seed(seed)
        self.head = EagleHead(target.config, **sizes)
        self.head.start_from(target.table_VD, target.norm)
        self.step, self.num_steps = 0, num_steps
        self._target, self._optimizers = target, head_optimizers(self.head)

    def train_step(self, batch: HeadBatch) -> tuple[float, list[tuple[int, int]]]:
        """One step: the loss before it, and `head_loss`'s counts."""
        import torch
        from optimizers import rate_at, set_rates

        set_rates(self._optimizers, rate_at(self.step, self.num_steps))
        loss, counts = head_loss(self.head, self._target, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self.head.zero_grad()
        self.step += 1
        return float(loss.detach()), counts

    def save(self, path: Path) -> None:
        """Write the state whole or not at all."""
        import torch

        partial = path.with_suffix(".partial")
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        state = {"step": self.step, "head": self.head.state_dict(), "optimizers": optimizers}
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on where `save` was called."""
        import torch

        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def corpus(folder: Path, encoder: Encoder, target: Target, args: argparse.Namespace) -> list[Heard]:
    """The shards, those that are missing made first."""
    import torch
    from eagle_corpus import Heard, draw
    from rich.progress import track

    heard = []
    for index in track(range(args.shards), "corpus"):
        file = folder / f"corpus_{index}.pt"
        if not file.exists():
            drawn = draw(
                random.Random(f"{args.seed}/eagle/{index}"), encoder, target, args.conversations
            )
            torch.save([asdict(one) for one in drawn], file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)
        heard += [Heard(**fields) for fields in torch.load(file, weights_only=True)]
    return heard


def train(args: argparse.Namespace) -> None:
    """Corpus, head, file."""
    import torch
    from eagle import FOLDER, save_head
    from eagle_batches import batches
    from eagle_corpus import Target
    from encoding import Encoder
    from model import load_model
    from rich.progress import Progress

    torch.set_num_threads(1)
    folder = args.run / f"eagle_{zlib.crc32((args.model / 'model.safetensors').read_bytes()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(args.model / "tekken.json")
    target = Target(load_model(args.model), encoder)
    heard = corpus(folder, encoder, target, args)
    trainer = HeadTrainer(target, args.steps, args.seed)
    if (folder / "state.pt").exists():
        trainer.load(folder / "state.pt")
    source = batches(target, random.Random(f"{args.seed}/eagle/{trainer.step}"), heard, args.rows)
    with Progress() as progress, (folder / "log.jsonl").open("a") as log:
        bar = progress.add_task("head", total=args.steps, completed=trainer.step)
        window = _Window()
        while trainer.step < args.steps:
            window.add(*trainer.train_step(next(source)))
            progress.update(bar, completed=trainer.step)
            if trainer.step % args.log_every == 0:
                row = {"step": trainer.step, "conversations": len(heard), **window.row()}
                log.write(json.dumps(row) + "\n")
                log.flush()
                window = _Window()
            if trainer.step % _SAVE_EVERY == 0 or trainer.step == args.steps:
                trainer.save(folder / "state.pt")
                save_head(trainer.head, args.model / FOLDER)
    made = {"note": args.note, "seed": args.seed, **_of_log(folder / "log.jsonl")}
    (args.run / "eagle_training.json").write_text(json.dumps(made, indent=2) + "\n")


def _of_log(file: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        "steps": rows[-1]["step"],
        "conversations": rows[-1]["conversations"],
        "positions": sum(row["rows"] for row in rows),
        "cpu_minutes": round(sum(row["cpu_seconds"] for row in rows) / 60, 1),
    }


class _Window:
    """Means since the last line of the log."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._counts: list[list[tuple[int, int]]] = []
        self._began_s, self._began_cpu_s = time.monotonic(), time.process_time()

    def add(self, loss: float, counts: list[tuple[int, int]]) -> None:
        self._losses.append(loss)
        self._counts.append(counts)

    def row(self) -> dict[str, Any]:
        by_place = [
            [sum(part) for part in zip(*counts, strict=True)]
            for counts in zip(*self._counts, strict=True)
        ]
        return {
            "loss": round(sum(self._losses) / len(self._losses), 4),
            "right": [round(right / max(made, 1), 4) for right, made in by_place],
            "rows": by_place[0][1],
            "seconds": round(time.monotonic() - self._began_s, 1),
            "cpu_seconds": round(time.process_time() - self._began_cpu_s, 1),
        }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="log, corpus and state")
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint to draft for")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--shards", type=int, default=10, help="parts of the corpus")
    parser.add_argument("--conversations", type=int, default=500, help="in a shard")
    parser.add_argument("--rows", type=int, default=600, help="positions per step")
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what the card should say of this run")
    return parser.parse_args()


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS") != "1":  # read at the start of a process
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    train(_arguments())
