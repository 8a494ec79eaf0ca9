"""What is said of a certificate before anything is served with it."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from certificates import Authority, tls_config
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from ostro.cluster.tls_certificate import FaceCertificate, read_certificate, trust_only
from ostro.cluster.tls_files import expiries
from ostro.configs.errors import ConfigError
from ostro.configs.tls import TlsConfig


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def pair(authority):
    return authority.issue("server", "llm.example.com", "*.inner.example.com", "127.0.0.1")


def test_a_good_certificate_says_whom_it_is_for(authority, pair):
    certificate = read_certificate(tls_config(pair, authority.ca))
    assert certificate.names == ("llm.example.com", "*.inner.example.com", "127.0.0.1")
    assert timedelta(days=29) < certificate.not_after - datetime.now(UTC) < timedelta(days=31)
    assert certificate.notes("127.0.0.1") == []


@pytest.mark.parametrize(
    ("host", "covered"),
    [
        ("llm.example.com", True),
        ("LLM.example.com.", True),
        ("a.inner.example.com", True),
        ("a.b.inner.example.com", False),
        ("example.com", False),
        ("127.0.0.1", True),
        ("127.0.0.2", False),
        ("::1", False),
    ],
)
def test_covers(pair, host, covered):
    assert read_certificate(tls_config(pair)).covers(host) is covered


def test_no_certificate_is_for_all_of_a_top_level():
    certificate = FaceCertificate(leaf_pem="", names=("*.com",), not_after=datetime.now(UTC))
    assert not certificate.covers("example.com")


def test_an_address_is_covered_however_it_is_written(authority):
    certificate = read_certificate(tls_config(authority.issue("six", "2001:db8::1")))
    assert certificate.covers("2001:0db8:0:0::1")


def test_a_host_that_it_misses_is_called_by_one_of_its_names(pair):
    certificate = read_certificate(tls_config(pair))
    assert certificate.name_for("10.0.0.7") == "llm.example.com"
    assert certificate.name_for("127.0.0.1") == "127.0.0.1"
    (note,) = certificate.notes("10.0.0.7")
    assert "llm.example.com" in note
    assert "10.0.0.7" in note


def test_a_near_end_is_told(authority):
    certificate = read_certificate(tls_config(authority.issue("short", "box", days=3)))
    (note,) = certificate.notes("box")
    assert "expires in 2 days, on 20" in note
    assert "short.pem" in note
    assert certificate.notes("box", datetime.now(UTC) - timedelta(days=20)) == []


def test_a_near_end_of_what_clients_need_is_told(authority, pair, tmp_path):
    crl = authority.revoke(days=0.5)
    tls = tls_config(pair, authority.ca, client_crl_file=str(crl))
    (note,) = read_certificate(tls).notes("127.0.0.1")
    assert "must be renewed, or no client gets in, in less than a day" in note
    assert str(crl) in note
    later = next(e.at for e in expiries(tls) if e.field == "client_ca_file") - timedelta(days=1.5)
    notes = read_certificate(tls_config(pair, authority.ca)).notes("127.0.0.1", later)
    assert any("signs those of clients expires in 1 day," in note for note in notes)


def test_a_certificate_without_names_is_called_by_the_host():
    nameless = FaceCertificate(leaf_pem="", names=(), not_after=datetime.now(UTC))
    assert nameless.name_for("box") == "box"


def refuse(tls: TlsConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_certificate(tls)


@pytest.mark.parametrize("field", ["cert_file", "key_file", "client_ca_file"])
def test_a_missing_file_is_named(authority, pair, field):
    tls = replace(tls_config(pair, authority.ca), **{field: "/no/such.pem"})
    refuse(tls, rf"serving\.tls\.{field}=/no/such\.pem: cannot be read: No such file")


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("cert_file", "holds no certificate"),
        ("key_file", "holds no private key"),
        ("client_ca_file", "holds no certificate"),
    ],
)
def test_a_file_of_something_else_is_named(authority, pair, tmp_path, field, told):
    (tmp_path / "note.txt").write_text("hello")
    tls = replace(tls_config(pair, authority.ca), **{field: str(tmp_path / "note.txt")})
    refuse(tls, rf"{field}=.*note\.txt: {told}")


def test_anothers_key_is_refused(authority, pair):
    other = authority.issue("other", "other.example.com")
    refuse(replace(tls_config(pair), key_file=str(other.key)), r"is not the key of .*server\.pem")


def test_an_encrypted_key_is_refused(pair):
    key = load_pem_private_key(pair.key.read_bytes(), None)
    locked = BestAvailableEncryption(b"secret")
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    refuse(tls_config(pair), "key_file=.*is encrypted")


def test_an_expired_certificate_is_refused(authority):
    refuse(tls_config(authority.issue("old", "box", days=-1)), "cert_file=.*expired on")


def test_an_expired_certificate_is_named_with_its_date(authority):
    old = authority.issue("old", "box", days=-1)
    day = f"{datetime.now(UTC) - timedelta(days=1):%Y-%m-%d}"
    refuse(tls_config(old), rf"serving\.tls\.cert_file=.*old\.pem: expired on {day}")


def test_an_expired_certificate_in_the_chain_is_refused(authority, pair, tmp_path):
    old = authority.issue("intermediate", "box", days=-1)
    pair.cert.write_bytes(pair.cert.read_bytes() + old.cert.read_bytes())
    refuse(tls_config(pair), r"cert_file=.*server\.pem: the certificate of .* in it expired on 20")


def test_authorities_of_clients_that_have_all_expired_are_refused(authority, pair, tmp_path):
    old = authority.issue("old", common_name="old authority", days=-1)
    refuse(tls_config(pair, old.cert), r"client_ca_file=.*old\.pem: expired on 20.*; renew it")
    both = tmp_path / "both.pem"
    both.write_bytes(authority.ca.read_bytes() + old.cert.read_bytes())
    assert read_certificate(tls_config(pair, both)).names


def test_a_list_of_revoked_certificates_must_be_one_and_in_time(authority, pair, tmp_path):
    def with_crl(file):
        return tls_config(pair, authority.ca, client_crl_file=str(file))

    assert read_certificate(with_crl(authority.revoke())).names
    refuse(with_crl("/no/such.crl"), r"client_crl_file=/no/such\.crl: cannot be read")
    refuse(with_crl(authority.ca), "client_crl_file=.*holds no list of revoked certificates in PEM")
    refuse(with_crl(authority.revoke(days=-1)), "was to be renewed by 20.*none of its clients")
    strangers = Authority(tmp_path / "other").revoke()
    refuse(with_crl(strangers), r"client_crl_file=.*holds no list of .*, which is in .*ca\.pem")


def test_a_file_that_cannot_be_read_has_no_end(authority, pair):
    tls = tls_config(pair, authority.ca)
    assert [expiry.field for expiry in expiries(tls)] == ["cert_file", "client_ca_file"]
    pair.cert.write_text("half of a renewal")
    assert [expiry.field for expiry in expiries(tls)] == ["client_ca_file"]


def test_a_certificate_of_the_future_is_refused(pair):
    then = datetime.now(UTC) - timedelta(days=90)
    with pytest.raises(ConfigError, match="is not valid before"):
        read_certificate(tls_config(pair), now=then)


def test_one_file_may_hold_certificate_and_key(pair):
    pair.cert.write_bytes(pair.cert.read_bytes() + pair.key.read_bytes())
    both = str(pair.cert)
    assert read_certificate(TlsConfig(cert_file=both, key_file=both)).covers("127.0.0.1")


def test_keys_that_openssl_makes_are_understood(tmp_path):
    cert, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-subj", "/CN=box", "-addext", "subjectAltName=DNS:box"]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    assert read_certificate(TlsConfig(cert_file=str(cert), key_file=str(key))).names == ("box",)


def shake_hands(client: ssl.SSLContext, pair, host: str) -> None:
    """A client's handshake, in memory, with a server that shows this pair."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(back, there, server_hostname=host),
        context.wrap_bio(there, back, server_side=True),
    ]
    while sides:
        side = sides.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            sides.append(side)


def test_who_trusts_one_certificate_takes_it_by_any_name_and_no_other(authority, pair):
    context = trust_only(read_certificate(tls_config(pair)))
    shake_hands(context, pair, "another.name")
    another = authority.issue("another", "llm.example.com")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context, another, "llm.example.com")
