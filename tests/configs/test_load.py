"""YAML to dataclasses: presets, overrides, and errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ostro.configs.deployment import DeploymentConfig, DispatchMode, Layout
from ostro.configs.errors import ConfigError
from ostro.configs.load import (
    from_dict,
    load_deployment,
    preset_names,
    read_model_defaults,
    to_dict,
)
from ostro.configs.reasoning import EFFORTS, default_efforts

_SMALLEST = """
model: embedded
layout: {layout: single, num_attention_shards: 1, num_expert_shards: 1}
"""


def test_presets_are_those_that_the_product_promises() -> None:
    assert preset_names() == [
        "1xb200",
        "1xh200",
        "2xh200",
        "4xh100",
        "8xh200_split",
        "laptop",
        "laptop_single",
        "multinode",
    ]


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads_and_survives_a_round_trip(name: str) -> None:
    config = load_deployment(name)
    plain = to_dict(config)
    assert from_dict(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert from_dict(json.loads(json.dumps(plain))) == config


@pytest.mark.parametrize(
    ("name", "layout", "world_size"),
    [
        ("laptop", Layout.SPLIT, 3),
        ("laptop_single", Layout.SINGLE, 1),
        ("2xh200", Layout.COLOCATED, 2),
        ("4xh100", Layout.SPLIT, 4),
        ("8xh200_split", Layout.SPLIT, 8),
        ("multinode", Layout.SPLIT, 16),
    ],
)
def test_preset_has_the_ranks_of_its_name(name: str, layout: Layout, world_size: int) -> None:
    config = load_deployment(name)
    assert config.layout.layout is layout
    assert config.layout.world_size() == world_size


def test_laptop_presets_need_no_gpu_and_no_checkpoint() -> None:
    for name in ("laptop", "laptop_single"):
        config = load_deployment(name)
        assert (config.model, config.layout.device) == ("embedded", "cpu")


def test_file_keeps_defaults_of_what_it_leaves_out(tmp_path: Path) -> None:
    config = _load(tmp_path, _SMALLEST)
    assert config == DeploymentConfig(model="embedded", layout=config.layout)


def test_override_changes_one_field() -> None:
    before = load_deployment("laptop")
    after = load_deployment("laptop", ["layout.num_expert_shards=3", "layout.dispatch=sparse"])
    assert after.layout.num_expert_shards == 3
    assert after.layout.dispatch is DispatchMode.SPARSE
    assert (after.engine, after.serving) == (before.engine, before.serving)


def test_override_reaches_sections_that_the_file_leaves_out() -> None:
    assert load_deployment("laptop", ["serving.http_port=8123"]).serving.http_port == 8123


def test_override_can_be_a_list() -> None:
    config = load_deployment("laptop", ["served_name=small", "aliases=[gpt-4o, mistral-small]"])
    assert config.aliases == ("gpt-4o", "mistral-small")
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_override_can_say_null() -> None:
    assert load_deployment("laptop", ["engine.num_pages=null"]).engine.num_pages is None


def test_whole_number_is_taken_as_seconds() -> None:
    config = load_deployment("laptop", ["layout.join_timeout_s=3"])
    assert config.layout.join_timeout_s == 3.0
    assert isinstance(config.layout.join_timeout_s, float)


def test_override_of_one_effort_keeps_the_others() -> None:
    config = load_deployment("laptop", ["reasoning.efforts.low.budget_tokens=100"])
    low = config.reasoning.efforts["low"]
    assert (low.budget_tokens, low.prompt_value, low.soft_zone_tokens) == (100, "high", 256)
    assert set(config.reasoning.efforts) == set(EFFORTS)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("layout.num_expert_shard=3", "layout.num_expert_shard: unknown key"),
        ("layout.num_expert_shard=3", "did you mean num_expert_shards"),
        ("engines.page_size=4", "engines: unknown key (did you mean engine?)"),
        ("reasoning.efforts.lo.budget_tokens=4", "reasoning.efforts.lo: unknown key"),
        ("engine.page_size=0", "engine.page_size=0: must be"),
        ("serving.recovery_timeout_s=-1", "recovery_timeout_s=-1.0: must be 0 or above"),
        ("engine.inter_token_target_ms=0", "inter_token_target_ms=0.0: must be above 0"),
        ("engine.inter_token_target_ms=.nan", "inter_token_target_ms=nan: must be above 0"),
        ("engine.page_size=many", "engine.page_size='many': must be a whole number"),
        ("engine.page_size=true", "engine.page_size=True: must be a whole number"),
        ("engine.page_size=1.5", "engine.page_size=1.5: must be a whole number"),
        ("engine.prefix_cache=1", "engine.prefix_cache=1: must be true or false"),
        ("layout.join_timeout_s=soon", "layout.join_timeout_s='soon': must be a number"),
        ("layout.layout=ring", "layout.layout='ring': must be one of ['single', 'colocated'"),
        ("layout=split", "layout='split': must be a mapping"),
        ("reasoning.efforts=none", "reasoning.efforts='none': must be a mapping"),
        ("model=7", "model=7: must be text"),
        ("serving.http_port=9000", "serving.http_port and grpc_port are both 9000"),
        ("engine.num_pages", "must read key.path=value"),
        ("=3", "must read key.path=value"),
        ("engine..page_size=3", "must read key.path=value"),
        ("model.size=3", "model is no mapping"),
        ("model=[", "the value is no YAML"),
        ("aliases=small", "aliases='small': must be a list"),
        ("aliases=[small, 4]", "aliases[1]=4: must be text"),
        ("aliases=[small, small]", "aliases=['small', 'small']: names must not be empty"),
        ("aliases=['']", "aliases=['']: names must not be empty"),
    ],
)
def test_wrong_override_names_the_field(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_deployment("laptop", [override])
    assert told in str(error.value)


def test_missing_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deployment\.yaml: layout\.num_expert_shards: missing"):
        _load(tmp_path, "model: m\nlayout: {layout: single, num_attention_shards: 1}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must hold a mapping"),
        ("- a", "must hold a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: 2027-13-01", "'2027-13-01' is no timestamp"),
        ("a: !!int abc", "'abc' is no int"),
        ("a: !!bool abc", "'abc' is no bool"),
        ("a: !!timestamp abc", "'abc' is no timestamp"),
        (_SMALLEST + "model: other", "key 'model' stands twice"),
        ("1: 2", "1: unknown key"),
        ("? [a]\n: 2", "cannot be read as YAML"),
    ],
)
def test_broken_file_is_told(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=r"deployment\.yaml") as error:
        _load(tmp_path, text)
    assert told in str(error.value)


def test_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    file = tmp_path / "deployment.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_deployment(file)


def test_unknown_preset_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"did you mean laptop.*presets are 1xb200"):
        load_deployment("labtop")


def _load(directory: Path, text: str) -> DeploymentConfig:
    file = directory / "deployment.yaml"
    file.write_text(text)
    return load_deployment(file)


_BUDGETS = "reasoning: {efforts: {low: {prompt_value: high, budget_tokens: 40}}}"


def _model(directory: Path, text: str) -> Path:
    (directory / "ostro.yaml").write_text(text)
    return directory


def test_checkpoint_sets_what_the_deployment_leaves_open(tmp_path: Path) -> None:
    defaults = read_model_defaults(_model(tmp_path, f"served_name: small\nnotice: N\n{_BUDGETS}"))
    config = load_deployment("laptop", (), defaults)
    assert (config.served_name, config.notice) == ("small", "N")
    assert config.reasoning.efforts["low"].budget_tokens == 40
    assert config.reasoning.efforts["medium"] == default_efforts()["medium"]


def test_deployment_has_the_last_word_over_the_checkpoint(tmp_path: Path) -> None:
    defaults = read_model_defaults(_model(tmp_path, f"served_name: small\n{_BUDGETS}"))
    overrides = ["served_name=mine", "reasoning.efforts.low.budget_tokens=7"]
    config = load_deployment("laptop", overrides, defaults)
    assert config.served_name == "mine"
    assert config.reasoning.efforts["low"].budget_tokens == 7
    assert config.reasoning.efforts["low"].prompt_value == "high"


def test_checkpoint_without_a_file_sets_nothing(tmp_path: Path) -> None:
    assert read_model_defaults(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layout: {}", "ostro.yaml: layout: a checkpoint may set served_name, notice, reasoning"),
        ("notice: 3", "ostro.yaml: notice=3: must be text"),
        ("reasoning: {effort: {}}", "ostro.yaml: reasoning.effort: unknown key"),
        ("[1]", "must hold a mapping"),
    ],
)
def test_checkpoint_that_says_too_much_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_model_defaults(_model(tmp_path, text))
