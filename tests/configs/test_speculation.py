"""The config of speculation: what it takes, and how it refuses the rest."""

from __future__ import annotations

from typing import Any

import pytest

from ostro.configs.errors import ConfigError
from ostro.configs.load import from_dict, load_deployment, to_dict
from ostro.configs.speculation import DraftMethod, SpeculationConfig


def test_a_gpu_drafts_nothing_unless_asked_to() -> None:
    assert load_deployment("1xh200").engine.speculation is None


@pytest.mark.parametrize("preset", ["laptop", "laptop_single"])
def test_a_laptop_drafts_with_what_head_there_is(preset: str) -> None:
    speculation = load_deployment(preset).engine.speculation
    assert speculation == SpeculationConfig(method=DraftMethod.AUTO)
    assert load_deployment(preset, ["engine.speculation=null"]).engine.speculation is None


@pytest.mark.parametrize("preset", ["laptop", "1xh200"])
def test_speculation_reads_from_overrides_with_its_defaults(preset: str) -> None:
    config = load_deployment(preset, ["engine.speculation.method=ngram"])
    assert config.engine.speculation == SpeculationConfig(
        method=DraftMethod.NGRAM,
        num_draft_tokens=3,
        draft_model=None,
        adaptive=True,
        max_ngram=4,
        min_ngram=2,
    )
    assert from_dict(to_dict(config)) == config


def test_eagle_names_its_head() -> None:
    overrides = ["engine.speculation={method: eagle, draft_model: /models/head}"]
    speculation = load_deployment("laptop", overrides).engine.speculation
    assert speculation is not None
    assert (speculation.method, speculation.draft_model) == (DraftMethod.EAGLE, "/models/head")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"engine.speculation.method: missing"),
        ({"method": "medusa"}, r"engine.speculation.method='medusa': must be one of"),
        ({"method": "ngram", "num_draft_tokens": 0}, r"num_draft_tokens=0: .* at least 1"),
        ({"method": "ngram", "num_draft_tokens": 8}, r"num_draft_tokens=8: must be at most 7"),
        ({"method": "ngram", "num_draft_tokens": True}, r"num_draft_tokens=True"),
        ({"method": "ngram", "min_ngram": 0}, r"min_ngram=0: .* at least 1"),
        ({"method": "ngram", "min_ngram": 5}, r"min_ngram=5 exceeds max_ngram=4: lower it"),
        ({"method": "ngram", "draft_model": "/head"}, r"draft_model='/head': method=ngram has no"),
        ({"method": "auto", "draft_model": "/head"}, r"draft_model='/head': method=auto takes"),
        ({"method": "auto", "max_ngram": 5}, r"max_ngram=5: method=auto looks for no n-grams"),
        ({"method": "eagle"}, r"draft_model: method=eagle needs the directory"),
        ({"method": "eagle", "draft_model": ""}, r"draft_model: method=eagle needs the directory"),
        ({"method": "eagle", "draft_model": "/head", "max_ngram": 5}, r"looks for no n-grams"),
        ({"method": "ngram", "adaptive": "no"}, r"engine.speculation.adaptive='no'"),
        ({"method": "ngram", "num_drafts": 2}, r"engine.speculation.num_drafts: unknown key"),
    ],
)
def test_wrong_speculation_is_refused(values: dict[str, Any], message: str) -> None:
    plain = to_dict(load_deployment("laptop"))
    plain["engine"]["speculation"] = values
    with pytest.raises(ConfigError, match=message):
        from_dict(plain)
