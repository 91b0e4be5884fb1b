"""The keys of a deployment: who may speak to whom, and what the owner of the model has signed.

A federation's folder has one folder per party. What is secret stays in the folder of the party it
belongs to:

ca.key                      signs the server's certificate; keep it offline
server/ca.crt               the certificate authority's certificate
server/server.crt, .key     the server's TLS certificate and key (ECDSA P-384)
server/signing.key          signs the auxiliary model (Ed25519)
server/register.toml        the clients: public key and number of examples of each
server/clients/NAME.pub     public keys, in OpenSSH form
server/run.toml             the run
NAME/client.key             the client's key (ECDSA P-384): it signs every request to the server
NAME/ca.crt, server.pub     what it checks the server's certificate and package against
NAME/party.toml             the client's configuration
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsp.config_file import read_register
from fedsp.errors import CredentialError
from fedsp.storage import write_bytes

DAYS = 825
CA, CERTIFICATE, KEY = "ca.crt", "server.crt", "server.key"
SIGNING = "signing.key"
CLIENT_KEY, SERVER_PUBLIC = "client.key", "server.pub"
OURS = "take the one that `fedsp federation init` made for this client"


def make_server_credentials(folder: Path, host: str) -> None:
    """A certificate authority, the server's certificate for `host` and this machine, and the key
    that signs packages.

    Raises:
        StorageError: the disk did not take it.
    """
    authority = ec.generate_private_key(ec.SECP384R1())
    key = ec.generate_private_key(ec.SECP384R1())
    issuer = "fedsp certificate authority"
    root = _certificate(issuer, issuer, authority, ca=True).sign(authority, hashes.SHA384())
    names = [_alternative(name) for name in dict.fromkeys([host, "localhost", "127.0.0.1"])]
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    certificate = (
        _certificate(host[:64], issuer, key, ca=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(signer, critical=False)
        .sign(authority, hashes.SHA384())
    )
    _write_private(folder.parent / "ca.key", authority)
    write_bytes(folder / CA, root.public_bytes(serialization.Encoding.PEM))
    write_bytes(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    _write_private(folder / KEY, key)
    _write_private(folder / SIGNING, Ed25519PrivateKey.generate())


def make_client_credentials(folder: Path, server: Path, name: str) -> None:
    """A client's key in its own folder, its public key on the server's side, and what it checks the
    server by.

    Raises:
        StorageError: the disk did not take it.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(folder / CLIENT_KEY, key, serialization.PrivateFormat.OpenSSH)
    write_bytes(server / "clients" / f"{name}.pub", _ssh(key.public_key()))
    write_bytes(folder / CA, (server / CA).read_bytes())
    write_bytes(folder / SERVER_PUBLIC, _ssh(_signing_key(server / SIGNING).public_key()))


def client_keys(folder: Path) -> dict[bytes, ec.EllipticCurvePublicKey]:
    """The public keys of the clients in a server's register, by their PEM form, in which Flower's
    calls name them.

    Raises:
        ConfigurationError: the register cannot be read.
        CredentialError: a key in it cannot be.
    """
    keys = [client_key(member.public_key) for member in read_register(folder).values()]
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return {key.public_bytes(serialization.Encoding.PEM, form): key for key in keys}


def client_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A client's public key.

    Raises:
        CredentialError: it cannot be read, or is of another kind.
    """
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise CredentialError(f"cannot read the client's public key {path}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CredentialError(f"{path} is no ECDSA key: {OURS}")
    return key


def client_signer(path: Path) -> Callable[[bytes], bytes]:
    """What signs statements with a client's private key.

    Raises:
        CredentialError: it cannot be read, or is of another kind.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CredentialError(
            f"cannot read this client's key {path}: {error}; it comes with the folder that `fedsp"
            " federation init` made"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CredentialError(f"{path} is no ECDSA key: {OURS}")
    return lambda statement: key.sign(statement, ec.ECDSA(hashes.SHA256()))


def has_signed(key: ec.EllipticCurvePublicKey, statement: bytes, signature: bytes) -> bool:
    """Whether a client's key made this signature, as Flower's nodes make theirs: ECDSA with
    SHA-256."""
    try:
        key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def sign(statement: bytes, key: Path) -> str:
    """The Ed25519 signature of a statement, in hexadecimal.

    Raises:
        CredentialError: the key cannot be used.
    """
    return _signing_key(key).sign(statement).hex()


def verify(statement: bytes, signature: str, public: Path) -> None:
    """Hold a signature against the statement and the server's public key.

    Raises:
        CredentialError: the key cannot be read, or the signature is not of this statement and key.
    """
    try:
        key = serialization.load_ssh_public_key(public.read_bytes())
        if not isinstance(key, Ed25519PublicKey):
            raise CredentialError(
                f"{public} is no Ed25519 key: get server.pub again from the owner of the model"
            )
        key.verify(bytes.fromhex(signature), statement)
    except (OSError, UnsupportedAlgorithm) as error:
        raise CredentialError(f"cannot read the server's public key {public}: {error}") from error
    except (InvalidSignature, ValueError) as error:
        raise CredentialError(
            f"the signature is not valid for the key {public}: get the package again from the owner"
            " of the model"
        ) from error


def _signing_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CredentialError(f"cannot read the signing key {path}: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CredentialError(f"{path} is no Ed25519 key; `fedsp federation init` makes one")
    return key


def _certificate(
    subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, *, ca: bool
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(usage, critical=True)
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _ssh(key: ec.EllipticCurvePublicKey | Ed25519PublicKey) -> bytes:
    return (
        key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"
    )


def _write_private(
    path: Path,
    key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> None:
    """A private key that only its owner can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    previous = os.umask(0o077)
    try:
        write_bytes(
            path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        )
    finally:
        os.umask(previous)
