"""The keys of a deployment: who may speak to whom, and what the owner of the model has signed.

A federation's folder has one folder per party. What is secret stays in the folder of the party it
belongs to:

ca.key                      signs the server's certificate; keep it offline
server/ca.crt               the certificate authority's certificate
server/server.crt, .key     the server's TLS certificate and key (ECDSA P-384)
server/signing.key          signs the auxiliary model (Ed25519)
server/register.toml        the clients: public key and number of examples of each
server/clients/NAME.pub     public keys, in OpenSSH form
server/server.pub           the public half of signing.key, once a client was admitted
server/run.toml             the run
NAME/client.key             the client's key (ECDSA P-384): it signs every request to the server
NAME/ca.crt, server.pub     what it checks the server's certificate and package against
NAME/party.toml             the client's configuration
NAME/request.json           where the client made its key itself: the request to be admitted
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsp.config_file import read_members
from fedsp.errors import CredentialError
from fedsp.federation.chained_log import record_event
from fedsp.storage import parse_json, write_bytes

DAYS, AUTHORITY_DAYS, SOON = 825, 3650, 60
"""Days: how long a server's certificate is valid, and an authority's, and how long before its end
that is said."""

PEM_KEY = serialization.PublicFormat.SubjectPublicKeyInfo
KEY_HEADER, SIGNATURE_HEADER, TIME_HEADER = "flwr-public-key", "flwr-signature", "flwr-timestamp"
"""Headers of every call of a registered node: its key, and its signature of the timestamp."""

CA, CERTIFICATE, KEY = "ca.crt", "server.crt", "server.key"
SIGNING = "signing.key"
CLIENT_KEY, SERVER_PUBLIC = "client.key", "server.pub"
LONGEST_REQUEST = 16 << 10
REQUEST_FIELDS = "fedsp_request", "client", "public_key", "about", "signature", "signature_before"
MOST_ABOUT = 300
"""Characters in which a client describes its text."""
NO_KEY = ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm
"""What `cryptography` raises of bytes that are no key, or none that it reads."""
OURS = "take the one that `fedsp federation init` made for this client"


def make_server_credentials(folder: Path, host: str) -> None:
    """A certificate authority, the server's certificate for `host` and this machine, and the key
    that signs packages.

    Raises:
        StorageError: the disk did not take it.
    """
    authority = ec.generate_private_key(ec.SECP384R1())
    key = ec.generate_private_key(ec.SECP384R1())
    root = _authority(authority)
    names = [_alternative(name) for name in dict.fromkeys([host, "localhost", "127.0.0.1"])]
    certificate = _server_certificate(key, authority, x509.SubjectAlternativeName(names))
    _write_private(folder.parent / "ca.key", authority)
    write_bytes(folder / CA, root.public_bytes(serialization.Encoding.PEM))
    write_bytes(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    _write_private(folder / KEY, key)
    _write_private(folder / SIGNING, Ed25519PrivateKey.generate())


def new_client_key(path: Path) -> None:
    """A new private key of a client, which only its owner can read.

    Raises:
        StorageError: the disk did not take it.
    """
    _write_private(
        path, ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH
    )


def server_public(server: Path) -> bytes:
    """The public key by which clients verify packages, in OpenSSH form.

    Raises:
        CredentialError: the signing key in the server's folder cannot be used.
    """
    return _ssh(_signing_key(server / SIGNING).public_key())


def make_client_credentials(folder: Path, server: Path, name: str) -> None:
    """A client's key in its own folder, its public key on the server's side, and what it checks the
    server by.

    Raises:
        StorageError: the disk did not take it.
    """
    new_client_key(folder / CLIENT_KEY)
    public = _client_key(folder / CLIENT_KEY).public_key()
    write_bytes(server / "clients" / f"{name}.pub", _ssh(public))
    write_bytes(folder / CA, (server / CA).read_bytes())
    write_bytes(folder / SERVER_PUBLIC, server_public(server))


@dataclass(frozen=True)
class Asked:
    """A client's request to be admitted: its name, its public key in OpenSSH form, what it says of
    its text, and, in one that replaces a key, the signature by the key before."""

    name: str
    public: bytes
    about: str
    before: bytes | None

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it."""
        return fingerprint(self.public)

    def is_of(self, public: Path) -> bool:
        """Whether this is the key in a file."""
        return _ssh(client_key(public)) == self.public

    def replaces(self, public: Path) -> bool:
        """Whether the key in a file is the same or has signed this request."""
        statement = _request(self.name, self.public, self.about)
        signed = self.before is not None and has_signed(client_key(public), statement, self.before)
        return signed or self.is_of(public)


