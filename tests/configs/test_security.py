"""Who may reach a deployment: what the config refuses."""

import pytest

from ostro.configs.errors import ConfigError
from ostro.configs.load import load_deployment
from ostro.configs.security import SecurityConfig


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_without_keys_faces_open_on_loopback(host):
    SecurityConfig().check_exposure(host, knows_clients=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "server.example"])
def test_without_keys_faces_do_not_open_beyond_it(host):
    with pytest.raises(ConfigError, match=r"ostro keys add.*security\.allow_open=true"):
        SecurityConfig().check_exposure(host, knows_clients=False)
    SecurityConfig().check_exposure(host, knows_clients=True)
    SecurityConfig(allow_open=True).check_exposure(host, knows_clients=False)
    SecurityConfig(key_file="keys.yaml").check_exposure(host, knows_clients=False)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "audit_file=audit.jsonl",
            r"security\.audit_file='audit\.jsonl': must be an absolute",
        ),
        ("audit_file_bytes=10", r"security\.audit_file_bytes=10: must be .* at least 4096"),
        ("num_audit_files=0", r"security\.num_audit_files=0"),
        ("key_flie=keys.yaml", r"security\.key_flie: unknown key \(did you mean key_file"),
    ],
)
def test_what_is_wrong_is_named(setting, told):
    with pytest.raises(ConfigError, match=told):
        load_deployment("laptop", [f"security.{setting}"])
