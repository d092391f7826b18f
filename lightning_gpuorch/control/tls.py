"""Encryption of the control plane where it is a port: mutual TLS with certificates that the user gives.

Each side shows a certificate of one authority, ``tls_ca``. Names in certificates are not compared with addresses, since ranks
reach their own node by another address than other nodes do. In their place both sides say in the handshake, under the HMAC of
the token, which certificate the coordinator has shown: a process in between, though of the same authority, has another one.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
from dataclasses import dataclass

from lightning_gpuorch.config import OrchestratorConfig
from lightning_gpuorch.errors import AuthenticationError, ConfigurationError

HELLO = b"\x16\x03"
"""The first bytes of a client that speaks TLS."""
ALERT = b"\x15\x03\x03\x00\x02\x02\x46"
"""A fatal alert about the version: what a side without TLS answers."""
ADVICE = "Set tls_certificate, tls_key and tls_ca (GPUORCH_TLS_CERTIFICATE, ...) on all nodes, or on none."


@dataclass(frozen=True)
class Certificates:
    """What one side has: paths of PEM files.

    Attributes:
        certificate: Its own, with its chain.
        key: Private key of that.
        authority: Of whom the other side's certificate must be.
    """

    certificate: str
    key: str
    authority: str

    @classmethod
    def of(cls, config: OrchestratorConfig) -> Certificates | None:
        """Those of the configuration, if there are any."""
        given = config.tls_certificate, config.tls_key, config.tls_ca
        return cls(*given) if all(given) else None

    def context(self, server_side: bool) -> ssl.SSLContext:
        """For one side of connections.

        Raises:
            ConfigurationError: A file cannot be read, or the key does not belong to the certificate.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
            context.load_verify_locations(self.authority)
        except (OSError, ValueError) as error:  # of which ssl.SSLError is one
            raise ConfigurationError(
                f"TLS cannot be set up with tls_certificate={self.certificate!r}, tls_key={self.key!r}, "
                f"tls_ca={self.authority!r}: {error}"
            ) from error
        return context

    def fingerprint(self) -> str:
        """Of its own certificate."""
        with open(self.certificate, encoding="ascii", errors="replace") as file:
            text = file.read()
        begin = text.index(ssl.PEM_HEADER)
        first = text[begin : text.index(ssl.PEM_FOOTER, begin) + len(ssl.PEM_FOOTER)]
        return _digest(ssl.PEM_cert_to_DER_cert(first))


def fingerprint_of_peer(connection: ssl.SSLSocket) -> str:
    """Of the certificate that the other side has shown."""
    return _digest(connection.getpeercert(binary_form=True) or b"")


def begin(connection: socket.socket, context: ssl.SSLContext, address: str) -> ssl.SSLSocket:
    """Speak TLS on a connection to the coordinator.

    Raises:
        AuthenticationError: The other side speaks no TLS, or one of both does not accept the other's certificate.
        ConnectionError: It has ended.
    """
    wrapped = context.wrap_socket(connection, do_handshake_on_connect=False)
    try:
        wrapped.do_handshake()
    except BaseException as error:
        wrapped.close()
        if isinstance(error, (TimeoutError, ssl.SSLEOFError)):
            raise ConnectionError(str(error)) from None
        if isinstance(error, ssl.SSLError):
            raise refusal(error, address) from None
        raise
    return wrapped


def refusal(error: ssl.SSLError, address: str) -> AuthenticationError:
    """What a failure of TLS with the coordinator means."""
    return AuthenticationError(f"no TLS connection with {address}: {error}. {ADVICE}")


def _digest(certificate: bytes) -> str:
    return hashlib.sha256(certificate).hexdigest()


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not")
