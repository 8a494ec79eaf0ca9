"""Where the ranks of a cell go."""

import pytest

from ostro.cluster.node_placement import (
    DOMAIN_LABEL,
    ROLE_LABEL,
    Node,
    request_group,
    resolve_device,
)
from ostro.configs.deployment import Layout, LayoutConfig
from ostro.configs.errors import ConfigError

SPLIT = LayoutConfig(layout=Layout.SPLIT, num_attention_shards=1, num_expert_shards=2)


def node(name, labels=None, **resources):
    return Node(name, f"10.0.0.{name}", labels or {}, resources)


def test_request_group_asks_for_role_labels_where_nodes_have_them():
    nodes = [
        node("1", {ROLE_LABEL: "attention"}, CPU=4, GPU=1),
        node("2", {ROLE_LABEL: "expert"}, CPU=4, GPU=2),
    ]
    group = request_group(SPLIT, "cuda", nodes)
    assert group.bundles == [{"CPU": 1.0, "GPU": 1.0}] * 3
    assert [selector[ROLE_LABEL] for selector in group.label_selectors] == [
        "attention",
        "expert",
        "expert",
    ]
    assert group.topology is None


def test_request_group_keeps_a_cell_in_one_nvlink_domain():
    nodes = [node(str(i), {DOMAIN_LABEL: "rack-1"}, CPU=8, GPU=4) for i in range(2)]
    assert request_group(SPLIT, "cuda", nodes).topology == {DOMAIN_LABEL: "STRICT_PACK"}


def test_request_group_lets_a_cell_span_domains_that_are_too_small_for_it():
    nodes = [node(str(i), {DOMAIN_LABEL: f"rack-{i}"}, CPU=8, GPU=2) for i in range(2)]
    assert request_group(SPLIT, "cuda", nodes).topology is None


def test_request_group_asks_for_no_label_on_a_plain_laptop():
    group = request_group(SPLIT, "cpu", [node("1", CPU=8)])
    assert group.label_selectors == [{}, {}, {}]
    assert group.bundles == [{"CPU": 1.0}] * 3


def test_request_group_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"3 ranks with 1 GPU each, and the 1 nodes have 2"):
        request_group(SPLIT, "cuda", [node("1", CPU=8, GPU=2)])


def test_resolve_device_takes_cuda_where_there_is_a_gpu():
    assert resolve_device("auto", [node("1", CPU=8)]) == "cpu"
    assert resolve_device("auto", [node("1", CPU=8, GPU=1)]) == "cuda"
    assert resolve_device("cpu", [node("1", CPU=8, GPU=1)]) == "cpu"
