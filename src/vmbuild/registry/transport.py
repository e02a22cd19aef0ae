"""Requests to a container registry, and their failures in our words. The other importer of requests."""

from __future__ import annotations

import base64
import json
import re
import ssl
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode, urljoin, urlsplit

import requests
from requests import exceptions as failures
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from vmbuild.deadline import Deadline
from vmbuild.errors import DeliveryError
from vmbuild.registry.logins import DOCKER_HUB, Login
from vmbuild.trust import trusted_too

CERTIFICATES = Path("/etc/docker/certs.d")
"""Where Docker keeps certificates of its registries. Source: docker/cli, docs: "Verify repository client"."""

TIMEOUTS_S = (10.0, 300.0)
"""To connect, and of silence: a registry hashes a large layer before it answers."""

TRIES = 5
BACKOFF_S = 0.5
MOST_BYTES = 4 * 1024 * 1024
"""So long an answer of a registry may be: manifests end there, too (OCI distribution specification 1.1)."""

Body = Callable[[], bytes | IO[bytes]]


@dataclass(frozen=True)
class Answer:
    """What a registry answered. The names of headers are in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class Broken(Exception):
    """The connection broke, or the registry is too busy: worth another try."""


class Transport:
    """Connections to one registry (`HOST[:PORT]`), which log in when they are asked to."""

    def __init__(self, registry: str, login: Login | None, *, insecure: bool = False) -> None:
        self.registry = registry
        self._host = "registry-1.docker.io" if registry == DOCKER_HUB else registry
        self._login = login
        self._loose = insecure or is_loopback(registry)
        self._session = requests.Session()
        self._session.headers.update({"User-Agent": f"vmbuild/{version('vmbuild')}", "Accept-Encoding": "identity"})
        self._session.auth = _no_netrc
        self._session.mount("https://", _Adapter(_tls(registry, loose=self._loose)))
        self._tokens: dict[str, str] = {}
        self._scheme = "https"

    def close(self) -> None:
        """End the connections."""
        self._session.close()

    def ask(
        self,
        method: str,
        url: str,
        scope: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body = bytes,
        good: tuple[int, ...],
    ) -> Answer:
        """Ask, again when the connection breaks, and return the answer. Raises DeliveryError when it is not good."""
        wait = BACKOFF_S
        for attempt in range(TRIES):
            try:
                return self.ask_once(method, url, scope, headers=headers, body=body, good=good)
            except Broken as error:
                if attempt == TRIES - 1:
                    raise self.failed(str(error)) from error
            Deadline.after(wait).sleep(wait)
            wait *= 2
        raise AssertionError("the last try raises")

    def ask_once(
        self,
        method: str,
        url: str,
        scope: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body = bytes,
        good: tuple[int, ...],
    ) -> Answer:
        """Ask once, logging in if need be. Raises Broken or DeliveryError."""
        answer = self._send(method, url, self._own(url, scope, headers), body)
        if answer.status == requests.codes.unauthorized and self._is_ours(url):
            self._log_in(answer.headers.get("www-authenticate", ""), scope)
            answer = self._send(method, url, self._own(url, scope, headers), body)
        if answer.status >= 500 or answer.status == requests.codes.too_many_requests:
            raise Broken(_say(answer))
        if answer.status not in good:
            raise self.failed(_say(answer), answer.status)
        return answer

    def failed(self, details: str, status: int = 0) -> DeliveryError:
        """Return the error of a registry that does not take what it is given."""
        if status in (requests.codes.unauthorized, requests.codes.forbidden):
            return DeliveryError(
                f"{self.registry} does not let you push there",
                details=details,
                resolution=f"Log in (`docker login {self.registry}`), or push to a repository that is yours.",
            )
        return DeliveryError(f"{self.registry} did not take the container image", details=details)

    def _own(self, url: str, scope: str, headers: Mapping[str, str] | None) -> dict[str, str]:
        own = dict(headers or {})
        if scope in self._tokens and self._is_ours(url):
            own["Authorization"] = self._tokens[scope]
        return own

    def _is_ours(self, url: str) -> bool:
        """Tell whether a URL is the registry's own: an upload may go elsewhere, where nobody is to see the login."""
        return _origin(urljoin(f"{self._scheme}://{self._host}", url)) == _origin(f"{self._scheme}://{self._host}")

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: Body) -> Answer:
        try:
            return self._send_over(self._scheme, method, url, headers, body)
        except failures.SSLError as error:
            if not self._loose or self._scheme == "http":
                raise self.failed(f"no TLS connection came about\n{_without_query(error)}") from error
        except failures.ConnectionError as error:
            if not self._loose or self._scheme == "http":
                raise Broken(_without_query(error)) from error
        except failures.Timeout as error:
            raise Broken(_without_query(error)) from error
        except (failures.RequestException, OSError) as error:
            raise self.failed(_without_query(error)) from error
        self._scheme = "http"
        return self._send(method, url, headers, body)

    def _send_over(self, scheme: str, method: str, url: str, headers: Mapping[str, str], body: Body) -> Answer:
        whole = urljoin(f"{scheme}://{self._host}", url)
        data: Any = body() or None
        options: dict[str, Any] = {"stream": True, "timeout": TIMEOUTS_S, "allow_redirects": method == "GET"}
        with (
            _quiet_about_certificates(),
            self._session.request(method, whole, headers=headers, data=data, **options) as response,
        ):
            names = {name.lower(): value for name, value in response.headers.items()}
            if "location" in names:
                names["location"] = urljoin(response.url, names["location"])
            return Answer(response.status_code, names, response.raw.read(MOST_BYTES), response.url)

    def _log_in(self, challenge: str, scope: str) -> None:
        """Answer a registry's challenge, by Basic or by a token. Raises DeliveryError or Broken."""
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic":
            if self._login is None:
                raise self.failed("it wants a login", requests.codes.unauthorized)
            self._tokens[scope] = _basic(self._login)
        elif kind.lower() == "bearer":
            fields = dict(_CHALLENGE.findall(rest))
            self._tokens[scope] = f"Bearer {self._fetch_token(fields, scope)}"
        else:
            raise self.failed(f"it wants a login of a kind that vmbuild does not know: {kind!r:.40}")

    def _fetch_token(self, fields: Mapping[str, str], scope: str) -> str:
        """Ask the server that a registry names for a token, as docker does. Raises DeliveryError or Broken."""
        realm = fields.get("realm", "")
        if urlsplit(realm).scheme not in (("https", "http") if self._loose else ("https",)):
            raise self.failed("it sends for its tokens to an address that is not protected by TLS")
        asked = {"service": fields.get("service", ""), "scope": scope}
        headers = {}
        if self._login and self._login.identity_token:
            asked |= {
                "grant_type": "refresh_token",
                "refresh_token": self._login.identity_token,
                "client_id": "vmbuild",
            }
            form = urlencode(asked).encode()
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            answer = self._send("POST", realm, headers, lambda: form)
        else:
            if self._login:
                headers["Authorization"] = _basic(self._login)
            pairs = [("service", asked["service"]), *(("scope", each) for each in scope.split(" "))]
            answer = self._send("GET", f"{realm}{'&' if '?' in realm else '?'}{urlencode(pairs)}", headers, bytes)
        return self._read_token(answer)

    def _read_token(self, answer: Answer) -> str:
        if answer.status != requests.codes.ok:
            raise self.failed(_say(answer), answer.status)
        try:
            found = json.loads(answer.body)
            return str(found.get("token") or found["access_token"])
        except (ValueError, KeyError, AttributeError) as error:
            raise self.failed("its server of tokens gives none") from error


