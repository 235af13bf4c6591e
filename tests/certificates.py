"""Certificates for loopback, as files: an authority of the test's own, and what it signs for servers and nodes."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Certificate:
    path: Path
    key_path: Path
    authority_path: Path

    @property
    def ray_variables(self) -> dict[str, str]:
        """What a process of Ray's has in its environment to show this certificate and to trust its authority alone."""
        files = {"RAY_TLS_SERVER_CERT": self.path, "RAY_TLS_SERVER_KEY": self.key_path, "RAY_TLS_CA_CERT": self.authority_path}
        return {"RAY_USE_TLS": "1"} | {name: str(path) for name, path in files.items()}


class Authority:
    """Signs certificates, which are valid for a day and for both ends of a connection; its own is `ca.pem` in its folder."""

    def __init__(self, folder: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tidepool test authority")])
        made = _builder(self._name, self._key.public_key()).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self._folder, self._path = folder, folder / "ca.pem"
        self._path.write_bytes(self._signed(made))

    def issue(self, name: str, addresses: Sequence[str] = ("127.0.0.1",)) -> Certificate:
        """Write `<name>.pem` and `<name>-key.pem`, for `localhost` and the addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName("localhost"), *(x509.IPAddress(ipaddress.ip_address(address)) for address in addresses)]
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        made = _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key())
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False).add_extension(usage, critical=False)
        certificate = Certificate(self._folder / f"{name}.pem", self._folder / f"{name}-key.pem", self._path)
        certificate.path.write_bytes(self._signed(made))
        certificate.key_path.touch(mode=0o600)
        certificate.key_path.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return certificate

    def _signed(self, made: x509.CertificateBuilder) -> bytes:
        return made.issuer_name(self._name).sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _builder(subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).public_key(key).serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(days=1))
