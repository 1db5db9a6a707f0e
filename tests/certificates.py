"""A certificate authority of one's own, as institutes have, and a server's certificate that it has signed."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Certificates(NamedTuple):
    """PEM files: the authority's certificate, by which clients know its servers; a server's certificate and key."""

    authority: Path
    server: Path
    key: Path


def make(folder: Path) -> Certificates:
    """Files in the folder, of a server at 127.0.0.1, for a day."""
    folder.mkdir(parents=True, exist_ok=True)
    files = Certificates(*(folder / f"{name}.pem" for name in Certificates._fields))
    signing, serving = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "The institute's own authority")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])

    def signed(
        name: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType, *, critical: bool
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(authority, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1)).add_extension(extension, critical=critical)
        return builder.sign(signing, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    files.authority.write_bytes(signed(authority, signing, x509.BasicConstraints(True, None), critical=True))
    files.server.write_bytes(signed(x509.Name([]), serving, address, critical=True))
    files.key.write_bytes(
        serving.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files
