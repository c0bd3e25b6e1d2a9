"""How clients are spoken to with TLS."""

from __future__ import annotations

import ssl
from pathlib import Path

from ..errors import ConfigError


def context(cert: Path, key: Path | None) -> ssl.SSLContext:
    """A server's context from PEM files; without `key` it is in `cert`. Raises ConfigError."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    load(made, cert, key)
    return made


def load(made: ssl.SSLContext, cert: Path, key: Path | None) -> None:
    """Read the files, again perhaps: new connections get the new certificate. Raises ConfigError."""
    try:
        made.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        files = f"{cert} and {key}" if key else str(cert)
        raise ConfigError(
            f"TLS does not work with {files}: {getattr(error, 'strerror', None) or error}",
            hint="give PEM files: the certificate with its chain, and its private key without a password",
        ) from error


def _no_password() -> str:
    raise ValueError("the private key has a password")
