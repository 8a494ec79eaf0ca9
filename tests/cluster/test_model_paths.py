"""Which draft head a deployment takes for its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ostro.cluster.cli_deployment import read_deployment
from ostro.cluster.model_paths import resolve_model, settle_drafts
from ostro.configs.deployment import EngineConfig
from ostro.configs.speculation import DraftMethod, SpeculationConfig

_AUTO = SpeculationConfig(method=DraftMethod.AUTO, num_draft_tokens=5, adaptive=False)


def settled(speculation: SpeculationConfig | None, model_dir: Path) -> SpeculationConfig | None:
    return settle_drafts(EngineConfig(speculation=speculation), model_dir).speculation


def test_auto_takes_the_head_that_the_model_brings(tmp_path: Path) -> None:
    (tmp_path / "eagle").mkdir()
    head = replace(_AUTO, method=DraftMethod.EAGLE, draft_model=str(tmp_path / "eagle"))
    assert settled(_AUTO, tmp_path) == head
    assert settled(head, tmp_path) == head


def test_auto_drafts_nothing_where_the_model_brings_no_head(tmp_path: Path) -> None:
    assert settled(_AUTO, tmp_path) is None


def test_what_needs_no_head_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "eagle").mkdir()
    ngram = SpeculationConfig(method=DraftMethod.NGRAM)
    assert settled(ngram, tmp_path) == ngram
    assert settled(None, tmp_path) is None


def test_a_named_head_goes_before_the_one_that_the_model_brings(tmp_path: Path) -> None:
    (tmp_path / "eagle").mkdir()
    named = SpeculationConfig(method=DraftMethod.EAGLE, draft_model="/heads/mine")
    assert settled(named, tmp_path) == named


@pytest.mark.parametrize("preset", ["laptop", "laptop_single"])
def test_laptops_draft_with_the_embedded_head_and_for_the_embedded_model_alone(
    preset: str, tmp_path: Path
) -> None:
    speculation = read_deployment(preset, (), model=None).engine.speculation
    assert speculation == SpeculationConfig(
        method=DraftMethod.EAGLE, draft_model=str(resolve_model("embedded") / "eagle")
    )
    assert read_deployment(preset, (), model=str(tmp_path)).engine.speculation is None
