"""Whether Ray Serve is free for us, and where its faces can be reached."""

from types import SimpleNamespace

import pytest

from ostro.cluster import serve_ingress
from ostro.cluster.serve_ingress import clear_ingress, reachable_host
from ostro.configs.deployment import ServingConfig
from ostro.configs.errors import ConfigError


@pytest.fixture
def serve(monkeypatch):
    """A Ray Serve whose state a test sets and which counts how often it is ended."""
    fake = SimpleNamespace(applications={}, proxies={}, num_shutdowns=0)

    def shutdown():
        fake.num_shutdowns += 1

    monkeypatch.setattr(serve_ingress.serve, "status", lambda: fake)
    monkeypatch.setattr(serve_ingress.serve, "shutdown", shutdown)
    return fake


def test_clear_ingress_leaves_a_cluster_without_serve_alone(serve):
    clear_ingress()
    assert not serve.num_shutdowns


def test_clear_ingress_ends_what_a_killed_launch_left(serve):
    serve.applications, serve.proxies = {"ostro": "RUNNING"}, {"head": "HEALTHY"}
    clear_ingress()
    assert serve.num_shutdowns == 1


def test_clear_ingress_does_not_touch_the_applications_of_others(serve):
    serve.applications, serve.proxies = {"shop": "RUNNING"}, {"head": "HEALTHY"}
    with pytest.raises(ConfigError, match="runs shop"):
        clear_ingress()
    assert not serve.num_shutdowns


@pytest.mark.parametrize(
    ("host", "head_address", "reached_at"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("0.0.0.0", None, "127.0.0.1"),
        ("::", None, "127.0.0.1"),
        ("0.0.0.0", "10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.1", "10.0.0.1"),
        ("head.example", "10.0.0.1", "head.example"),
    ],
)
def test_reachable_host(host, head_address, reached_at):
    assert reachable_host(ServingConfig(host=host), head_address) == reached_at


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_reachable_host_refuses_another_machines_loopback(host):
    with pytest.raises(ConfigError, match=r"head node 10\.0\.0\.1.*serving\.host=0\.0\.0\.0"):
        reachable_host(ServingConfig(host=host), "10.0.0.1")
