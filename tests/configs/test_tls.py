"""The TLS section of a deployment."""

import pytest

from ostro.configs.errors import ConfigError
from ostro.configs.load import from_dict, load_deployment, to_dict
from ostro.configs.tls import TlsConfig, TlsVersion

FILES = ["serving.tls.cert_file=/c.pem", "serving.tls.key_file=/k.pem"]


def test_faces_speak_clear_text_unless_told_otherwise():
    assert load_deployment("laptop").serving.tls is None


def test_overrides_turn_it_on_and_it_survives_a_round_trip():
    deployment = load_deployment("laptop", FILES)
    assert deployment.serving.tls == TlsConfig(cert_file="/c.pem", key_file="/k.pem")
    assert from_dict(to_dict(deployment)) == deployment


@pytest.mark.parametrize("text", ["1.3", "'1.3'"])
def test_a_version_needs_no_quotes(text):
    tls = load_deployment("laptop", [*FILES, f"serving.tls.min_version={text}"]).serving.tls
    assert tls.min_version is TlsVersion.TLS_1_3


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (FILES[:1], r"serving\.tls\.key_file: missing"),
        ([*FILES, "serving.tls.min_version=1.1"], r"min_version=1\.1: must be one of"),
        ([*FILES, "serving.tls.cert_file="], r"serving\.tls\.cert_file=None: must be text"),
        ([*FILES, "serving.tls.cert_file=' '"], r"serving\.tls\.cert_file: must name a file"),
        ([*FILES, "serving.tls.client_crl_file=x"], r"client_crl_file=x: .*set client_ca_file too"),
        ([*FILES, "serving.tls.certfile=x"], r"did you mean cert_file"),
    ],
)
def test_wrong_section_is_told_by_its_field(overrides, told):
    with pytest.raises(ConfigError, match=told):
        load_deployment("laptop", overrides)


def test_relative_files_are_named_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    relative = TlsConfig(cert_file="c.pem", key_file="~/k.pem", client_ca_file="/ca.pem")
    assert relative.absolute() == TlsConfig(
        cert_file=f"{tmp_path}/c.pem", key_file="/home/someone/k.pem", client_ca_file="/ca.pem"
    )
