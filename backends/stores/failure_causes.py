"""Find why a request has no usable answer, by the classes and error numbers along an exception's causes.

Every HTTP client hides the cause below exceptions of its own: botocore, aiobotocore, urllib3 and gcsfs each
have one for "the connection failed". What they were raised from says whether a name did not resolve, a port
refused, a certificate was not trusted, or an answer was not HTTP. Nothing is decided on an exception's text.
"""

from __future__ import annotations

import errno
import http.client
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
import urllib3.exceptions
from aiohttp import http_exceptions as aiohttp_parser
from urllib3.util.ssl_match_hostname import CertificateError as WrongHostError

from cloudckpt.backends.config.endpoint_url import host_and_port
from cloudckpt.backends.errors import UnansweredError
from cloudckpt.backends.stores.http.bounded import TooLongError
from cloudckpt.backends.stores.http.proxies import PORTS, Proxy, unused_all_proxy
from cloudckpt.backends.system.printable import one_line

_T = TypeVar("_T")

USER_OF_PROXY: Final = "A proxy wants a user and password, as in HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT"
_NOT_HTTP: Final = (
    http.client.BadStatusLine,
    http.client.LineTooLong,
    TooLongError,
    http.client.UnknownProtocol,
    http.client.UnknownTransferEncoding,
    urllib3.exceptions.InvalidChunkLength,
    urllib3.exceptions.InvalidHeader,
    aiohttp_parser.HttpProcessingError,
)
_CUT_OFF: Final = (http.client.RemoteDisconnected, aiohttp_parser.PayloadEncodingError)
"""Subclasses of those above that stand for a connection that ended, which is transient."""
_OF_PROXIES: Final = (
    aiohttp.ClientHttpProxyError,
    aiohttp.ClientProxyConnectionError,
    urllib3.exceptions.ProxyError,
)
_NO_TLS: Final = frozenset(
    {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}
    | {"UNKNOWN_PROTOCOL", "HTTPS_PROXY_REQUEST", "UNEXPECTED_MESSAGE"}
)
"""OpenSSL's mnemonics for bytes that are no TLS."""
_TLS_RECORDS: Final = ("\x15\x03", "\x16\x03")
"""The first bytes of what a server of TLS answers to plain HTTP: an alert."""
_NO_ROUTE: Final = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
_REFUSED: Final = (errno.ECONNREFUSED, errno.EADDRNOTAVAIL)
_LONGEST: Final = 300

# OpenSSL's numbers of what is wrong with a certificate, of x509_vfy.h.
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_OTHER_NAMES: Final = (62, 64)
"""Certificates for other hosts, and for other addresses."""
_USE_ITS_NAME: Final = "Use the name that the certificate has, or give the server one for this name"
_SET_THE_CLOCK: Final = "set it by NTP or chrony (a container has its host's clock)"


@dataclass(frozen=True, slots=True)
class Route:
    """The way to a server."""

    endpoint: str
    """URL of the server, without credentials."""
    settings: str
    """Options and variables that name the server, for the cure."""
    proxy: Proxy | None = None
    """The proxy before the server; None without one."""
    verify: bool | str = True
    """Authorities that check certificates: a file or folder, True for the host's, False for no check."""

    @property
    def host(self) -> str:
        """The host of the endpoint."""
        return urlsplit(self.endpoint).hostname or ""

    def __str__(self) -> str:
        """Return the endpoint, and the proxy before it."""
        return f"{self.endpoint} through the proxy {self.proxy}" if self.proxy else self.endpoint


class TunnelError(OSError):
    """A proxy refused to connect to a server."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.message = reason


class UnreadableError(UnansweredError):
    """An answer has a header or a field that is no number or date, where one must be."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A reason why a request has no usable answer."""

    what: str
    """Host and port, and what is wrong there."""
    cure: str
    check: str
    """``name``, ``proxy``, ``connection``, ``tls`` or ``http``: what failed."""
    sent: bool = False
    """True if the request may have been carried out."""


