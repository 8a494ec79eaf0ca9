"""How a user is told to call the faces."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from ostro.cluster.announced_faces import AnnouncedFaces
from ostro.cluster.tls_certificate import FaceCertificate
from ostro.cluster.tls_files import Expiry
from ostro.configs.deployment import ServingConfig
from ostro.configs.tls import TlsConfig

TLS = TlsConfig(cert_file="/etc/my tls.crt", key_file="/etc/tls.key")
SERVING = ServingConfig(host="0.0.0.0", tls=TLS)


def certificate(*names: str, days: float = 90) -> FaceCertificate:
    end = datetime.now(UTC) + timedelta(days=days)
    expiry = Expiry(field="cert_file", file=TLS.cert_file, at=end)
    return FaceCertificate(leaf_pem="", names=names, not_after=end, expiries=(expiry,))


def test_clear_text_needs_no_options():
    faces = AnnouncedFaces(ServingConfig(), None)
    assert faces.http_url() == "http://127.0.0.1:8000/v1"
    assert faces.curl_line("small").startswith("curl http://127.0.0.1:8000/v1/chat/completions -H")
    assert faces.chat_line() == "ostro chat"
    assert faces.tls_lines() == []


def test_ipv6_stands_in_brackets():
    faces = AnnouncedFaces(ServingConfig(host="::1"), None)
    assert faces.http_url() == "http://[::1]:8000/v1"
    assert faces.chat_line() == "ostro chat --url [::1]:9000"


def test_tls_is_called_by_a_name_of_the_certificate_and_names_whom_to_trust():
    faces = AnnouncedFaces(SERVING, certificate("llm.example.com"))
    assert faces.http_url() == "https://llm.example.com:8000/v1"
    url = f"{faces.http_url()}/chat/completions"
    assert faces.curl_line("m").startswith(f"curl --cacert '/etc/my tls.crt' {url} -H")
    chat = "ostro chat --url https://llm.example.com:9000 --ca '/etc/my tls.crt'"
    assert faces.chat_line() == chat


def test_clients_with_certificates_are_told_where_they_go():
    serving = replace(SERVING, tls=replace(TLS, client_ca_file="/etc/clients.pem"))
    faces = AnnouncedFaces(serving, certificate("127.0.0.1"))
    assert "--cacert '/etc/my tls.crt' --cert CLIENT.pem --key CLIENT.key" in faces.curl_line("m")
    assert faces.chat_line().endswith("--cert CLIENT.pem --key CLIENT.key")
    assert "/etc/clients.pem" in faces.tls_lines()[0]


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        (certificate("llm.example.com"), "clients that call 127.0.0.1 refuse it"),
        (certificate("127.0.0.1", days=2), "the certificate expires in 1 day, on 20"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_told(shown, told):
    _, problem = AnnouncedFaces(SERVING, shown).tls_lines()
    assert told in problem