def write_request(
    path: Path, name: str, key: Path, *, about: str = "", before: Path | None = None
) -> str:
    """Write a client's request to be admitted, signed by its key and, where that replaces another,
    by the one before; returns the key's fingerprint.

    Raises:
        CredentialError: a key cannot be read.
        StorageError: the disk did not take it.
    """
    public = _ssh(_client_key(key).public_key())
    statement = _request(name, public, about)
    request = {
        "fedsp_request": 1,
        "client": name,
        "public_key": public.decode(),
        "about": about,
        "signature": client_signer(key)(statement).hex(),
        "signature_before": client_signer(before)(statement).hex() if before else None,
    }
    write_bytes(path, json.dumps(request, indent=1).encode() + b"\n")
    return fingerprint(public)


def may_describe(about: str) -> bool:
    """Whether this may be what a client says of its text: short, and in one line."""
    return len(about) <= MOST_ABOUT and about.isprintable()


def read_request(path: Path) -> Asked:
    """A client's request to be admitted.

    Raises:
        CredentialError: it cannot be read, is none, or is not signed by its own key.
    """
    try:
        with open(path, "rb") as file:
            fields = parse_json(file.read(LONGEST_REQUEST))
        if set(fields) != set(REQUEST_FIELDS) or fields["fedsp_request"] != 1:
            raise ValueError("it has other fields than a request has")
        texts = ("client", "public_key", "signature", "about")
        if not all(isinstance(fields[name], str) for name in texts):
            raise ValueError("one of its fields is no text")
        key = serialization.load_ssh_public_key(fields["public_key"].encode())
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
            raise ValueError("its key is no ECDSA key on the curve P-384")
        signature, before = fields["signature"], fields["signature_before"]
        about = str(fields["about"])
        if not may_describe(about):
            raise ValueError(f"it says more than {MOST_ABOUT} plain characters of its text")
        old = None if before is None else bytes.fromhex(before)
        asked = Asked(str(fields["client"]), _ssh(key), about, old)
        if not has_signed(key, _request(asked.name, asked.public, about), bytes.fromhex(signature)):
            raise ValueError("it is not signed by the key in it")
    except OSError as error:
        raise CredentialError(f"cannot read {path}: {error.strerror}") from error
    except (*NO_KEY, AttributeError, KeyError) as error:
        raise CredentialError(
            f"{path} is no request of a client ({error}): ask for the one that `fedsp party init`"
            " wrote"
        ) from error
    return asked


