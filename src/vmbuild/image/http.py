"""One GET, and its failures in our words. The only importer of requests, which takes long to load: import it late."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import requests
import urllib3
from requests import exceptions as failures

from vmbuild.address import is_protected
from vmbuild.errors import HostError
from vmbuild.image.tries import NotFound, Transient, unreachable
from vmbuild.trust import trusted_too

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
CHUNK_BYTES = 128 * 1024


class _Adapter(requests.adapters.HTTPAdapter):
    """Trusts what is `trusted_too`; the bundle of the environment, or the public one, is added to it."""

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, **options, **_tls_options())

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, **options, **_tls_options())


def _tls_options() -> dict[str, ssl.SSLContext]:
    if not (pem := trusted_too()):
        return {}
    context = urllib3.util.ssl_.create_urllib3_context()
    context.load_verify_locations(cadata=pem)
    return {"ssl_context": context}


class Session(requests.Session):
    """Connections that are kept open; proxies and CA bundle come from the environment."""

    def __init__(self, connections: int = 1) -> None:
        super().__init__()
        adapter = _Adapter(pool_connections=connections, pool_maxsize=connections)
        self.mount("http://", adapter)
        self.mount("https://", adapter)
        # identity: digests are those of the files as they lie on the server
        self.headers.update({"User-Agent": f"vmbuild/{version('vmbuild')}", "Accept-Encoding": "identity"})


@contextmanager
def open_url(session: Session, url: str, headers: Mapping[str, str]) -> Iterator[requests.Response]:
    """Yield the answer to a GET when it is a body (200, 206) or says that there is no such range (416).

    Raises Transient, NotFound, Unreachable, or HostError for a CA bundle that is not there.
    """
    try:
        response = session.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
    except failures.SSLError as error:
        if "CERTIFICATE_VERIFY_FAILED" not in str(error):  # a handshake broken off: the next one may succeed
            raise Transient(f"no TLS connection came about\n{error}") from error
        raise unreachable(url, f"the server's certificate is not trusted\n{error}") from error
    except (failures.ConnectionError, failures.Timeout) as error:
        raise Transient(_plain(error), reached=isinstance(error, failures.ReadTimeout)) from error
    except failures.RequestException as error:
        raise unreachable(url, str(error)) from error
    except OSError as error:
        raise HostError(str(error), resolution="Check REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE.") from error
    with response:
        _check_status(url, response.status_code, response.reason)
        yield response


def weak_address(response: requests.Response) -> str:
    """Return the address on the way to an answer that is not protected, empty when there is none."""
    return next((hop.url for hop in (*response.history, response) if not is_protected(hop.url)), "")


def _check_status(url: str, status: int, reason: str) -> None:
    if status in (requests.codes.not_found, requests.codes.gone):
        raise NotFound(
            f"the server does not have {url}",
            details=f"{status} {reason}",
            resolution="Mirrors drop old versions: run the command again, or set VMBUILD_MIRROR to another mirror.",
        )
    if status >= 500 or status in (requests.codes.too_many_requests, requests.codes.request_timeout):
        raise Transient(f"the server answers {status} {reason}")
    if status not in (200, 206, 416):
        raise unreachable(url, f"the server answers {status} {reason}")


def read_body(response: requests.Response, at_most: int | None) -> Iterator[bytes]:
    """Yield the body as it is sent, to just beyond `at_most` bytes: enough to see that it is too long.

    Raises Transient when the connection ends early.
    """
    given = response.headers.get("Content-Length", "")
    expected = int(given) if given.isdecimal() else 0
    received = 0
    try:
        for chunk in response.raw.stream(CHUNK_BYTES, decode_content=False):
            yield chunk
            received += len(chunk)
            if at_most is not None and received > at_most:
                return
    except (urllib3.exceptions.HTTPError, ConnectionError) as error:
        raise Transient(f"the connection broke after {received} bytes ({type(error).__name__})") from error
    if received < expected:
        raise Transient(f"the connection ended after {received} of {expected} bytes")


def _plain(error: Exception) -> str:
    """Return the cause of a failed connection in plain words, followed by what the library said."""
    text = str(error)
    for found, words in (
        (isinstance(error, failures.ProxyError), "the proxy does not answer"),
        (isinstance(error, failures.ConnectTimeout), f"no answer within {CONNECT_TIMEOUT_S:.0f} s"),
        (isinstance(error, failures.ReadTimeout), f"the server was silent for {READ_TIMEOUT_S:.0f} s"),
        ("resolve" in text or "getaddrinfo" in text, "the host name cannot be resolved"),
        ("refused" in text, "the connection was refused"),
        ("unreachable" in text, "there is no route to the server"),
    ):
        if found:
            return f"{words}\n{text}"
    return text
