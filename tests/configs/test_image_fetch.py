"""`serving.image_fetch`: nothing by default, hosts by name, errors that tell the way out."""

from __future__ import annotations

import pytest

from ostro.configs.errors import ConfigError
from ostro.configs.image_fetch import ImageFetchConfig
from ostro.configs.load import from_dict, load_deployment, to_dict


def test_nothing_is_fetched_by_default() -> None:
    assert load_deployment("laptop").serving.image_fetch is None


def test_hosts_are_enough_and_the_rest_has_defaults() -> None:
    deployment = load_deployment("laptop", ["serving.image_fetch.allowed_hosts=['*']"])
    config = deployment.serving.image_fetch
    assert config == ImageFetchConfig(allowed_hosts=("*",))
    assert config.allowed_ports == (443,)
    assert from_dict(to_dict(deployment)) == deployment


@pytest.mark.parametrize(
    ("allowed", "host", "takes"),
    [
        ("example.com", "example.com", True),
        ("example.com", "a.example.com", False),
        ("example.com", "badexample.com", False),
        ("*.example.com", "a.example.com", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("*.example.com", "a.example.com.evil.org", False),
        ("*", "anything.at.all", True),
    ],
)
def test_a_host_is_allowed_by_its_name(allowed: str, host: str, takes: bool) -> None:
    assert ImageFetchConfig(allowed_hosts=(allowed,)).allows_host(host) is takes


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"allowed_hosts": []}, r"image_fetch.allowed_hosts=\[\]: must name a host"),
        ({}, "image_fetch.allowed_hosts: missing"),
        ({"allowed_hosts": ["https://a.com"]}, "no scheme, no port"),
        ({"allowed_hosts": ["A.com"]}, "lower case"),
        ({"allowed_hosts": ["a.com:443"]}, "no port"),
        ({"allowed_hosts": ["a.*.com"]}, "must be as"),
        ({"allowed_hosts": ["a.com."]}, "must be as"),
        ({"allowed_hosts": [""]}, "must be as"),
        ({"allowed_hosts": ["*"], "allowed_ports": []}, "must be ports in 1..65535"),
        ({"allowed_hosts": ["*"], "allowed_ports": [0]}, "must be ports in 1..65535"),
        ({"allowed_hosts": ["*"], "timeout_s": 0}, "timeout_s=0.0: must be positive"),
        ({"allowed_hosts": ["*"], "timeout_s": float("inf")}, "must be positive and finite"),
        ({"allowed_hosts": ["*"], "max_redirects": -1}, "max_redirects=-1: .* at least 0"),
        ({"allowed_hosts": ["*"], "max_concurrent": 0}, "max_concurrent=0: .* at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object], why: str) -> None:
    values = to_dict(load_deployment("laptop"))
    values["serving"]["image_fetch"] = fields
    with pytest.raises(ConfigError, match=why):
        from_dict(values)