_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


class _Adapter(requests.adapters.HTTPAdapter):
    """Connections with certificates of our own choice beside those of requests."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options, ssl_context=self._context)

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        return super().proxy_manager_for(*args, **options, ssl_context=self._context)

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        if self._context.verify_mode is ssl.CERT_NONE:
            conn.cert_reqs, conn.assert_hostname = "CERT_NONE", False
        else:
            super().cert_verify(conn, url, verify, cert)  # type: ignore[no-untyped-call]


def _tls(registry: str, *, loose: bool) -> ssl.SSLContext:
    """Return what TLS goes by: certificates of the host, of requests, of the settings, and Docker's of a registry."""
    context = ssl.create_default_context()
    context.load_verify_locations(DEFAULT_CA_BUNDLE_PATH)
    if pem := trusted_too():
        context.load_verify_locations(cadata=pem)
    for path in sorted((CERTIFICATES / registry).glob("*.crt")):
        context.load_verify_locations(path)
    if loose:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@contextmanager
def _quiet_about_certificates() -> Iterator[None]:
    """Keep urllib3 from warning, request for request, of what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unverified HTTPS request")
        yield


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Leave a request as it is: without an `auth`, requests would look into ~/.netrc."""
    return request


def _basic(login: Login) -> str:
    return "Basic " + base64.b64encode(f"{login.user}:{login.password}".encode()).decode()


def _origin(url: str) -> tuple[str, str | None, int | None]:
    found = urlsplit(url)
    return found.scheme, found.hostname, found.port or {"https": 443, "http": 80}.get(found.scheme)


def _without_query(error: Exception) -> str:
    """Return what a library says of a failure without the query of a URL, which may be a secret."""
    return re.sub(r"\?[^\s'\")]*", "", str(error))


def _say(answer: Answer) -> str:
    text = answer.body.decode(errors="replace").strip()
    return f"{urlsplit(answer.url).path}: status {answer.status}\n{text[:500]}".strip()


def is_loopback(registry: str) -> bool:
    """Tell whether a registry is on this host, where Docker too asks for no certificate (moby, registry/config.go)."""
    host = registry.rpartition(":")[0] if registry.rpartition(":")[2].isdigit() else registry
    return host in ("localhost", "[::1]") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


@contextmanager
def connected(registry: str, login: Login | None, *, insecure: bool) -> Iterator[Transport]:
    """Yield connections to a registry."""
    transport = Transport(registry, login, insecure=insecure)
    try:
        yield transport
    finally:
        transport.close()