def fingerprint(public: bytes) -> str:
    """The fingerprint of a public key in OpenSSH form, as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _request(name: str, public: bytes, about: str) -> bytes:
    return b"\n".join([b"fedsp request 1", name.encode(), public, about.encode()])


def renew(server: Path, authority: Path) -> tuple[datetime.datetime, bool]:
    """A new certificate and key for a server, for the names that its certificate has, signed by the
    authority's key; and a new certificate of the authority, where that would end before. Returns
    when the server's ends, and whether the authority's, `ca.crt`, was made anew too.

    Raises:
        CredentialError: a certificate or the authority's key cannot be read, or that key is not the
            authority's.
        StorageError: the disk did not take it.
    """
    old, root = _read_certificate(server / CERTIFICATE), _read_certificate(server / CA)
    try:
        signer = serialization.load_pem_private_key(authority.read_bytes(), None)
    except (OSError, *NO_KEY) as error:
        raise CredentialError(
            f"cannot read the authority's key {authority} ({error}): it is the ca.key that `fedsp"
            " federation init` made, kept offline"
        ) from error
    if (
        not isinstance(signer, ec.EllipticCurvePrivateKey)
        or signer.public_key() != root.public_key()
    ):
        raise CredentialError(f"{authority} is not the key of {server / CA}")
    until = _now() + datetime.timedelta(days=DAYS)
    renewed = root.not_valid_after_utc < until
    if renewed:
        root = _authority(signer)
    names = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    key = ec.generate_private_key(ec.SECP384R1())
    made = _server_certificate(key, signer, names)
    until = made.not_valid_after_utc
    record_event(server, "certificate renewed", until=until.isoformat(), authority=renewed)
    new = {name: server / f"{name}.new" for name in (CA, KEY, CERTIFICATE)}
    write_bytes(new[CA], root.public_bytes(serialization.Encoding.PEM))
    _write_private(new[KEY], key)
    write_bytes(new[CERTIFICATE], made.public_bytes(serialization.Encoding.PEM))
    for name, path in new.items():  # all are on the disk
        path.replace(server / name)
    return until, renewed


def days_left(server: Path) -> float:
    """Days until the first certificate of a server's folder ends.

    Raises:
        CredentialError: one cannot be read.
    """
    ends = min(_read_certificate(server / name).not_valid_after_utc for name in (CERTIFICATE, CA))
    return (ends - _now()) / datetime.timedelta(days=1)


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CredentialError(f"cannot read the certificate {path}: {error}") from error


def client_keys(folder: Path) -> dict[bytes, tuple[str, ec.EllipticCurvePublicKey]]:
    """The clients in a server's register, name and public key, by that key's PEM form, in which
    Flower's calls name them.

    Raises:
        ConfigurationError: the register cannot be read.
        CredentialError: a key in it cannot be.
    """
    keys = {name: client_key(member.public_key) for name, member in read_members(folder).items()}
    form = serialization.Encoding.PEM
    return {key.public_bytes(form, PEM_KEY): (name, key) for name, key in keys.items()}


def client_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A client's public key.

    Raises:
        CredentialError: it cannot be read, or is of another kind.
    """
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, *NO_KEY) as error:
        raise CredentialError(f"cannot read the client's public key {path}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CredentialError(f"{path} is no ECDSA key: {OURS}")
    return key


def client_signer(path: Path) -> Callable[[bytes], bytes]:
    """What signs statements with a client's private key.

    Raises:
        CredentialError: it cannot be read, or is of another kind.
    """
    key = _client_key(path)
    return lambda statement: key.sign(statement, ec.ECDSA(hashes.SHA256()))


def signed_headers(path: Path) -> dict[str, str]:
    """The headers with which a client proves itself to the server's proxy: its public key, the time
    and its signature of that, as Flower's node sends them.

    Raises:
        CredentialError: its private key cannot be read, or is of another kind.
    """
    key = _client_key(path)
    now = _now().isoformat()
    public = key.public_key().public_bytes(serialization.Encoding.PEM, PEM_KEY)
    signature = key.sign(now.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        KEY_HEADER: base64.b64encode(public).decode(),
        SIGNATURE_HEADER: base64.b64encode(signature).decode(),
        TIME_HEADER: now,
    }


def _client_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, *NO_KEY) as error:
        raise CredentialError(
            f"cannot read this client's key {path}: {error}; it comes with the folder that `fedsp"
            " federation init` made"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CredentialError(f"{path} is no ECDSA key: {OURS}")
    return key


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
    except (OSError, NotImplementedError, UnsupportedAlgorithm) as error:
        raise CredentialError(f"cannot read the server's public key {public}: {error}") from error
    except (InvalidSignature, ValueError) as error:
        raise CredentialError(
            f"the signature is not valid for the key {public}: get the package again from the owner"
            " of the model"
        ) from error


def _signing_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, *NO_KEY) as error:
        raise CredentialError(f"cannot read the signing key {path}: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CredentialError(f"{path} is no Ed25519 key; `fedsp federation init` makes one")
    return key


ISSUER = "fedsp certificate authority"


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    return _certificate(ISSUER, key, ca=True).sign(key, hashes.SHA384())


def _server_certificate(
    key: ec.EllipticCurvePrivateKey,
    authority: ec.EllipticCurvePrivateKey,
    names: x509.SubjectAlternativeName,
) -> x509.Certificate:
    """For the first of the names, and the others."""
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    return (
        _certificate(str(next(iter(names)).value)[:64], key, ca=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(signer, critical=False)
        .sign(authority, hashes.SHA384())
    )


def _certificate(
    subject: str, key: ec.EllipticCurvePrivateKey, *, ca: bool
) -> x509.CertificateBuilder:
    now = _now()
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
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS if ca else DAYS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
        .add_extension(usage, critical=True)
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


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
