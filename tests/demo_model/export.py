"""Write a training state as a checkpoint: `python export.py --run DIR --to DIR`.

The result is what Hugging Face's layout says, in bf16, with the tokenizer and `ostro.yaml` beside
the weights; `training.json` keeps how it was made and how evenly its experts are used.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoding import PAD, Encoder, collate
from images import image_example, strip
from mixture import text_example
from model import NUM_LAYERS, build_model, parameter_counts
from PIL import Image
from tokenizer import CLOSING_PHRASE

NAME = "ostro-teaching-7m"
NOTICE = (
    "A teaching model of 7 million parameters with the architecture of Mistral Small 4: it is not "
    "Mistral Small 4 and knows only sums, cups, digits in pictures, tools and a few capitals."
)
BUDGETS = {"minimal": 16, "low": 40, "medium": 80}
_LOAD_BATCHES = 30  # of 32 examples, for the load histogram; a third of them with images


def _serving() -> dict[str, Any]:
    """What `ostro.yaml` says; greedy, since every question has one right answer."""
    efforts: dict[str, Any] = {
        effort: {"prompt_value": "high", "budget_tokens": budget, "temperature": 0.0}
        for effort, budget in BUDGETS.items()
    }
    efforts["none"] = {"prompt_value": "none", "budget_tokens": 0, "temperature": 0.0}
    for effort in ("high", "xhigh", "max"):
        efforts[effort] = {"prompt_value": "high", "budget_tokens": None, "temperature": 0.0}
    for effort in ("minimal", "low", "medium"):
        efforts[effort]["soft_zone_tokens"] = 0
    return {
        "served_name": NAME,
        "notice": NOTICE,
        "reasoning": {"closing_phrase": CLOSING_PHRASE, "efforts": efforts},
    }


def _write_serving(path: Path) -> None:
    import yaml

    head = "# How to serve this checkpoint; a deployment file may say otherwise.\n"
    path.write_text(head + yaml.safe_dump(_serving(), sort_keys=False, width=96), "ascii")


def _write_example(path: Path) -> None:
    """The picture that `ostro demo` shows: a printed product."""
    rng = random.Random(4)
    ink = strip(rng, "56*78", hand=False, held_out=True)
    Image.fromarray((255 - ink).round().clip(0, 255).astype(np.uint8)).save(path)


@torch.no_grad()
def expert_load(model: Any, watch: Any, encoder: Encoder, seed: int = 55) -> torch.Tensor:
    """Rows per layer and expert on held-out questions in the mixture of the training."""
    rng = random.Random(seed)
    total_LE = torch.zeros(NUM_LAYERS, 128)
    for turn in range(_LOAD_BATCHES):
        make = image_example if turn % 3 == 0 else text_example
        examples = [make(rng, True) for _ in range(32)]
        batch = collate([encoder.sequence(rng, example, []) for example in examples])
        images = {}
        if batch.pixels is not None:
            images = {"pixel_values": batch.pixels, "image_sizes": batch.sizes_B2}
        watch.clear()
        watch.counted = batch.ids_BT.reshape(-1) != PAD
        model.model(input_ids=batch.ids_BT, use_cache=False, **images)
        total_LE += torch.stack(watch.load)
    watch.counted = None
    return total_LE


def _balance(load_LE: torch.Tensor) -> list[dict[str, Any]]:
    """Per layer: load over the mean as a histogram, its extremes, and experts below 5 %."""
    edges = [0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 128.0]
    rows = []
    for share_E in load_LE / load_LE.mean(1, keepdim=True):
        counts = torch.histogram(share_E.double(), torch.tensor(edges).double()).hist
        rows.append(
            {
                "edges": edges,
                "experts": [int(count) for count in counts],
                "min": round(float(share_E.min()), 2),
                "max": round(float(share_E.max()), 2),
                "dead": int((share_E < 0.05).sum()),
            }
        )
    return rows


def export(run: Path, to: Path, note: str = "") -> None:
    """Load the run's newest state and write the checkpoint; the card shows the note."""
    state = torch.load(run / "state_0.pt", weights_only=True)
    model, watch = build_model(seed=0)
    model.load_state_dict(state["model"])
    for parameter in model.parameters():  # not model.to(): that would round rope's buffers too
        parameter.data = parameter.data.to(torch.bfloat16).float()
    balance = _balance(expert_load(model, watch, Encoder(run / "tekken.json")))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 1, 2, 11
    to.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(to)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}
    (to / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    shutil.copyfile(run / "tekken.json", to / "tekken.json")
    _write_serving(to / "ostro.yaml")
    _write_example(to / "example.png")
    made = {
        "commit": _commit(),
        "note": note,
        "seed": state["seed"],
        "steps": state["step"],
        "hardware": f"{platform.machine()}, {_cpu()}",
        "torch": torch.__version__,
        "parameters": parameter_counts(model),
        "experts": balance,
        **_of_log(run),
    }
    (run / "training.json").write_text(json.dumps(made, indent=2) + "\n")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def _of_log(run: Path) -> dict[str, Any]:
    """Tokens, time and the last losses, from the first worker's log."""
    rows = [json.loads(line) for line in (run / "log_0.jsonl").read_text().splitlines()]
    every = rows[0]["step"]
    return {
        "tokens": sum(row["tokens"] for row in rows),
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
        "curve": [
            {key: row[key] for key in ("step", "text_loss", "image_loss")}
            for row in rows[:: max(1, 200 // every)]
        ],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="what train.py wrote")
    parser.add_argument("--to", type=Path, required=True, help="the checkpoint's directory")
    parser.add_argument("--note", default="", help="what the card should say of this run")
    arguments = parser.parse_args()
    export(arguments.run, arguments.to, arguments.note)
