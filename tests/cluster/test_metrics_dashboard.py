"""The dashboard: Grafana's own model of it knows every field, and every query finds its metric."""

from __future__ import annotations

import json
import re

import promql_parser
import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from typer.testing import CliRunner

from ostro.cluster.cli_metrics import app
from ostro.cluster.metrics_dashboard import dashboard
from ostro.cluster.metrics_list import METRICS, MODEL_LABEL, Kind
from ostro.cluster.metrics_queries import rate

RUNNER = CliRunner()
PANELS = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
ROWS = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]


def series_names() -> dict[str, set[str]]:
    """Every series' name, and the labels it may have."""
    names = {}
    for spec in METRICS.values():
        labels = set(spec.label_names)
        if spec.kind is Kind.HISTOGRAM:
            for part in ("_sum", "_count"):
                names[spec.family + part] = labels
            labels = {*labels, "le"}
            names[spec.family + "_bucket"] = labels
        else:
            names[spec.family] = labels
    return names


def parsed(target) -> promql_parser.Expr:
    return promql_parser.parse(target["expr"].replace("$__rate_interval", "5m"))


def test_grafana_knows_every_field_of_it():
    plugins.register_default_plugins()
    made = json.loads(json.dumps(dashboard()))
    read = Dashboard.from_json(made)
    again = json.loads(JSONEncoder().encode(read))

    def lost(before, after, path: str = "") -> list[str]:
        if isinstance(before, dict):
            return [
                place
                for key, value in before.items()
                for place in (
                    lost(value, after[key], f"{path}.{key}")
                    if isinstance(after, dict) and key in after
                    else [f"{path}.{key}"]
                )
            ]
        if isinstance(before, list):
            pairs = zip(before, after, strict=True)
            return [place for i, (a, b) in enumerate(pairs) for place in lost(a, b, f"{path}[{i}]")]
        return [] if before == after else [path]

    assert lost(made, again) == []


def test_it_has_the_rows_that_operators_look_for():
    assert ROWS == [
        "Overview",
        "Latency",
        "Throughput",
        "KV and prefix cache",
        "Drafts",
        "Reasoning",
        "Experts",
        "Step stages",
        "Actors",
        "Admission and tenants",
        "Images by URL",
        "Certificates",
    ]


def test_ids_are_unique_and_every_panel_has_a_unit_and_the_chosen_source():
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]}
    assert variables == {"datasource", "model"}


def test_panels_do_not_overlap():
    taken = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target["expr"][:60])
def test_a_query_is_promql_over_metrics_and_labels_that_are_served(target):
    parsed(target)
    served = series_names()
    selectors = re.findall(r"(ostro_\w+)\{(\w+)=", target["expr"])
    assert selectors
    known = set().union(*(served[name] for name, _ in selectors))
    for name, label in selectors:
        assert (name in served, label) == (True, MODEL_LABEL)
    assert set(re.findall(r"ostro_\w+", target["expr"])) == {name for name, _ in selectors}
    for grouping in re.findall(r"by \(([^)]*)\)", target["expr"]):
        assert set(grouping.split(", ")) <= known
    for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
        assert re.search(rf"by \([^)]*\b{label}\b[^)]*\)", target["expr"])


def test_a_query_over_what_is_not_there_is_refused():
    with pytest.raises(KeyError):
        rate("no_such_metric")
    with pytest.raises(ValueError, match="has no label tenant"):
        rate("steps", "tenant")


def test_the_command_prints_it_and_the_list():
    printed = RUNNER.invoke(app, ["dashboard"])
    assert json.loads(printed.output) == json.loads(json.dumps(dashboard()))
    listed = RUNNER.invoke(app, ["list"])
    lines = listed.output.splitlines()
    assert len(lines) == 2 + len(METRICS)
    assert "| `ostro_expert_tokens_total` | counter | layer, expert | rows |" in listed.output
