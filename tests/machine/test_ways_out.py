"""Every way out of a real build: archives, folders, a registry, engines and a board; skopeo reads what comes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.machine import sshd
from tests.machine.conftest import BASE, Cli, Done
from tests.machine.registry import Registry, running

pytestmark = pytest.mark.machine

DOCKERFILE = f"""\
FROM {BASE}
COPY a.txt many /data/
RUN ln -s ../data/a.txt /srv/link; echo 1 >/data/one; ln /data/one /data/two; mkfifo /srv/pipe; chmod 4755 /data/f1
RUN rm /data/f2 /etc/issue; rm -r /srv; mkdir /srv; echo new >/srv/new; chown 1000:1000 /srv/new
"""
MIB = 1024 * 1024
SCANNER = """\
#!/bin/sh
# As BuildKit asks a scanner (moby/buildkit, docs/attestations/sbom-protocol.md).
cat >"$BUILDKIT_SCAN_DESTINATION/sbom.spdx.json" <<END
{"_type": "https://in-toto.io/Statement/v0.1", "predicateType": "https://spdx.dev/Document",
 "predicate": {"spdxVersion": "SPDX-2.3", "name": "$(ls "$BUILDKIT_SCAN_SOURCE")"}}
END
"""


@dataclass(frozen=True)
class Built:
    """What one build with many outputs left."""

    folder: Path
    done: Done
    registry: Registry

    @property
    def facts(self) -> dict[str, Any]:
        """The build's result, output by output."""
        return {each["kind"] + each["where"].rpartition("/")[2]: each for each in self.done.json()["outputs"]}


@pytest.fixture(scope="module")
def built(based: Cli, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    folder = tmp_path_factory.mktemp("ways")
    context = folder / "context"
    (context / "many").mkdir(parents=True)
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / "a.txt").write_text("hello\n")
    (context / "many" / "big").write_bytes(os.urandom(8 * MIB) + bytes(8 * MIB))
    for number in range(20):
        (context / "many" / f"f{number}").write_text(f"{number}\n" * number)
    with running(folder / "registry") as registry:
        done = based.ok(
            *("build", "context", "-t", f"{registry.host}/team/app:1", "-t", f"{registry.host}/team/app:2", "--json"),
            *("-o", "d.tar", "-o", "type=oci,dest=z.tar,compression=zstd", "-o", "type=oci,dest=layout,tar=false"),
            *("-o", "type=tar,dest=files.tar", "-o", "files/", "-o", "type=docker,dest=g.tar,compression=gzip"),
            *("--push", "--metadata-file", "meta.json", "--iidfile", "iid"),
            cwd=folder,
        )
        yield Built(folder, done, registry)


def skopeo(*words: str) -> Any:
    return json.loads(subprocess.check_output(["skopeo", "inspect", "--override-arch", "arm64", *words]))


def test_every_archive_is_the_same_container_image(built: Built) -> None:
    digest = json.loads((built.folder / "meta.json").read_text())["containerimage.digest"]
    assert (built.folder / "iid").read_text() == digest
    places = {
        "plain": f"docker-archive:{built.folder}/d.tar",
        "gzip": f"docker-archive:{built.folder}/g.tar",
        "zstd": f"oci-archive:{built.folder}/z.tar:1",
        "layout": f"oci:{built.folder}/layout:1",
    }
    configs = {name: skopeo("--config", place) for name, place in places.items()}
    configs["pushed"] = built.registry.inspect(f"team/app@{digest}", "--config")
    assert len({json.dumps(config, sort_keys=True) for config in configs.values()}) == 1
    assert len(configs["plain"]["rootfs"]["diff_ids"]) == 4
    for name, place in places.items():
        # a copy reads every layer, and compares it with its digest in the config
        subprocess.run(
            ["skopeo", "copy", "--quiet", "--insecure-policy", place, f"dir:{built.folder}/copy-{name}"], check=True
        )
    kinds = [each["mediaType"].rpartition("+")[2] for each in skopeo("--raw", places["zstd"])["layers"]]
    assert kinds[1:] == ["zstd"] * 3  # the base image's own layer stays as it is
    sizes = {name: (built.folder / name).stat().st_size for name in ("d.tar", "g.tar", "z.tar")}
    assert sizes["d.tar"] - 7 * MIB > max(sizes["g.tar"], sizes["z.tar"])


def test_a_push_is_pulled_again_by_its_digest(built: Built) -> None:
    digest = (built.folder / "iid").read_text()
    target = f"dir:{built.folder}/pulled"
    source = f"docker://{built.registry.host}/team/app@{digest}"
    argv = ["skopeo", "copy", "--quiet", "--insecure-policy", "--override-arch", "arm64", "--src-tls-verify=false"]
    subprocess.run([*argv, source, target], check=True)
    manifest = (built.folder / "pulled" / "manifest.json").read_bytes()
    assert f"sha256:{hashlib.sha256(manifest).hexdigest()}" == digest
    assert all("gzip" in each["mediaType"] for each in json.loads(manifest)["layers"])
    assert built.registry.inspect("team/app:1")["Digest"] == built.registry.inspect("team/app:2")["Digest"] == digest


