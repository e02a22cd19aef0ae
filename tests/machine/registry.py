"""A real registry on the host's loopback: Debian's `docker-registry`, plain or with TLS, open or with a login."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import shutil
import ssl
import subprocess
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import bcrypt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CONFIG = """\
version: 0.1
log:
  accesslog: {{disabled: false}}
  level: info
storage:
  filesystem: {{rootdirectory: {storage}}}
  delete: {{enabled: true}}
http:
  addr: 127.0.0.1:0
{more}"""


@dataclass(frozen=True)
class Registry:
    """A registry that runs. `authority` is the PEM file of the CA that signed its certificate, None without TLS.

    `login` is user and password, None where anybody may read and write.
    """

    port: int
    folder: Path
    authority: Path | None = None
    login: tuple[str, str] | None = None

    @property
    def host(self) -> str:
        """Its name in references: `localhost:PORT`, for which Docker takes plain HTTP too."""
        return f"localhost:{self.port}"

    @property
    def url(self) -> str:
        """Its address."""
        return f"{'https' if self.authority else 'http'}://{self.host}"

    def copy_in(self, source: str, repository: str, *options: str) -> str:
        """Copy a container image in with skopeo, as `docker-archive:FILE` say; return its digest."""
        creds = ["--dest-creds", ":".join(self.login)] if self.login else []
        digest = self.folder / "digest"
        target = f"docker://{self.host}/{repository}"
        argv = ["skopeo", "copy", "--quiet", "--insecure-policy", "--digestfile", str(digest), *options]
        _run([*argv, *self._tls("dest"), *creds, source, target])
        return digest.read_text()

    def inspect(self, reference: str, *options: str) -> dict[str, object]:
        """Return what skopeo tells of an image here: `repository:tag` or `repository@digest`."""
        creds = ["--creds", ":".join(self.login)] if self.login else []
        argv = ["skopeo", "inspect", *options, *self._tls(""), *creds, f"docker://{self.host}/{reference}"]
        found: dict[str, object] = json.loads(_run(argv))
        return found

    def repositories(self) -> list[str]:
        """Return the names of the repositories in it."""
        found: list[str] = json.loads(self._get("/v2/_catalog"))["repositories"]
        return found

    def log(self) -> str:
        """Return what it wrote: a line for each request."""
        return (self.folder / "log").read_text(errors="replace")

    def _tls(self, prefix: str) -> list[str]:
        dash = f"{prefix}-" if prefix else ""
        if self.authority is None:
            return [f"--{dash}tls-verify=false"]
        folder = self.folder / "trusted"
        folder.mkdir(exist_ok=True)
        shutil.copy(self.authority, folder / "ca.crt")
        return [f"--{dash}cert-dir", str(folder)]

    def _get(self, path: str) -> str:
        request = urllib.request.Request(self.url + path)  # noqa: S310 - it is http or https
        if self.login:
            request.add_header("Authorization", f"Basic {b64encode(':'.join(self.login).encode()).decode()}")
        context = ssl.create_default_context(cafile=str(self.authority)) if self.authority else None
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(request, timeout=10) as answer:
            return str(answer.read().decode())


@contextmanager
def running(
    folder: Path, *, tls: bool = False, login: tuple[str, str] | None = None, names: tuple[str, ...] = ()
) -> Iterator[Registry]:
    """Run a registry that keeps all in `folder`, on a port of its own, until the block is left.

    With `tls` its certificate is for `localhost`, 127.0.0.1, the host as guests see it, and `names`, signed by a CA
    made for it alone.
    """
    assert shutil.which("docker-registry"), "the tests need Debian's package docker-registry"
    folder.mkdir(parents=True, exist_ok=True)
    authority = make_authority(folder, names) if tls else None
    more = ""
    if tls:
        more += f"  tls: {{certificate: {folder / 'server.pem'}, key: {folder / 'server.key'}}}\n"
    if login:
        hashed = bcrypt.hashpw(login[1].encode(), bcrypt.gensalt(4, b"2a")).decode()
        (folder / "htpasswd").write_text(f"{login[0]}:{hashed}\n")
        more += f"auth:\n  htpasswd: {{realm: test, path: {folder / 'htpasswd'}}}\n"
    config = folder / "config.yml"
    config.write_text(CONFIG.format(storage=folder / "storage", more=more))
    with (folder / "log").open("wb") as log:
        program = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        yield Registry(_wait_port(folder / "log", program), folder, authority, login)
    finally:
        program.terminate()
        program.wait(20)


def make_authority(folder: Path, names: tuple[str, ...] = ()) -> Path:
    """Make a CA (`ca.pem`) and a server's certificate of it (`server.pem`, `server.key`); return the CA's file."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Test CA {folder.name}")])
    ca = _certificate(ca_name, ca_key, ca_name, ca_key, [x509.BasicConstraints(ca=True, path_length=0)])
    addresses = [x509.IPAddress(ipaddress.ip_address(each)) for each in ("127.0.0.1", "10.0.2.2")]
    alternatives = x509.SubjectAlternativeName([*map(x509.DNSName, ("localhost", *names)), *addresses])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    server = _certificate(name, key, ca_name, ca_key, [alternatives])
    (folder / "ca.pem").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    return folder / "ca.pem"


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    extensions: list[x509.ExtensionType],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    day = datetime.timedelta(days=1)
    builder = builder.not_valid_before(now - day).not_valid_after(now + 30 * day)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    return builder.sign(signer, hashes.SHA256())


def _wait_port(log: Path, program: subprocess.Popen[bytes]) -> int:
    """Return the port that it says it listens on: connections are taken from then on."""
    for _ in range(200):
        if found := re.search(r"listening on 127\.0\.0\.1:(\d+)", log.read_text(errors="replace")):
            return int(found[1])
        assert program.poll() is None, f"the registry ended\n{log.read_text(errors='replace')}"
        time.sleep(0.1)
    raise AssertionError(f"the registry does not listen\n{log.read_text(errors='replace')}")


def _run(argv: list[str]) -> bytes:
    done = subprocess.run(argv, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout
