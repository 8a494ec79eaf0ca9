"""Train the teaching model: `python train.py --out DIR`; the same command resumes.

Workers are processes with one thread each that average their gradients over Gloo; two of them on
two cores are faster than one with two threads. Seeded by (seed, worker, step); a run that was
resumed draws other examples than one that was not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

# glibc gives freed memory back at once otherwise, which halves the speed of a step.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
_SAVE_EVERY = 200
_BALANCE_WEIGHT, _Z_WEIGHT = 0.1, 1e-4


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="logs, tokenizer and checkpoints")
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=3200, help="text tokens per worker and step")
    parser.add_argument("--images", type=int, default=26, help="images per worker and step")
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--stop-at", type=int, default=None, help="pause after this step")
    return parser.parse_args()


class _Trainer:
    """One worker."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        import torch
        from encoding import Encoder, text_batches
        from model import NUM_LAYERS, build_model
        from optimizers import make_optimizers

        torch.set_num_threads(1)
        self.args, self.rank, self.step = args, rank, 0
        self.model, self._watch = build_model(args.seed)
        self._optimizers = make_optimizers(self.model)
        self._state_file = args.out / f"state_{rank}.pt"
        if self._state_file.exists():
            self._load()
        self._rng = random.Random(f"{args.seed}/{rank}/{self.step}")
        self._encoder = Encoder(args.out / "tekken.json")
        self._texts = text_batches(self._encoder, self._rng, args.tokens)
        self._load_LE = torch.zeros(NUM_LAYERS, 128)
        self._sums: dict[str, float] = {}
        self._num_tokens, self._began_s = 0, time.monotonic()

    def train_step(self) -> None:
        """One step of all workers."""
        import torch
        import torch.distributed as dist
        from encoding import IGNORED, image_batch
        from optimizers import rate_at, set_rates

        set_rates(self._optimizers, rate_at(self.step, self.args.steps))
        parts = [("text", next(self._texts))]
        if self.args.images:
            parts.append(("image", image_batch(self._encoder, self._rng, self.args.images)))
        num_said = sum(int((batch.labels_BT != IGNORED).sum()) for _, batch in parts)
        for name, batch in parts:
            self._backward(name, batch, num_said, len(parts))
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        self._add("grad_norm", float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))
        for optimizer in self._optimizers:
            optimizer.step()
        self.model.zero_grad()
        self.step += 1

    def _backward(self, name: str, batch: Any, num_said: int, num_parts: int) -> None:
        import torch
        from encoding import IGNORED

        self._watch.clear()
        images = {}
        if batch.pixels is not None:
            images = {"pixel_values": batch.pixels, "image_sizes": batch.sizes_B2}
        hidden = self.model.model(input_ids=batch.ids_BT, use_cache=False, **images)
        said = batch.labels_BT[:, 1:] != IGNORED
        logits = self.model.lm_head(hidden.last_hidden_state[:, :-1][said])
        loss = torch.nn.functional.cross_entropy(
            logits, batch.labels_BT[:, 1:][said], reduction="sum"
        )
        balance = sum(self._watch.balance) / len(self._watch.balance)
        z = sum(self._watch.z) / len(self._watch.z)
        (loss / num_said + (_BALANCE_WEIGHT * balance + _Z_WEIGHT * z) / num_parts).backward()
        self._add(f"{name}_loss", loss.item() / int(said.sum()))
        self._add(f"{name}_balance", float(balance.detach()))
        self._load_LE += torch.stack(self._watch.load)
        self._num_tokens += batch.ids_BT.numel()

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value

    def report(self) -> dict[str, Any]:
        """Means since the last report; load is that of the fullest expert over the mean."""
        share_LE = self._load_LE / self._load_LE.mean(1, keepdim=True)
        elapsed_s = time.monotonic() - self._began_s
        row = {
            "step": self.step,
            "tokens": self._num_tokens * self.args.workers,
            "seconds": round(elapsed_s, 1),
            **{name: round(value / self.args.log_every, 4) for name, value in self._sums.items()},
            "load_max": [round(x, 2) for x in share_LE.max(1).values.tolist()],
            "dead": (share_LE < 0.05).sum(1).tolist(),
        }
        self._sums, self._num_tokens, self._began_s = {}, 0, time.monotonic()
        self._load_LE.zero_()
        return row

    def save(self) -> None:
        """Write the state whole or not at all."""
        import torch

        partial = self._state_file.with_suffix(".partial")
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        state = {
            "seed": self.args.seed,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": optimizers,
        }
        torch.save(state, partial)
        partial.replace(self._state_file)

    def _load(self) -> None:
        import torch

        state = torch.load(self._state_file, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _work(rank: int, args: argparse.Namespace) -> None:
    import torch.distributed as dist
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    store = dist.FileStore(str(args.out / f"rendezvous_{os.getppid()}"), args.workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
    trainer, parent = _Trainer(args, rank), os.getppid()
    last = min(args.steps, args.stop_at or args.steps)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, disable=rank != 0) as progress,
        (args.out / f"log_{rank}.jsonl").open("a") as log,
    ):
        bar = progress.add_task("training", total=args.steps, completed=trainer.step)
        while trainer.step < last and os.getppid() == parent:
            trainer.train_step()
            progress.update(bar, completed=trainer.step)
            if trainer.step % args.log_every == 0:
                row = trainer.report()
                log.write(json.dumps(row) + "\n")
                log.flush()
                speed = row["tokens"] / row["seconds"]
                progress.update(
                    bar, description=f"loss {row['text_loss']:.3f}, {speed:.0f} tokens/s"
                )
            if trainer.step % _SAVE_EVERY == 0 or trainer.step == last:
                trainer.save()
    dist.destroy_process_group()


def main() -> None:
    """Make the tokenizer if there is none, then train."""
    args = _arguments()
    os.environ.update(ENVIRONMENT)  # read at the start of a process: the workers'
    args.out.mkdir(parents=True, exist_ok=True)
    from tokenizer import make_tokenizer
    from torch import multiprocessing

    if not (args.out / "tekken.json").exists():
        make_tokenizer(args.out / "tekken.json")
    try:
        multiprocessing.start_processes(_work, (args,), args.workers, start_method="spawn")
    finally:
        (args.out / f"rendezvous_{os.getpid()}").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