def members(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return what a tar of a file system says of each entry."""
    with tarfile.open(path) as tar:
        found = {}
        for each in tar:
            link = each.linkname if each.issym() else ""
            size = tar.getmember(each.linkname).size if each.islnk() else each.size
            kind = tarfile.REGTYPE if each.islnk() else each.type
            mode = 0 if each.issym() else each.mode
            found[each.name.rstrip("/")] = (kind, mode, each.uid, each.gid, size, link)
        return found


def test_the_files_are_those_that_a_container_has(built: Built, based: Cli) -> None:
    """Docker in the guest flattens the same layers in its own way."""
    tag = f"{built.registry.host}/team/app:1"
    script = f"docker export $(docker create {tag} true)"
    (built.folder / "export.tar").write_bytes(based.ok("ssh", "--", "sh", "-c", script).out)
    ours, theirs = members(built.folder / "files.tar"), members(built.folder / "export.tar")
    mounted = {
        ".dockerenv",
        "dev",
        "etc/hostname",
        "etc/hosts",
        "etc/resolv.conf",
        "etc/mtab",
        "proc",
        "sys",
        "etc",
        "",
    }
    different = {
        name
        for name in ours.keys() | theirs.keys()
        if ours.get(name) != theirs.get(name) and name not in mounted and not name.startswith("dev/")
    }
    assert different == set()
    assert "data/f2" not in ours
    assert "srv/link" not in ours
    assert len(ours) > 3000


def test_a_folder_has_them_as_the_users(built: Built) -> None:
    files = built.folder / "files"
    assert (files / "data" / "one").samefile(files / "data" / "two")
    assert (files / "srv" / "new").read_text() == "new\n"
    assert (files / "srv" / "new").stat().st_uid == os.getuid()
    assert (files / "data" / "f1").stat().st_mode & 0o7777 == 0o755
    assert not (files / "etc" / "issue").exists()
    assert os.readlink(files / "bin") == "usr/bin"  # noqa: PTH115
    found = {str(path.relative_to(files)) for path in files.rglob("*")}
    assert found == {name for name in members(built.folder / "files.tar") if name}


def test_a_second_push_sends_nothing(built: Built, based: Cli) -> None:
    done = based.ok("build", "context", "-t", f"{built.registry.host}/team/app:3", "--push", "--json", cwd=built.folder)
    (pushed,) = done.json()["outputs"]
    assert (pushed["size_bytes"], pushed["digest"]) == (0, (built.folder / "iid").read_text())


def test_several_platforms_with_provenance(built: Built, based: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nARG TARGETARCH\nCOPY Dockerfile /$TARGETARCH\n")
    tag = f"{built.registry.host}/multi:1"
    done = based.ok(
        *("build", ".", "-t", tag, "--platform", "linux/arm64,linux/arm/v7", "--provenance", "mode=max", "--json"),
        *("--push", "-o", "type=oci,dest=m.tar", "-o", "out/", "-o", "d.tar"),
        cwd=tmp_path,
    )
    assert len(done.json()["outputs"]) == 4
    raw: dict[str, Any] = built.registry.inspect("multi:1", "--raw")
    platforms = [each["platform"]["architecture"] for each in raw["manifests"]]
    assert sorted(platforms) == ["arm", "arm64", "unknown", "unknown"]
    digests = [each["digest"] for each in raw["manifests"] if each["platform"]["architecture"] != "unknown"]
    for each in raw["manifests"]:
        if each["platform"]["architecture"] == "unknown":
            assert each["annotations"]["vnd.docker.reference.digest"] in digests
    argv = ["skopeo", "copy", "--all", "--quiet", "--insecure-policy", "--src-tls-verify=false"]
    digest = done.json()["image_id"]
    source = f"docker://{built.registry.host}/multi@{digest}"
    subprocess.run([*argv, source, f"dir:{tmp_path}/pulled"], check=True)
    subprocess.run([*argv[:-1], f"oci-archive:{tmp_path}/m.tar", f"dir:{tmp_path}/archived"], check=True)
    files = [path.read_bytes() for path in (tmp_path / "pulled").iterdir() if path.is_file()]
    documents = [json.loads(data) for data in files if data.startswith(b"{")]
    statements = [each for each in documents if "predicateType" in each]
    assert {each["subject"][0]["digest"]["sha256"] for each in statements} == {each[7:] for each in digests}
    assert sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file()) == ["arm", "arm64"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"linux_arm64", "linux_arm_v7"}


def test_an_sbom_is_what_its_scanner_found(built: Built, based: Cli, tmp_path: Path) -> None:
    (tmp_path / "scan").write_text(SCANNER)
    (tmp_path / "scan").chmod(0o755)
    (tmp_path / "Dockerfile").write_text(f'FROM {BASE}\nCOPY scan /\nCMD ["/scan"]\n')
    scanner, tag = f"{built.registry.host}/scanner:1", f"{built.registry.host}/scanned:1"
    based.ok("build", ".", "-t", scanner, "--push", cwd=tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY scan /only-this\n")
    argv = ("build", ".", "-t", tag, "--sbom", f"generator={scanner}", "--push", "-o", "type=oci,dest=s.tar")
    based.ok(*argv, cwd=tmp_path)
    raw: dict[str, Any] = built.registry.inspect("scanned:1", "--raw")
    about, attested = sorted(raw["manifests"], key=lambda each: each["platform"]["architecture"] == "unknown")
    assert attested["annotations"]["vnd.docker.reference.digest"] == about["digest"]
    archived = ["skopeo", "copy", "--all", "--quiet", "--insecure-policy", f"oci-archive:{tmp_path}/s.tar"]
    subprocess.run([*archived, f"dir:{tmp_path}/archived"], check=True)
    files = [path.read_bytes() for path in (tmp_path / "archived").iterdir()]
    (found,) = [json.loads(data) for data in files if data.startswith(b"{") and b'predicateType"' in data]
    assert (found["predicateType"], found["predicate"]["name"]) == ("https://spdx.dev/Document", "only-this")
    assert [each["digest"]["sha256"] for each in found["subject"]] == [about["digest"][7:]]


def test_who_may_not_push_is_told_at_once(based: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    with running(tmp_path / "registry", tls=True, login=("me", "secret-word")) as registry:
        argv = ("build", ".", "-t", f"{registry.host}/a:1", "--push", "-q")
        begun = time.monotonic()
        done = based.run(*argv, cwd=tmp_path, DOCKER_CONFIG=str(tmp_path))
        assert (done.code, time.monotonic() - begun < 10) == (8, True)
        assert "does not let you push there" in done.err
        helper = tmp_path / "docker-credential-test"
        helper.write_text('#!/bin/sh\necho \'{"Username":"me","Secret":"secret-word"}\'\n')
        helper.chmod(0o755)
        (tmp_path / "config.json").write_text(json.dumps({"credHelpers": {registry.host: "test"}}))
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = based.ok(*argv, cwd=tmp_path, DOCKER_CONFIG=str(tmp_path), PATH=path)
        assert registry.inspect(f"a@{done.out.decode().strip()}", "--override-arch", "arm64")["Architecture"] == "arm64"
        assert "secret-word" not in done.err + "".join(
            each.read_text(errors="replace") for each in based.state.rglob("*.json")
        )


def test_a_board_gets_it_though_the_line_breaks(built: Built, based: Cli, tmp_path: Path) -> None:
    with sshd.running(tmp_path / "board", "aarch64") as board:
        argv = ("build", "context", "-t", "app:1", "--load", board.url, "--json")
        board.breaks = [1 << 40, 1 << 40, 1 << 40, 20 * MIB]  # looked at, asked what it is, how far, cut
        done = based.ok(*argv, cwd=built.folder, PATH=board.path)
        config = skopeo("--config", f"docker-archive:{board.loaded}")
        assert config == skopeo("--config", f"docker-archive:{built.folder}/d.tar")
        assert board.breaks == []
        assert done.json()["outputs"][0]["where"] == board.url
        assert not [path for path in (board.folder / "home").rglob("*") if path.is_file()]
    with sshd.running(tmp_path / "old", "armv7l") as board:
        done = based.run(*argv[:-2], board.url, cwd=built.folder, PATH=board.path)
        assert done.code == 2
        assert "is armv7l, which does not run linux/arm64" in done.err


def test_an_engine_of_the_host_loads_it(built: Built, based: Cli, tmp_path: Path) -> None:
    program = tmp_path / "podman"
    program.write_text(f"#!/bin/sh\ncase $1 in load) cat >{tmp_path}/loaded.tar ;; esac\n")
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    based.ok("build", "context", "-t", "app:1", "--load=podman", cwd=built.folder, PATH=path)
    assert skopeo(f"docker-archive:{tmp_path}/loaded.tar")["Architecture"] == "arm64"


def test_a_cache_in_a_registry_serves_a_guest_that_has_none(built: Built, based: Cli, tmp_path: Path) -> None:
    """The last of this file: it empties the guest's own cache."""
    cache = f"type=registry,ref={built.registry.host}/team/cache:1"
    (tmp_path / "Dockerfile").write_text(f"FROM {BASE}\nRUN echo made $((6 * 7)) >/made && cat /made\n")
    argv = ("build", ".", "-t", "cached:1", "--progress", "plain")
    assert "made 42" in based.ok(*argv, "--cache-to", f"{cache},mode=max", cwd=tmp_path).err
    kept: dict[str, Any] = built.registry.inspect("team/cache:1", "--raw")
    assert "application/vnd.buildkit.cacheconfig.v0" in json.dumps(kept)
    based.guest("docker image rm cached:1; docker builder prune -af")
    again = based.ok(*argv, "--cache-from", cache, cwd=tmp_path)
    assert "made 42" not in again.err
    assert "CACHED" in again.err
