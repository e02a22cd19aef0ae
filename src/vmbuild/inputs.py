"""What a build is given besides its context, read as `docker buildx build` reads it: values only, nothing of a guest.

Source: docker/buildx, util/buildflags and build/opt.go; moby/buildkit, session/secrets and session/sshforward.
"""

from __future__ import annotations

import csv
import io
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmbuild.address import HOST, is_remote, seen_from_guest
from vmbuild.errors import UsageError

MOST_SECRET_BYTES = 500 * 1024
"""What BuildKit takes as a secret (session/secrets, MaxSecretSize)."""

AGENT = "SSH_AUTH_SOCK"
CACHES = ("registry", "local", "inline")


@dataclass(frozen=True)
class Secret:
    """A secret by the name that the Dockerfile has for it. Its content is in no representation of it."""

    id: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class SshSource:
    """An SSH agent by the name that the Dockerfile has for it: a socket, else private keys, else SSH_AUTH_SOCK's.

    `paths` are absolute: one socket, or files with keys; none where the environment says which agent.
    """

    id: str
    paths: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The source as it is written on a command line."""
        return f"{self.id}={','.join(self.paths)}" if self.paths else self.id


@dataclass(frozen=True)
class NamedContext:
    """A build context with a name: a folder of the host, or an address that BuildKit knows what to do with.

    `before` and `after` is what goes around the folder's place in the guest (`oci-layout://`, `:tag`); without a folder
    `before` is the whole address.
    """

    name: str
    folder: str | None
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Cache:
    """Where a build cache comes from, or goes: its fields for BuildKit, and a folder of the host if it has one."""

    fields: tuple[tuple[str, str], ...]
    folder: str | None = None


@dataclass(frozen=True)
class Inputs:
    """What a build is given besides its context. `options` are words that buildx in the guest gets as they are."""

    secrets: tuple[Secret, ...] = ()
    ssh: tuple[SshSource, ...] = ()
    contexts: tuple[NamedContext, ...] = ()
    cache_from: tuple[Cache, ...] = ()
    cache_to: tuple[Cache, ...] = ()
    options: tuple[str, ...] = ()


def read_secret(text: str, environment: Mapping[str, str]) -> Secret:
    """Read a secret from where `id=ID[,src=FILE|,env=NAME][,type=file|env]` says. Raises UsageError.

    With an id alone, the environment has it by that name, else a file.
    """
    given = _fields(text, "--secret", {"id": "id", "source": "src", "src": "src", "env": "env", "type": "type"})
    kind, name = given.get("type", ""), given.get("id", "")
    if kind not in ("", "file", "env"):
        raise _wrong("--secret", text, f"a secret is of type file or env, not {kind}")
    if not name:
        raise _wrong("--secret", text, "it has no id")
    variable, path = given.get("env", ""), given.get("src", "")
    if kind == "env" and not variable:
        variable, path = path or name, ""
    if not variable and not path:
        variable, path = (name, "") if kind != "file" and name in environment else ("", name)
    if path:
        return Secret(name, _checked(name, _read(path, f"the secret {name}")))
    return Secret(name, _checked(name, environment.get(variable, "").encode(errors="surrogateescape")))


def _checked(name: str, content: bytes) -> bytes:
    if len(content) > MOST_SECRET_BYTES:
        raise UsageError(f"the secret {name} is larger than 500 KiB, the most that BuildKit takes")
    return content


def read_ssh(text: str, environment: Mapping[str, str]) -> SshSource:
    """Read `ID[=SOCKET|KEY[,KEY...]]`, an SSH agent or private keys. Raises UsageError for what is not there."""
    name, _, rest = text.partition("=")
    paths = tuple(str(Path(path).expanduser().absolute()) for path in rest.split(",") if path)
    if not paths and not environment.get(AGENT):
        raise UsageError(
            f"--ssh {text} means the SSH agent, and {AGENT} does not say where that is",
            resolution="Start one (`eval $(ssh-agent)`, `ssh-add`), or name a key: --ssh default=~/.ssh/id_ed25519.",
        )
    kinds = [_is_socket(path) for path in paths or (environment[AGENT],)]
    if any(kinds) and len(kinds) > 1:
        raise _wrong("--ssh", text, "one socket is an agent, several files are keys; both together are neither")
    if not paths and not all(kinds):
        raise UsageError(f"{AGENT} does not name a socket: {environment[AGENT]}")
    return SshSource(name or "default", paths)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError as error:
        raise UsageError(f"cannot use {path} for SSH: {error.strerror or error}") from error


def read_context(text: str) -> NamedContext:
    """Read `NAME=PATH|URL|docker-image://IMAGE|target:STAGE|oci-layout://PATH[:TAG][@DIGEST]`. Raises UsageError."""
    name, found, value = text.partition("=")
    if not found or not name or not value:
        raise _wrong("--build-context", text, "it is written NAME=VALUE")
    if re.search(r"[\s,]", name):
        raise _wrong("--build-context", text, "a name has no spaces and no commas")
    scheme, layout = "oci-layout://", value.removeprefix("oci-layout://")
    if value.startswith(scheme):
        path = re.split("[:@]", layout, maxsplit=1)[0]
        if not Path(path, "index.json").is_file():
            raise UsageError(f"{path} is no OCI layout: it has no index.json")
        return NamedContext(name, path, scheme, layout[len(path) :])
    if value.startswith(("docker-image://", "target:")) or is_remote(value):
        return NamedContext(name, None, seen_from_guest(value))
    if not Path(value).is_dir():
        raise UsageError(f"the build context {name} is not a folder: {value}")
    return NamedContext(name, value)


def read_cache_from(text: str) -> Cache:
    """Read where a cache comes from: `type=registry|local|inline...`, or an image's name alone. Raises UsageError."""
    return _read_cache("--cache-from", text, "src")


