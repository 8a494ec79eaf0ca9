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
COLOCATED = LayoutConfig(layout=Layout.COLOCATED, num_attention_shards=2, num_expert_shards=2)


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


def roles_asked_for(group):
    return [selector.get(ROLE_LABEL) for selector in group.label_selectors]


def test_request_group_keeps_labelled_nodes_for_their_own_role():
    nodes = [
        node("1", {ROLE_LABEL: "head"}, CPU=8),
        node("2", {ROLE_LABEL: "expert"}, CPU=8),
        node("3", CPU=8),
    ]
    asked = roles_asked_for(request_group(SPLIT, "cpu", nodes))
    assert asked == ["!in(expert,head)", "expert", "expert"]


def test_request_group_lets_a_rank_of_both_roles_go_to_nodes_of_either():
    nodes = [node("1", {ROLE_LABEL: "attention"}, CPU=1), node("2", {ROLE_LABEL: "expert"}, CPU=1)]
    asked = roles_asked_for(request_group(COLOCATED, "cpu", nodes))
    assert asked == ["in(attention,expert)"] * 2


def test_request_group_keeps_cpu_ranks_in_one_domain_too():
    nodes = [node(str(i), {DOMAIN_LABEL: "rack-1"}, CPU=2) for i in range(2)]
    assert request_group(SPLIT, "cpu", nodes).topology == {DOMAIN_LABEL: "STRICT_PACK"}


def test_request_group_lets_a_cell_span_domains_that_lack_a_role():
    nodes = [
        node("1", {ROLE_LABEL: "attention", DOMAIN_LABEL: "a"}, CPU=8, GPU=8),
        node("2", {ROLE_LABEL: "expert", DOMAIN_LABEL: "b"}, CPU=8, GPU=8),
    ]
    assert request_group(SPLIT, "cuda", nodes).topology is None


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [node("1", CPU=8, GPU=2)],
            r"not enough nodes: .* 3 x \(1 CPU and 1 GPU\), .* 2 on 1 with 8 CPU and 2 GPU",
        ),
        (
            [node("1", CPU=1, GPU=8), node("2", CPU=8)],
            "room for 1 on 2 with 9 CPU and 8 GPU",
        ),
        (
            [
                node("1", {ROLE_LABEL: "attention"}, CPU=8, GPU=8),
                node("2", {ROLE_LABEL: "expert"}, CPU=8, GPU=1),
            ],
            r"labelled ostro\.role=expert: .* 2 x .* room for 1 on 1",
        ),
        (
            [node("1", {ROLE_LABEL: "expert"}, CPU=8, GPU=8)],
            r"without a label ostro\.role: .* 1 x .* room for 0 on 0",
        ),
    ],
    ids=["gpus", "cpus-beside-gpus", "one-role", "no-node-of-a-role"],
)
def test_request_group_says_what_is_missing(nodes, message):
    with pytest.raises(ConfigError, match=message):
        request_group(SPLIT, "cuda", nodes)


def test_resolve_device_takes_cuda_where_there_is_a_gpu():
    assert resolve_device("auto", [node("1", CPU=8)]) == "cpu"
    assert resolve_device("auto", [node("1", CPU=8, GPU=1)]) == "cuda"
    assert resolve_device("cpu", [node("1", CPU=8, GPU=1)]) == "cpu"
