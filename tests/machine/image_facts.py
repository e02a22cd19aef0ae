"""What a container image is, whatever made it: its configuration, and the files that its layers come to."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

CONFIG = (
    *("User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Healthcheck", "Volumes", "WorkingDir", "Labels"),
    *("StopSignal", "OnBuild", "Shell"),
)


@dataclass
class Facts:
    """A container image of a docker archive, free of times and of who made it."""

    platform: tuple[str, str]
    config: dict[str, Any]
    files: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, archive: Path) -> Facts:
        """Read a docker archive, in which layers may be packed or links to each other."""
        with tarfile.open(archive) as tar:

            def data(name: str) -> bytes:
                file = tar.extractfile(name)
                assert file is not None, name
                return file.read()

            (entry,) = json.loads(data("manifest.json"))
            about = json.loads(data(entry["Config"]))
            found = {key: value for key in CONFIG if (value := about["config"].get(key))}
            found.setdefault("WorkingDir", "/")  # none is this one; of what is FROM scratch only BuildKit says so
            facts = cls((about["os"], about["architecture"]), found)
            for layer in entry["Layers"]:
                file = tar.extractfile(layer)
                assert file is not None, layer
                with tarfile.open(fileobj=file) as content:
                    facts._apply(content)
        return facts

    def _apply(self, layer: tarfile.TarFile) -> None:
        own: dict[str, tuple[Any, ...]] = {}
        for member in layer:
            path = PurePosixPath("/") / member.name
            if path.name == ".wh..wh..opq":
                self._remove(str(path.parent), itself=False)
            elif path.name.startswith(".wh."):
                self._remove(str(path.with_name(path.name.removeprefix(".wh."))), itself=True)
            elif member.islnk():
                target = str(PurePosixPath("/") / member.linkname)
                own[str(path)] = own.get(target) or self.files[target]
            else:
                if not member.isdir():
                    self._remove(str(path), itself=True)
                own[str(path)] = describe(layer, member)
        self.files.update(own)

    def _remove(self, path: str, *, itself: bool) -> None:
        below = path.rstrip("/") + "/"
        for each in [each for each in self.files if each.startswith(below) or (itself and each == path)]:
            del self.files[each]


def describe(layer: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[Any, ...]:
    """Return what counts of a file: its kind, mode and owners, and its content or where it leads."""
    known = (member.mode & 0o7777, member.uid, member.gid)
    if member.isfile():
        file = layer.extractfile(member)
        assert file is not None
        return ("file", *known, hashlib.sha256(file.read()).hexdigest())
    if member.issym():
        return ("link", member.linkname)
    return ("folder" if member.isdir() else "device", *known, (member.devmajor, member.devminor))