def read_cache_to(text: str) -> Cache:
    """Read where the cache goes: `type=registry|local|inline...`, or an image's name alone. Raises UsageError."""
    cache = _read_cache("--cache-to", text, "dest")
    if cache.folder is not None:
        _check_writable(Path(cache.folder))
    return cache


def _read_cache(option: str, text: str, place: str) -> Cache:
    words = _words(text, option)
    if len(words) == 1 and "=" not in words[0]:
        words = ["type=registry", f"ref={text}"]
    given = _fields_of(words, text, option)
    kind = given.get("type")
    if kind not in CACHES:
        raise _wrong(option, text, f"its type is one of {', '.join(CACHES)}" + (f", not {kind}" if kind else ""))
    if kind == "registry" and not given.get("ref"):
        raise _wrong(option, text, "a registry's cache has a ref, the image's name")
    if kind != "local":
        return Cache(tuple(given.items()))
    folder = given.pop(place, "")
    if not folder:
        raise _wrong(option, text, f"a local cache has {place}=FOLDER")
    return Cache(tuple(given.items()), folder)


def _check_writable(folder: Path) -> None:
    """See that a folder is there or can be made. Raises UsageError."""
    for path in (folder.absolute(), *folder.absolute().parents):
        if path.is_dir():
            return
        if path.exists() or path.is_symlink():
            raise UsageError(f"cannot write a cache to {folder}: {path} is no folder")


def read_hosts(texts: Sequence[str]) -> list[str]:
    """Read `HOST:ADDRESS` or `HOST=ADDRESS`, several with commas between; return HOST:ADDRESS. Raises UsageError."""
    found = []
    for text in (part for each in texts for part in each.split(",")):
        match = re.fullmatch(r"([^\s:=]+)[:=](\S+)", text)
        if match is None:
            raise _wrong("--add-host", text, "it is written HOST:ADDRESS")
        # What Docker means by that is the host that people work on, not the guest.
        address = HOST if match[2] == "host-gateway" else match[2]
        found.append(f"{match[1]}:{address}")
    return found


ULIMITS = {
    *("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio"),
    *("rttime", "sigpending", "stack"),
}
"""Source: docker/go-units, ulimit.go."""


def check_ulimit(text: str) -> str:
    """Return `NAME=SOFT[:HARD]` when it is that. Raises UsageError."""
    match = re.fullmatch(r"([a-z]+)=(-1|\d+)(?::(-1|\d+))?", text)
    if match is None or match[1] not in ULIMITS:
        raise _wrong(
            "--ulimit", text, f"it is written NAME=SOFT[:HARD], and NAME is one of {', '.join(sorted(ULIMITS))}"
        )
    soft, hard = int(match[2]), int(match[3] or match[2])
    if hard != -1 and (soft > hard or soft == -1):
        raise _wrong("--ulimit", text, "the soft limit is above the hard one")
    return text


def check_annotation(text: str) -> str:
    """Return `[TYPE[,TYPE]:]KEY=VALUE` when it is that. Raises UsageError."""
    key, found, _ = text.partition("=")
    kinds, _, name = key.rpartition(":")
    known = r"(index|manifest)(-descriptor)?(\[[\w/.-]+\])?"
    if not found or not name or (kinds and not all(re.fullmatch(known, kind) for kind in kinds.split(","))):
        raise _wrong("--annotation", text, "it is written [index|manifest[PLATFORM]|...-descriptor:]KEY=VALUE")
    return text


def write_fields(fields: Sequence[tuple[str, str]]) -> str:
    """Return fields as one value of an option, with quotes where they are needed."""
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow([f"{key}={value}" for key, value in fields])
    return out.getvalue()


def _fields(text: str, option: str, known: Mapping[str, str]) -> dict[str, str]:
    given = {}
    for key, value in _fields_of(_words(text, option), text, option).items():
        if key not in known:
            raise _wrong(option, text, f"{key} is none of its fields ({', '.join(known)})")
        given[known[key]] = value
    return given


def _fields_of(words: Sequence[str], text: str, option: str) -> dict[str, str]:
    given = {}
    for word in words:
        key, found, value = word.partition("=")
        if not found:
            raise _wrong(option, text, f"{word!r} is no KEY=VALUE")
        given[key.lower()] = value
    return given


def _words(text: str, option: str) -> list[str]:
    try:
        return next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        raise _wrong(option, text, str(error)) from error


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {what} from {path}: {error.strerror or error}") from error


def _wrong(option: str, text: str, why: str) -> UsageError:
    return UsageError(f"{option} {text}: {why}")
