"""When the certificates of the faces expire, as a Prometheus family."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ostro.cluster.metrics_list import METRICS
from ostro.cluster.tls_files import expiries
from ostro.configs.tls import TlsConfig


class TlsCollector(Collector):
    """Reads the files at every scrape: they are renewed while a server runs.

    A scrape must find the files, and does: with TLS every ingress replica is on the head node.
    """

    def __init__(self, tls: TlsConfig, model_name: str) -> None:
        self._tls = tls
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        spec = METRICS["tls_expiry_timestamp_seconds"]
        family = GaugeMetricFamily(spec.family, spec.text, labels=spec.label_names)
        for expiry in expiries(self._tls):
            family.add_metric([self._model_name, expiry.field], expiry.at.timestamp())
        yield family
