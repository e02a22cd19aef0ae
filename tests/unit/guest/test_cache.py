"""A build cache on its way home: what is checked, what stays, and what a reader finds meanwhile."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.guest.drives import DriveSession, make_channel
from vmbuild.errors import GuestError, HostError
from vmbuild.guest import cache
from vmbuild.model import MIB
from vmbuild.report import SilentReporter


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_cache(folder: Path, *contents: bytes, name: str | None = "latest") -> Path:
    """Make what BuildKit leaves in the guest: blobs, the last of which the index names."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for data in contents:
        (blobs / digest(data)).write_bytes(data)
    entry: dict[str, Any] = {
        "mediaType": "x/index",
        "digest": f"sha256:{digest(contents[-1])}",
        "size": len(contents[-1]),
    }
    entry["annotations"] = {cache.NAME: name, "evil": "../../x"} if name else None
    (folder / "index.json").write_text(json.dumps({"manifests": [entry]}))
    return folder


@pytest.fixture(params=[64 * MIB, 0], ids=["over the drives", "over SSH"])
def bring(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    channel = make_channel(tmp_path / "drives", request.param)
    session = DriveSession(tmp_path / "drives")
    return lambda source, folder: cache.bring_home(session, str(source), folder, channel, SilentReporter())


def test_a_new_folder_has_all_of_it(bring: Any, tmp_path: Path) -> None:
    large = bytes(range(256)) * 10_000
    source = make_cache(tmp_path / "guest", large, b"", b"top")
    home = tmp_path / "not" / "there" / "yet"
    assert bring(source, home) == len(large) + 3
    assert {path.name: path.read_bytes() for path in (home / "blobs/sha256").iterdir()} == {
        digest(data): data for data in (large, b"", b"top")
    }
    assert json.loads((home / "index.json").read_text())["manifests"] == [
        {
            "mediaType": "x/index",
            "digest": f"sha256:{digest(b'top')}",
            "size": 3,
            "annotations": {cache.NAME: "latest"},
        }
    ]
    assert json.loads((home / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}


def test_what_is_there_stays_and_does_not_travel_again(bring: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    bring(make_cache(tmp_path / "first", b"shared", b"one", name="a"), home)
    assert bring(make_cache(tmp_path / "second", b"shared", b"two", name="b"), home) == 3
    assert bring(make_cache(tmp_path / "third", b"shared", b"three", name="a"), home) == 5
    entries = json.loads((home / "index.json").read_text())["manifests"]
    assert {each["annotations"][cache.NAME]: each["digest"].removeprefix("sha256:") for each in entries} == {
        "a": digest(b"three"),
        "b": digest(b"two"),
    }


def test_a_blob_that_is_damaged_never_gets_its_name(bring: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    bring(make_cache(tmp_path / "first", b"good"), home)
    before = (home / "index.json").read_bytes()
    source = make_cache(tmp_path / "guest", b"second", b"top")
    (source / "blobs" / "sha256" / digest(b"second")).write_bytes(b"secund")
    with pytest.raises(GuestError, match="other content"):
        bring(source, home)
    assert not (home / "blobs/sha256" / digest(b"second")).exists()
    assert (home / "index.json").read_bytes() == before
    assert [path for path in home.rglob("*.part")] == []


def test_what_is_no_cache_is_refused(bring: Any, tmp_path: Path) -> None:
    strange = make_cache(tmp_path / "strange", b"x")
    (strange / "blobs/sha256/passwd").write_bytes(b"x")
    with pytest.raises(GuestError, match="no blob"):
        bring(strange, tmp_path / "home")
    hollow = make_cache(tmp_path / "hollow", b"x", b"y")
    (hollow / "blobs/sha256" / digest(b"y")).unlink()
    with pytest.raises(GuestError, match="which it has not"):
        bring(hollow, tmp_path / "home")
    with pytest.raises(GuestError, match="cat failed"):
        bring(tmp_path / "nothing", tmp_path / "home")
    assert not (tmp_path / "home" / "index.json").exists()


def test_a_name_is_not_needed_and_nonsense_at_home_is_replaced(bring: Any, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "index.json").write_text("[")
    bring(make_cache(tmp_path / "guest", b"x", name=None), home)
    (entry,) = json.loads((home / "index.json").read_text())["manifests"]
    assert "annotations" not in entry


def test_a_place_that_cannot_be_written_is_the_host_s_fault(bring: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot write"):
        bring(make_cache(tmp_path / "guest", b"x"), tmp_path / "file" / "below")