def links(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and, from the outside in, those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def origin(url: str) -> str:
    """Return scheme and host of a URL, the rest of which may be secret."""
    parts = urlsplit(url)
    return one_line(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}") if parts.netloc else "another path"


def words(error: BaseException) -> str:
    """Return the innermost exception's own words on one line, with its class."""
    *_, last = links(error)
    return _said(last)


def _said(link: BaseException) -> str:
    if isinstance(link, aiohttp_parser.HttpProcessingError):
        text = link.message
    elif isinstance(link, aiohttp.ServerDisconnectedError) and not isinstance(link.message, str):
        text = "the connection ended within the headers of an answer"  # the message is what came of them
    else:
        text = str(link)
    shown = one_line(" ".join(text.split()))
    shown = f"{shown[:_LONGEST]} ..." if len(shown) > _LONGEST else shown
    return f"{type(link).__name__}: {shown}" if shown else type(link).__name__


def malformed(error: BaseException) -> BaseException | None:
    """Return the parser's exception where an answer was not valid HTTP, None otherwise."""
    found = None
    for link in links(error):  # the innermost has the parser's own words
        too_many = type(link) is http.client.HTTPException  # more headers than http.client takes
        if too_many or (isinstance(link, _NOT_HTTP) and not isinstance(link, _CUT_OFF)):
            found = link
    return found


def is_lasting(error: BaseException) -> bool:
    """Return True if another attempt hardly ends otherwise: no HTTP, no TLS, or no trusted certificate."""
    if malformed(error) is not None:
        return True
    return is_of_certificate(error) or any(map(_has_no_tls, links(error)))


def is_of_certificate(error: BaseException) -> bool:
    """Return True if the server's certificate was refused, before any request was sent."""
    return any(isinstance(link, (ssl.SSLCertVerificationError, WrongHostError)) for link in links(error))


def readable(act: Callable[[], _T], route: Route) -> _T:
    """Return the value of ``act``, one attempt of a request.

    Raises:
        UnreadableError: the client could not read a header or a field of the answer.
    """
    try:
        return act()
    except ValueError as error:
        if type(error) is not ValueError:  # errors of ours and of clients, which have a meaning of their own
            raise
        raise UnreadableError(
            f"{route} answered with a header or a field that can't be read ({words(error)})",
            hint=_no_http_cure(route),
        ) from error


def cause_of(error: BaseException, route: Route, *, connecting: bool) -> Cause | None:
    """Return why a request has no usable answer, None where the connection merely ended.

    Args:
        error: what the client raised.
        route: to the server.
        connecting: it was raised before there was a connection.
    """
    proxy, settings, host = route.proxy, route.settings, route.host
    parts = urlsplit(route.endpoint)
    at = host_and_port(host, parts.port or PORTS.get(parts.scheme, 443))
    if (parser := malformed(error)) is not None:
        return _no_http(parser, route)
    found = list(links(error))
    of_proxy = any(isinstance(link, _OF_PROXIES) for link in found)
    for link in found:
        if isinstance(link, WrongHostError):  # urllib3's own, where it compares names by itself
            what = f"the certificate of {at} is for another host ({one_line(link)})"
            return Cause(what, _USE_ITS_NAME, "tls")
        # aiohttp has subclasses without what the ssl module says of a certificate.
        if isinstance(link, ssl.SSLCertVerificationError) and hasattr(link, "verify_code"):
            return _certificate(link, host_and_port(*proxy.address) if of_proxy and proxy else at, route)
    if any(map(_has_no_tls, found)):
        if of_proxy and proxy:
            cure = f"Write http:// in place of https:// in {proxy.source} if the proxy has no certificate"
            return Cause(f"the proxy {proxy} does not speak TLS", cure, "proxy")
        cure = f"If the server has no certificate, write http:// in {settings}; else check the port"
        return Cause(f"{route} does not speak TLS", cure, "tls", sent=True)
    if not (connecting or of_proxy):
        return None
    check, reason = _unreached(found, words(error))
    if proxy is not None:
        return Cause(f"the proxy {proxy} {reason}", proxy.cure(host), "proxy")
    return Cause(f"{at} {reason}", _cure(check, settings), check)


def _no_http(parser: BaseException, route: Route) -> Cause:
    line = getattr(parser, "line", "")
    first = line if isinstance(line, str) else ""
    if first.strip("'\"").startswith(_TLS_RECORDS):
        cure = f"Write https:// in {route.settings}"
        return Cause(f"{route} speaks TLS, and was sent plain HTTP", cure, "http", sent=True)
    if isinstance(parser, TooLongError):
        return Cause(f"{route} answered with {parser}", _no_http_cure(route), "http", sent=True)
    what = f"{route} answered with malformed HTTP ({_said(parser)})"
    return Cause(what, _no_http_cure(route), "http", sent=True)


def ended_cure(route: Route) -> str:
    """Return what to do where a server ends connections without an answer, each time."""
    cure = f"If it goes on, check the port and http:// or https:// in {route.settings}, and firewalls between"
    return f"{cure}. {route.proxy.cure(route.host)}" if route.proxy is not None else cure


def _no_http_cure(route: Route) -> str:
    cure = f"Check host, port and http:// or https:// in {route.settings}, and gateways before the server"
    return f"{cure}. {route.proxy.cure(route.host)}" if route.proxy is not None else cure


def _unreached(found: list[BaseException], said: str) -> tuple[str, str]:
    """Return what failed before there was a connection, ``name`` or ``connection``, and how."""
    for link in found:
        if isinstance(link, socket.gaierror):
            return "name", f"has a name that does not resolve ({link.strerror or 'no address'})"
        if isinstance(link, (aiohttp.ClientHttpProxyError, TunnelError)):
            return "connection", f"refused to connect ({link.status} {one_line(link.message)[:_LONGEST]})"
    for link in found:
        number = link.errno if isinstance(link, OSError) else None
        if number in _REFUSED:
            return "connection", "refused the connection"
        if number in _NO_ROUTE:
            return "connection", f"can't be reached from here ({errno.errorcode[number or 0]})"
    # After the others: urllib3's error for a refused connection is one of its timeouts.
    late = (TimeoutError, urllib3.exceptions.ConnectTimeoutError)
    if any(
        isinstance(link, late) and not isinstance(link, urllib3.exceptions.NewConnectionError)
        for link in found
    ):
        return "connection", "did not answer an attempt to connect in time"
    return "connection", f"did not connect ({said})"


def _cure(check: str, settings: str) -> str:
    if check == "name":
        cure = f"Check the spelling of the host in {settings}, and this machine's DNS (/etc/resolv.conf)"
    else:
        cure = f"Check host and port in {settings}, that the server runs, routes, and firewalls between"
    if (name := unused_all_proxy()) is not None:
        return f"{cure}. {name} is set and is not used: a proxy goes into HTTPS_PROXY or HTTP_PROXY"
    return f"{cure}. Where only a proxy leads out, set HTTPS_PROXY or HTTP_PROXY"


def _certificate(error: ssl.SSLCertVerificationError, at: str, route: Route) -> Cause:
    what = f"the certificate of {at} is not trusted ({one_line(error.verify_message)})"
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if error.verify_code == _NOT_YET_VALID:
        what = f"the certificate of {at} is not valid yet by this machine's clock, which says {now}"
        cure = f"If the clock is behind, {_SET_THE_CLOCK}"
    elif error.verify_code == _EXPIRED:
        what = f"the certificate of {at} has expired by this machine's clock, which says {now}"
        cure = f"Renew the server's certificate. If the clock is ahead, {_SET_THE_CLOCK}"
    elif error.verify_code in _OTHER_NAMES:
        what = f"the certificate of {at} is for another host ({one_line(error.verify_message)})"
        cure = _USE_ITS_NAME
    elif route.verify is True and not has_authorities():
        what = f"{what}: this machine has no CA certificates in {' or '.join(_places_of_authorities())}"
        cure = "Install the package ca-certificates, or name a file of authorities in SSL_CERT_FILE"
    else:
        variable = "SSL_CERT_FILE" if route.verify is True else "AWS_CA_BUNDLE"
        cure = f"Name the certificate of the server's authority in {variable}, or install one that is trusted"
    if route.proxy is not None:
        cure = f"{cure}. The proxy {route.proxy} may replace certificates by its own"
    return Cause(what, cure, "tls")


def has_authorities() -> bool:
    """Return True if there are certificates of authorities in OpenSSL's default places."""
    file, folder = map(Path, _places_of_authorities())
    return (file.is_file() and file.stat().st_size > 0) or (folder.is_dir() and any(folder.iterdir()))


def _places_of_authorities() -> tuple[str, str]:
    paths = ssl.get_default_verify_paths()
    return (
        os.environ.get(paths.openssl_cafile_env, paths.openssl_cafile),
        os.environ.get(paths.openssl_capath_env, paths.openssl_capath),
    )


def _has_no_tls(link: BaseException) -> bool:
    return isinstance(link, ssl.SSLError) and getattr(link, "reason", None) in _NO_TLS
