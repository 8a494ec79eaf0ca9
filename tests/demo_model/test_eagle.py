"""The head is Mistral 4's dense layers over EAGLE's input, learns, and is written officially."""

from __future__ import annotations

import copy
import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mistral4Config
from transformers.models.mistral4.modeling_mistral4 import Mistral4Model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import evaluate_eagle  # noqa: E402
from eagle import EagleHead, load_head, save_head  # noqa: E402
from eagle_batches import batches, drafts, head_batch  # noqa: E402
from eagle_corpus import Opening, Target, draw  # noqa: E402
from encoding import END_THINK, THINK, Dialogue, Encoder  # noqa: E402
from model import load_model, teaching_config  # noqa: E402
from report import speculation  # noqa: E402
from train_eagle import HeadTrainer, head_loss  # noqa: E402

MODEL = HERE.parents[1] / "cluster" / "teaching_model"
_HF_NAMES = {
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(MODEL / "tekken.json")


@pytest.fixture(scope="module")
def target(encoder: Encoder) -> Target:
    return Target(load_model(MODEL), encoder)


@pytest.fixture(scope="module")
def heard(target: Target, encoder: Encoder) -> list[Any]:
    return draw(random.Random(1), encoder, target, 8)


def _random_head(num_layers: int, config: Mistral4Config | None = None) -> EagleHead:
    """Weights large enough, norms uneven enough, that nothing left out goes unnoticed."""
    torch.manual_seed(num_layers)
    head = EagleHead(config or teaching_config().text_config, num_layers, inner=96)
    for parameter in head.parameters():
        if parameter.ndim == 1:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        else:
            parameter.data *= 3
    return head.requires_grad_(False)


def _in_transformers(head: EagleHead) -> Mistral4Model:
    config = copy.deepcopy(head.config)
    config.num_hidden_layers = config.first_k_dense_replace = len(head.layers)
    config.intermediate_size = head.inner
    model = Mistral4Model(config)
    for layer in model.layers:
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5
    weights = {}
    for name, weight in head.state_dict().items():
        if name.startswith("layers."):
            _, index, part = name.removesuffix(".weight").split(".", 2)
            weights[f"layers.{index}.{_HF_NAMES[part]}.weight"] = weight
    weights |= {"norm.weight": head.norm.weight, "embed_tokens.weight": model.embed_tokens.weight}
    model.load_state_dict(weights)
    return model.requires_grad_(False)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_head_computes_what_the_dense_layers_of_transformers_do(num_layers: int) -> None:
    head = _random_head(num_layers)
    oracle = _in_transformers(head)
    length, hidden = 1100, head.config.hidden_size  # beyond 1024 queries are scaled
    embedded, states = torch.randn(2, 1, length, hidden)
    rows = torch.tensor([[0, 7, 500, 1060]])
    inputs = head.eagle_linear(torch.cat([embedded, states], -1))
    out, drafting = head(embedded, states, rows)
    wanted = oracle(inputs_embeds=inputs).last_hidden_state
    torch.testing.assert_close(out, wanted[:, rows[0]], rtol=1e-4, atol=1e-4)
    given = torch.randn(2, 1, len(rows[0]), hidden)
    steps = [out]
    for turn in range(2):
        steps.append(head.go_on(given[turn], steps[-1], drafting))
    for column, row in enumerate(rows[0].tolist()):
        own = [
            head.eagle_linear(torch.cat([given[turn][:, column], steps[turn][:, column]], -1))
            for turn in range(2)
        ]
        line = torch.cat([inputs[:, : row + 1], torch.stack(own, 1)], 1)
        wanted = oracle(inputs_embeds=line).last_hidden_state
        for turn in range(2):
            got = steps[turn + 1][:, column]
            torch.testing.assert_close(got, wanted[:, row + 1 + turn], rtol=1e-4, atol=1e-4)


def test_written_head_has_the_official_names_and_says_the_same(tmp_path: Path) -> None:
    head = _random_head(2)
    for parameter in head.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    save_head(head, tmp_path)
    layer = [
        *(f"attention.{name}" for name in "wq_a q_a_norm wq_b wkv_a_with_mqa".split()),
        *(f"attention.{name}" for name in "kv_a_norm wkv_b wo".split()),
        *"attention_norm ffn_norm feed_forward.w1 feed_forward.w2 feed_forward.w3".split(),
    ]
    names = {f"layers.{index}.{name}.weight" for index in range(2) for name in layer}
    tensors = load_file(tmp_path / "consolidated.safetensors")
    assert set(tensors) == names | {"eagle_linear.weight", "norm.weight"}
    assert {weight.dtype for weight in tensors.values()} == {torch.bfloat16}
    params = json.loads((tmp_path / "params.json").read_text())
    assert params["n_layers"] == 2
    assert "moe" not in params
    embedded, states = torch.randn(2, 1, 9, head.config.hidden_size)
    rows = torch.tensor([[3, 8]])
    read = load_head(tmp_path, head.config)
    torch.testing.assert_close(read(embedded, states, rows)[0], head(embedded, states, rows)[0])


def test_target_goes_on_alike_alone_and_together(target: Target, encoder: Encoder) -> None:
    """Left padding, pictures, and rows that leave early change no answer; H is that of the text."""
    asked = [
        evaluate_eagle.problems(family, 1)[0]
        for family in evaluate_eagle.FAMILIES
        if family.name in ("image read", "tool call", "capitals")
    ]
    openings = [Opening(encoder.prompt(one, "high"), one.image, budget=40) for one in asked]
    together = target.go_on(openings)
    assert together == [target.go_on([opening])[0] for opening in openings]
    for opening, said in zip(openings, together, strict=True):
        whole = Dialogue(
            opening.ids + said, [False] * (len(opening.ids) + len(said)), opening.image
        )
        states = target.hear([whole])[0].hidden_TD[len(opening.ids) - 1 : -1].float()
        assert (states @ target.head_VD.T).argmax(-1).tolist() == said


def test_a_budget_closes_thinking_as_the_server_does(target: Target, encoder: Encoder) -> None:
    multiply = evaluate_eagle.problems(evaluate_eagle.FAMILIES[0], 1)[0]
    said = target.go_on([Opening(encoder.prompt(multiply, "high"), budget=16)])[0]
    assert said[0] == THINK
    assert said[17 - len(encoder.closing) : 18] == [*encoder.closing, END_THINK]


def test_drafts_are_wanted_where_the_target_speaks_on(target: Target, heard: list[Any]) -> None:
    batch = head_batch(target, heard)
    said = [one.said_T.tolist() for one in heard]
    for depth, draft in enumerate(
        itertools.islice(drafts(_random_head(1, target.config), batch), 3), 1
    ):
        for index, one in enumerate(heard):
            made, token = draft.made_BQ[index], draft.token_BQ[index]
            rows, whose = batch.rows_BQ[index][batch.is_row_BQ[index]].tolist(), said[index]
            assert rows == [p for p in range(len(whose) - 2) if whose[p + 1] and whose[p + 2]]
            for column, row in enumerate(rows):
                following = whose[row + 1 : row + depth + 2]
                assert bool(made[column]) == (len(following) == depth + 1 and all(following))
                if made[column]:
                    assert token[column] == one.ids_T[row + depth + 1]


def test_training_lowers_the_loss_and_goes_on_where_it_was(
    target: Target, heard: list[Any], tmp_path: Path
) -> None:
    trainer = HeadTrainer(target, num_steps=200, seed=0, num_layers=1, inner=64)
    source = batches(target, random.Random(0), heard, 400)
    held = next(source)
    before = head_loss(trainer.head, target, held)[0].item()
    for _ in range(25):
        trainer.train_step(next(source))
    after, counts = head_loss(trainer.head, target, held)
    assert after.item() < 0.7 * before
    assert counts[0][0] > 0
    assert counts[0] >= counts[1] >= counts[2]
    trainer.save(tmp_path / "state.pt")
    other = HeadTrainer(target, num_steps=200, seed=1, num_layers=1, inner=64)
    other.load(tmp_path / "state.pt")
    assert other.step == 25
    batch = next(source)
    assert other.train_step(batch) == trainer.train_step(batch)


@pytest.mark.slow
def test_a_stopped_run_leaves_a_head_and_goes_on(tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("eagle"))
    small = ["--shards", "2", "--conversations", "8", "--rows", "200", "--log-every", "2"]
    heads = []
    for steps in ("2", "4"):
        command = ["train_eagle.py", "--run", str(run), "--model", str(model), "--steps", steps]
        subprocess.run([sys.executable, *command, *small], cwd=HERE, check=True)
        made = json.loads((run / "eagle_training.json").read_text())
        assert (made["steps"], made["conversations"]) == (int(steps), 16)
        heads.append(load_file(model / "eagle" / "consolidated.safetensors"))
    (log,) = run.glob("eagle_*/log.jsonl")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4]
    assert not torch.equal(*(head["eagle_linear.weight"] for head in heads))


