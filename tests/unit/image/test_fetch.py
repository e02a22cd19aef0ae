"""Downloads: whole and verified or not at all, and never the same byte twice without need."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import requests

from tests.unit.image.conftest import (
    Behaviour,
    Site,
    close_delimited,
    drop_after,
    hang_after,
    send,
    status,
    without_ranges,
)
from tests.unit.listener import Listener
from vmbuild.errors import GuestImageError, HostError
from vmbuild.image import fetch as fetch_module
from vmbuild.image import http, tries
from vmbuild.image.fetch import Download, NotFound, Unreachable, WrongDigest, fetch_all, fetch_bytes
from vmbuild.report import SilentReporter

BODY = random.Random(1).randbytes(600_000)
PATH = "/pool/file.deb"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wanted(site: Site, folder: Path, *, path: str = PATH, body: bytes = BODY) -> Download:
    site.files.setdefault(path, body)
    return Download(site.url + path, folder / "ab" / path.rpartition("/")[2], sha256(body), len(body))


def part_of(download: Download) -> Path:
    return download.path.with_name(download.path.name + ".part")


def fetch(*downloads: Download, listener: Listener | None = None) -> None:
    fetch_all(downloads, listener or SilentReporter(), label="download")


def assert_whole(download: Download, body: bytes = BODY) -> None:
    assert download.path.read_bytes() == body
    assert [path.name for path in download.path.parent.iterdir()] == [download.path.name], "nothing else is left"


def test_a_file_is_fetched_and_measured_and_not_fetched_again(site: Site, tmp_path: Path, listener: Listener) -> None:
    download = wanted(site, tmp_path)
    fetch(download, listener=listener)
    assert_whole(download)
    assert listener.meters == [("download", len(BODY))]
    assert listener.advanced == len(BODY)
    fetch(download, listener=listener)
    assert len(site.requests) == 1
    assert len(listener.meters) == 1


@pytest.mark.parametrize(
    ("behaviours", "asked"),
    [
        ([drop_after(200_000)], 2),
        ([drop_after(200_000), drop_after(200_000)], 3),
        ([drop_after(0), status(503), status(429), status(500)], 5),
        ([close_delimited(300_000)], 2),
        ([drop_after(150_000), status(416)], 3),
        ([send(b"wrong")], 2),
        ([send(BODY + b"more")], 2),
        ([send(BODY[:-1])], 2),
        ([drop_after(150_000), send(BODY)], 2),
        ([*[drop_after(140_000)] * 4, status(503)], 6),
    ],
)
def test_a_bad_server_is_asked_again(
    site: Site, tmp_path: Path, listener: Listener, behaviours: list[Behaviour], asked: int
) -> None:
    download = wanted(site, tmp_path)
    site.behaviours[PATH] = list(behaviours)
    fetch(download, listener=listener)
    assert_whole(download)
    assert len(site.requests) == asked
    assert listener.advanced == len(BODY), "what came twice is measured once"


def test_a_dropped_connection_is_resumed_not_restarted(site: Site, tmp_path: Path) -> None:
    download = wanted(site, tmp_path)
    site.behaviours[PATH] = [drop_after(400_000)]
    fetch(download)
    assert_whole(download)
    first, second = site.asked(PATH)
    assert (first, second.startswith("bytes=")) == ("", True)
    assert site.served_bytes < len(BODY) + http.CHUNK_BYTES


def test_a_part_of_an_earlier_run_is_resumed(site: Site, tmp_path: Path, listener: Listener) -> None:
    download = wanted(site, tmp_path)
    part_of(download).parent.mkdir()
    part_of(download).write_bytes(BODY[:500_000])
    fetch(download, listener=listener)
    assert_whole(download)
    assert site.asked(PATH) == ["bytes=500000-"]
    assert site.served_bytes == 100_000
    assert listener.advanced == len(BODY)


@pytest.mark.parametrize("length", [0, 1, len(BODY) - 1, len(BODY), len(BODY) + 1])
@pytest.mark.parametrize("good", [True, False])
def test_any_part_leads_to_the_right_file(site: Site, tmp_path: Path, length: int, good: bool) -> None:
    download = wanted(site, tmp_path)
    part_of(download).parent.mkdir()
    part_of(download).write_bytes((BODY + b"x")[:length] if good else b"x" * length)
    fetch(download)
    assert_whole(download)


def test_a_whole_part_needs_no_server(site: Site, tmp_path: Path) -> None:
    download = wanted(site, tmp_path)
    part_of(download).parent.mkdir()
    part_of(download).write_bytes(BODY)
    fetch(download)
    assert site.requests == []


def test_random_misbehaviour_never_yields_a_wrong_file(site: Site, tmp_path: Path) -> None:
    dice = random.Random(7)
    for number in range(40):
        path = f"/random/{number}"
        download = wanted(site, tmp_path, path=path)
        choices: Sequence[Behaviour] = (
            drop_after(dice.randrange(len(BODY))),
            close_delimited(dice.randrange(len(BODY))),
            without_ranges,
            status(dice.choice([416, 429, 500, 502, 503])),
        )
        site.behaviours[path] = [dice.choice(choices) for _ in range(dice.randrange(4))]
        fetch(download)
        assert download.path.read_bytes() == BODY


def test_a_server_without_ranges_is_read_from_the_start(site: Site, tmp_path: Path) -> None:
    download = wanted(site, tmp_path)
    site.default = without_ranges
    part_of(download).parent.mkdir()
    part_of(download).write_bytes(b"z" * 1000)
    fetch(download)
    assert_whole(download)
    assert len(site.requests) == 1


def test_without_a_digest_nothing_is_glued_together(site: Site, tmp_path: Path) -> None:
    site.files[PATH] = BODY
    download = Download(site.url + PATH, tmp_path / "file", None, None)
    part_of(download).write_bytes(b"another version")
    fetch(download)
    assert_whole(download)
    assert site.asked(PATH) == [""]


def test_a_wrong_digest_is_tried_twice_and_told(site: Site, tmp_path: Path) -> None:
    download = wanted(site, tmp_path)
    site.default = send(b"w" * len(BODY))
    with pytest.raises(WrongDigest) as caught:
        fetch(download)
    assert len(site.requests) == 2
    assert sha256(BODY) in caught.value.details and sha256(b"w" * len(BODY)) in caught.value.details
    assert "VMBUILD_MIRROR" in caught.value.resolution
    assert not download.path.exists() and not part_of(download).exists()


@pytest.mark.parametrize("rotten", [b"rotten", b"r" * len(BODY)])
def test_a_wrong_file_in_place_is_replaced(site: Site, tmp_path: Path, rotten: bytes) -> None:
    download = wanted(site, tmp_path)
    download.path.parent.mkdir()
    download.path.write_bytes(rotten)
    fetch(download)
    assert_whole(download)


def test_404_is_told_at_once(site: Site, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="/none"):
        fetch(Download(f"{site.url}/none.deb", tmp_path / "none", sha256(b""), 0), wanted(site, tmp_path))
    assert site.asked("/none.deb") == [""]


def test_403_and_endless_503_are_unreachable(site: Site, tmp_path: Path) -> None:
    download = wanted(site, tmp_path)
    for code, asked in ((403, 1), (503, tries.TRIES)):
        site.requests.clear()
        site.default = status(code)
        with pytest.raises(Unreachable) as caught:
            fetch(download)
        assert str(code) in caught.value.details
        assert len(site.requests) == asked


def test_no_network_speaks_of_proxies_and_the_mirror(tmp_path: Path) -> None:
    with pytest.raises(Unreachable) as caught:
        fetch(Download("http://127.0.0.1:1/file", tmp_path / "file", None, None))
    assert "http://127.0.0.1:1/file" in caught.value.brief
    assert caught.value.details.startswith("the connection was refused")
    assert "http_proxy" in caught.value.resolution and "VMBUILD_MIRROR" in caught.value.resolution


def test_a_dead_proxy_and_a_nonsense_url_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GuestImageError):
        fetch_bytes("nonsense")
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(Unreachable) as caught:
        fetch_bytes("http://debian.invalid/file")
    assert "proxy" in caught.value.details


@pytest.mark.parametrize(
    ("said", "asked", "words"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", 1, "certificate is not trusted"),
        ("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol", tries.TRIES, "EOF occurred"),
    ],
)
def test_only_a_certificate_that_is_not_trusted_is_final(
    monkeypatch: pytest.MonkeyPatch, said: str, asked: int, words: str
) -> None:
    calls: list[str] = []

    def get(_: object, url: str, **options: object) -> object:
        calls.append(url)
        raise requests.exceptions.SSLError(f"Max retries exceeded (Caused by SSLError({said}))")

    monkeypatch.setattr(http.Session, "get", get)
    with pytest.raises(Unreachable) as caught:
        fetch_bytes("https://debian.invalid/file")
    assert len(calls) == asked
    assert words in caught.value.details


def test_a_handshake_with_what_speaks_no_tls_is_tried_again(site: Site) -> None:
    with pytest.raises(Unreachable) as caught:
        fetch_bytes(site.url.replace("http:", "https:"))
    assert "no TLS connection" in caught.value.details


def test_a_proxy_of_the_environment_is_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", site.url)
    site.files["http://debian.invalid/file"] = b"through the proxy"
    assert fetch_bytes("http://debian.invalid/file") == b"through the proxy"


def test_a_full_disk_is_told_and_keeps_the_part(site: Site, tmp_path: Path) -> None:
    download = wanted(site, tmp_path)
    part_of(download).parent.mkdir()
    part_of(download).symlink_to("/dev/full")
    with pytest.raises(HostError) as caught:
        fetch(download)
    assert "disk is full" in caught.value.brief and str(download.path) in caught.value.brief
    assert "585.9 KiB" in caught.value.details
    assert part_of(download).is_symlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(site: Site, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(HostError, match="cannot write"):
        fetch(wanted(site, tmp_path))


def test_many_files_are_fetched_at_the_same_time(site: Site, tmp_path: Path, listener: Listener) -> None:
    bodies = {f"/many/{number}": random.Random(number).randbytes(number * 1000) for number in range(50)}
    gate = threading.Barrier(6, timeout=10)

    def meet(path: str) -> Behaviour:
        def behave(answer: object) -> None:
            gate.wait()
            site.default(answer)  # type: ignore[arg-type]

        return behave

    downloads = [wanted(site, tmp_path, path=path, body=body) for path, body in bodies.items()]
    for download in downloads[:6]:
        path = download.url.removeprefix(site.url)
        site.behaviours[path] = [meet(path)]
    fetch_all([*downloads, *downloads], listener, label="download", workers=6)
    for download, body in zip(downloads, bodies.values(), strict=True):
        assert download.path.read_bytes() == body
    assert len(site.requests) == len(bodies)
    assert listener.advanced == sum(map(len, bodies.values()))


def _fetch_in_a_process(download: Download) -> None:
    fetch_all([download], SilentReporter(), label="download")


def test_two_processes_fetch_a_file_once(site: Site, tmp_path: Path) -> None:
    download = wanted(site, tmp_path)
    fork = multiprocessing.get_context("spawn")
    processes = [fork.Process(target=_fetch_in_a_process, args=(download,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert_whole(download)
    assert len(site.requests) == 1


def test_an_interrupt_ends_at_once_and_the_next_run_resumes(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "STOP_GRACE_S", 0.1)
    download = wanted(site, tmp_path)
    site.behaviours[PATH] = [hang_after(300_000)]
    part = part_of(download)

    def interrupt() -> None:
        while not part.exists() or part.stat().st_size < http.CHUNK_BYTES:
            time.sleep(0.01)
        interrupted.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    interrupted: list[float] = []
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        fetch(download)
    assert time.monotonic() - interrupted[0] < 10, "not the 30 s of a read's limit"
    kept = part.stat().st_size
    assert kept >= http.CHUNK_BYTES and not download.path.exists()
    site.released.set()  # in a real run the process, and with it the stuck worker and its lock, is gone by now
    before = site.served_bytes
    fetch(download)
    assert_whole(download)
    start = int(site.asked(PATH)[1].removeprefix("bytes=").removesuffix("-"))
    assert start >= kept
    limit = time.monotonic() + 10
    while site.served_bytes - before < len(BODY) - start and time.monotonic() < limit:
        time.sleep(0.01)  # the server counts what it has sent, which may have arrived by then
    assert site.served_bytes - before == len(BODY) - start


def test_a_failure_stops_the_other_downloads(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "STOP_GRACE_S", 0.1)
    slow = wanted(site, tmp_path)
    site.behaviours[PATH] = [hang_after(200_000)]
    started = time.monotonic()
    with pytest.raises(NotFound):
        fetch(slow, Download(f"{site.url}/none", tmp_path / "none", None, None))
    assert time.monotonic() - started < 10, "not the 30 s of a read's limit"
    assert not slow.path.exists()


def test_fetch_bytes(site: Site) -> None:
    site.files["/small"] = b"small"
    site.behaviours["/small"] = [status(503), drop_after(2)]
    assert fetch_bytes(f"{site.url}/small") == b"small"
    with pytest.raises(NotFound):
        fetch_bytes(f"{site.url}/none")
    with pytest.raises(GuestImageError, match="larger than 4 B"):
        fetch_bytes(f"{site.url}/small", limit_bytes=4)


def test_vmbuild_says_who_it_is(site: Site) -> None:
    seen: list[str] = []
    site.default = lambda answer: (seen.append(answer.headers["User-Agent"]), answer.reply(200))[1]  # type: ignore[func-returns-value]
    fetch_bytes(f"{site.url}/any")
    assert seen[0].startswith("vmbuild/") and requests.__name__ not in seen[0]
