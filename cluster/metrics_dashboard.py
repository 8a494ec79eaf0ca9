"""The Grafana dashboard (11 and later), made of the panels.

It takes its data source and the model as variables, so that one file serves every deployment.
"""

from __future__ import annotations

from collections.abc import Iterator

from ostro.cluster.metrics_list import METRICS, MODEL_LABEL
from ostro.cluster.metrics_panels import ROWS, Panel

Json = dict[str, object]

_SCHEMA_VERSION = 39  # Grafana 11.0's
_WIDTH = 24
_SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> Json:
    """The dashboard, as Grafana imports and provisions it."""
    return {
        "uid": "ostro",
        "title": "Ostro",
        "tags": ["ostro", "llm"],
        "timezone": "browser",
        "editable": True,
        "schemaVersion": _SCHEMA_VERSION,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_source_variable(), _model_variable()]},
        "annotations": {"list": []},
        "panels": list(_panels()),
    }


def _panels() -> Iterator[Json]:
    next_id, y = 1, 0
    for title, panels in ROWS.items():
        yield _row(next_id, title, y)
        next_id, y, x, height = next_id + 1, y + 1, 0, 0
        for panel in panels:
            if x + panel.width > _WIDTH:
                x, y = 0, y + height
            height = 4 if panel.kind == "stat" else 8
            place = {"x": x, "y": y, "w": panel.width, "h": height}
            yield _panel(next_id, panel, place)
            next_id, x = next_id + 1, x + panel.width
        y += height


def _row(panel_id: int, title: str, y: int) -> Json:
    place = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
    return {
        "id": panel_id,
        "type": "row",
        "title": title,
        "collapsed": False,
        "gridPos": place,
        "panels": [],
    }


def _panel(panel_id: int, panel: Panel, place: dict[str, int]) -> Json:
    custom: Json = {}
    if panel.stacked:
        custom = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40}
    defaults: Json = {"unit": panel.unit, "custom": custom}
    if panel.unit == "percentunit":
        defaults["min"] = 0
    return {
        "id": panel_id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel.kind),
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": query.expression,
                "legendFormat": query.legend or "__auto",
                "editorMode": "code",
                "range": panel.kind == "timeseries",
                "instant": panel.kind != "timeseries",
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _options(kind: str) -> Json:
    if kind == "timeseries":
        legend: Json = {"displayMode": "list", "placement": "bottom", "showLegend": True}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}


def _source_variable() -> Json:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
    }


def _model_variable() -> Json:
    values = f"label_values({METRICS['cell_ready'].family}, {MODEL_LABEL})"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": values, "refId": "model"},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "hide": 0,
    }