def test_walk_takes_what_was_right_and_one_more() -> None:
    assert evaluate_eagle.walk([1, 0, 2, 1, 0], 1) == (3, [(2, 3)])
    assert evaluate_eagle.walk([1, 0, 2, 1, 0], 3) == (2, [(2, 2), (1, 2), (0, 2)])
    assert evaluate_eagle.walk([], 3) == (0, [(0, 0)] * 3)


def test_card_tells_what_was_accepted_in_every_family() -> None:
    right, wrong = evaluate_eagle.cell([[3, 2, 1, 1]] * 2), evaluate_eagle.cell([[0, 0], [0]])
    assert right["tokens_per_step"] == [2.0, 2.0, 4.0, 4.0, 4.0]
    assert wrong["tokens_per_step"][0] == 1.0
    nothing = evaluate_eagle.cell([])
    cells = {"none": nothing, "low": wrong, "high": right}
    drafted = {
        "layers": 1,
        "inner": 64,
        "parameters": 500_000,
        "count": 2,
        "seed": 7,
        "families": {"sums": cells},
        "all": cells,
    }
    training = {
        "note": "",
        "steps": 9,
        "conversations": 5,
        "positions": 4000,
        "cpu_minutes": 0.1,
    }
    section = speculation(training, drafted)
    assert "| **sums** | - | 1.00 (0 0 -) | 4.00 (100 100 100) |" in section
    assert "0.50 million parameters" in section


def test_the_packed_head_drafts_for_the_packed_model(target: Target, heard: list[Any]) -> None:
    head = load_head(MODEL / "eagle", target.config)
    _, counts = head_loss(head, target, head_batch(target, heard))
    shares = [right / made for right, made in counts]
    assert shares[0] > 0.5
    assert shares[2] > 0.2
