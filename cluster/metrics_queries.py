"""PromQL over the metrics of the list; a name or label that is not there is refused."""

from __future__ import annotations

from ostro.cluster.metrics_list import METRICS, MODEL_LABEL, Kind, MetricSpec

_SELECTED = f'{MODEL_LABEL}=~"$model"'
_WINDOW = "[$__rate_interval]"


def rate(name: str, by: str = "") -> str:
    """Counts per second, added up by labels; of a histogram, what it observed per second."""
    spec = _checked(name, by)
    part = "_count" if spec.kind is Kind.HISTOGRAM else ""
    return _sum(f"rate({spec.family}{part}{{{_SELECTED}}}{_WINDOW})", by)


def _total_rate(name: str, by: str = "") -> str:
    """What a histogram's observations come to per second."""
    spec = _checked(name, by)
    return _sum(f"rate({spec.family}_sum{{{_SELECTED}}}{_WINDOW})", by)


def quantile(name: str, share: float, by: str = "") -> str:
    """The value that this share of a histogram's observations stays below."""
    spec = _checked(name, by)
    buckets = f"rate({spec.family}_bucket{{{_SELECTED}}}{_WINDOW})"
    return f"histogram_quantile({share:g}, {_sum(buckets, ' '.join(('le', *by.split())))})"


def mean(name: str, by: str = "") -> str:
    """The mean of a histogram's observations."""
    return ratio(_total_rate(name, by), rate(name, by))


def gauge(name: str, by: str = "", how: str = "sum") -> str:
    """A gauge, or a counter as it stands, brought together by labels."""
    spec = _checked(name, by)
    return _sum(f"{spec.family}{{{_SELECTED}}}", by, how)


def ratio(part: str, whole: str) -> str:
    """One over the other; nothing where there is nothing to share."""
    return f"{part} / ({whole} > 0)"


def _checked(name: str, by: str) -> MetricSpec:
    spec = METRICS[name]
    unknown = set(by.split()) - set(spec.label_names)
    if unknown:
        raise ValueError(f"{spec.family} has no label {', '.join(sorted(unknown))}")
    return spec


def _sum(inner: str, by: str, how: str = "sum") -> str:
    grouping = f" by ({', '.join(by.split())})" if by else ""
    return f"{how}{grouping} ({inner})"
