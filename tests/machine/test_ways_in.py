"""What a real build is given: secrets, agents, contexts from everywhere, caches; and what is left of it afterwards."""

from __future__ import annotations

import base64
import getpass
import json
import re
import secrets
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from tests.machine.conftest import BASE, Cli, wait_until
from tests.machine.sources import make_repository, served
from tests.unit.guest.server import Guest

pytestmark = pytest.mark.machine

HELD = "find /run/vmbuild/held -type f -o -type s"

# Debian's slim image has no SSH, but perl: list the agent's keys, have something signed, try to remove the keys.
ASK_AGENT = r"""
use Socket;
socket(my $agent, AF_UNIX, SOCK_STREAM, 0);
connect($agent, pack_sockaddr_un($ENV{SSH_AUTH_SOCK})) or die "$!\n";
sub ask {
    syswrite($agent, pack('N/a', $_[0]));
    sysread($agent, my $size, 4);
    sysread($agent, my $answer, unpack('N', $size));
    return $answer;
}
my (undef, $count, $key) = unpack('C N N/a', ask("\x0b"));
my $signature = ask("\x0d" . pack('N/a N/a N', $key, 'to be signed', 0));
print "count=$count key=", unpack('H*', $key), " signature=", unpack('H*', $signature), "\n";
print "remove=", unpack('H*', ask("\x13")), "\n";
"""


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "ask.pl").write_text(ASK_AGENT)
    return folder


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


def write(folder: Path, *lines: str) -> None:
    (folder / "Dockerfile").write_text("\n".join((f"FROM {BASE}", *lines, "")))


def test_all_at_once_and_nothing_left(based: Cli, context: Path, key: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for name in ("kept", "left"):
        (more / name).write_text(name)
    (more / ".dockerignore").write_text("left\n")
    write(
        context,
        "RUN --mount=type=secret,id=file --mount=type=secret,id=env --mount=type=ssh \\",
        "    --mount=type=bind,target=/c --mount=from=more,target=/m <<END",
        "echo file=$(tac -rs . /run/secrets/file) env=$(tac -rs . /run/secrets/env)",
        "stat -c mode=%a /run/secrets/file",
        "grep -E 'named|gateway' /etc/hosts; df -k /dev/shm | tail -n 1; echo limit=$(ulimit -n)",
        "echo named context: $(ls -A /m)",
        "perl /c/ask.pl",
        "END",
        "COPY <<END /inline",
        "by $WHO",
        "END",
    )
    words = {"file": secrets.token_hex(16), "env": secrets.token_hex(16)}
    (tmp_path / "token").write_text(words["file"])
    arguments = (
        *("build", str(context), "-t", "given:1", "--progress", "plain", "--build-context", f"more={more}"),
        *("--secret", f"id=file,src={tmp_path}/token", "--secret", "id=env,env=SECRET_ENV", "--ssh", f"default={key}"),
        *("--add-host", "named:192.0.2.7", "--add-host", "gateway:host-gateway", "--shm-size", "32m"),
        *("--ulimit", "nofile=321:654"),
    )
    cache = tmp_path / "cache"
    done = based.ok(*arguments, "--cache-to", f"type=local,dest={cache},mode=max", SECRET_ENV=words["env"])
    assert f"file={words['file'][::-1]} env={words['env'][::-1]}" in done.err
    assert "mode=400" in done.err
    assert re.search(r"192\.0\.2\.7\s+named", done.err)
    assert re.search(r"10\.0\.2\.2\s+gateway", done.err)
    assert re.search(r"tmpfs\s+32768 .*/dev/shm", done.err)
    assert "limit=321" in done.err
    assert "named context: .dockerignore kept\n" in done.err
    check_signature(done.err, key)

    assert based.guest(HELD) == ""
    assert_nowhere(based, list(words.values()), but="given:1")

    # As on another host: nothing is known here any more but what the cache has.
    based.guest("docker image rm given:1; docker builder prune -af")
    again = based.ok(*arguments, "--cache-from", f"type=local,src={cache}", SECRET_ENV=words["env"])
    assert again.err.count("CACHED") >= 2
    assert "signature=" not in again.err


def check_signature(output: str, key: Path) -> None:
    """See that the agent's answers are those of this key, and that the key is still there."""
    found = re.search(r"count=(\d) key=(\w+) signature=0e(\w+)", output)
    assert found is not None
    public = key.with_suffix(".pub").read_text().split()
    assert (found[1], bytes.fromhex(found[2])) == ("1", base64.b64decode(public[1]))
    loaded = load_ssh_public_key(" ".join(public[:2]).encode())
    assert isinstance(loaded, Ed25519PublicKey)
    loaded.verify(bytes.fromhex(found[3])[-64:], b"to be signed")
    assert "remove=05" in output


def assert_nowhere(program: Cli, words: list[str], *, but: str) -> None:
    """See that these words are in no file of the state folder: not on the machine's disk, in no log and no record.

    `but` is one that is on the disk, to see that this would find them.
    """
    program.guest("sync")
    for word in words:
        found = subprocess.run(["grep", "-rlF", word, str(program.state)], capture_output=True, text=True, check=False)
        assert found.stdout == ""
    assert subprocess.run(["grep", "-rqF", but, str(program.state)], check=False).returncode == 0


def test_contexts_from_elsewhere(based: Cli, tmp_path: Path) -> None:
    served_files = tmp_path / "served"
    served_files.mkdir()
    dockerfile = f"FROM {BASE}\nCOPY --from=git f /git\nCOPY --from=file word /\nCOPY m /\nRUN cat /git /word /m\n"
    make_repository(served_files / "main.git", {"m": "from-ssh\n", "sub/Dockerfile": dockerfile, "sub/m": "in-sub\n"})
    make_repository(served_files / "other.git", {"f": "from-git\n"})
    (served_files / "word").write_text("from-file\n")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\nLABEL from=tarball\n")
    with tarfile.open(served_files / "t.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "Dockerfile", "Dockerfile")
    peer = Guest(make_folder(tmp_path / "ssh"))
    address = f"ssh://{getpass.getuser()}@127.0.0.1:{peer.listener.getsockname()[1]}{served_files}/main.git#main:sub"
    with served(served_files) as url:
        done = based.ok(
            *("build", address, "--ssh", f"default={tmp_path}/ssh/client", "--progress", "plain"),
            *("--build-context", f"git={url}/other.git", "--build-context", f"file={url}/word"),
        )
        based.ok("build", f"{url}/t.tar.gz", "-t", "tarball:1")
    assert "tarball" in based.guest("docker image inspect tarball:1")
    for line in ("from-git", "from-file", "in-sub"):
        assert re.search(rf"^#\d+ [\d.]+ {line}$", done.err, re.MULTILINE)
    assert peer.server.log_ins > 0


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_an_image_s_layout_and_a_dockerfile_on_standard_input(based: Cli, context: Path, tmp_path: Path) -> None:
    write(context, "RUN echo in-layout >/layout")
    archive, layout = tmp_path / "a.tar", tmp_path / "layout"
    based.ok("build", str(context), "-o", str(archive))
    subprocess.run(["skopeo", "copy", "-q", f"docker-archive:{archive}", f"oci:{layout}:one"], check=True)
    (context / "word").write_text("from-folder\n")
    done = based.ok(
        *("build", str(context), "-f", "-", "--progress", "plain", "--network", "none"),
        *("--build-context", f"nowhere/image=oci-layout://{layout}:one"),
        stdin=b"FROM nowhere/image\nCOPY word /word\nRUN cat /layout /word; grep -c : /proc/net/dev\n",
    )
    assert re.search(r" in-layout\n.* from-folder\n.* 1\n", done.err)


def test_secrets_end_with_a_build_that_nobody_follows_and_do_not_leave_the_host(
    based: Cli, context: Path, key: Path, tmp_path: Path
) -> None:
    word = secrets.token_hex(16)
    login = base64.b64encode(f"me:{secrets.token_hex(16)}".encode()).decode()
    (tmp_path / "token").write_text(word)
    (tmp_path / "config.json").write_text(json.dumps({"auths": {"docker.io": {"auth": login}}}))
    write(
        context,
        "RUN --mount=type=secret,id=token wc -c </run/secrets/token; while [ ! -e /tmp/go ]; do sleep 1.25; done",
        "RUN --mount=type=ssh --mount=type=bind,target=/c perl /c/ask.pl",
    )
    given = ("--secret", f"id=token,src={tmp_path}/token", "--ssh", f"default={key}")
    command = based.start(
        "build", str(context), "-t", "left:1", "--progress", "plain", *given, DOCKER_CONFIG=str(tmp_path)
    )
    wait_until(lambda: "sleep 1.25" in based.guest("ps -o args"), "the step runs", 120)
    held = {path.rpartition("/")[2]: path for path in based.guest(HELD).split()}
    assert {"0", "agent.0", "config.json"} <= held.keys()
    assert login in based.guest(f"cat {held['config.json']}")
    bundle = tmp_path / "out.vmbundle"
    refused = based.run("suspend", "--to", str(bundle))
    assert refused.code == 2
    assert "secrets" in refused.err
    assert not bundle.exists()

    command.send_signal(signal.SIGKILL)
    command.communicate(timeout=60)
    go_on = "for root in /proc/[0-9]*/root; do [ -e $root/run/secrets/token ] && touch $root/tmp/go; done; true"
    attached = based.start("attach")
    based.guest(go_on)
    _, err = attached.communicate(timeout=180)
    assert attached.returncode == 0, err.decode()
    check_signature(err.decode(), key)  # who attaches lends the agent anew
    assert based.guest(HELD) == ""
    assert_nowhere(based, [word, login], but="left:1")

    command = based.start("build", str(context), "--no-cache", *given, DOCKER_CONFIG=str(tmp_path))
    wait_until(lambda: "sleep 1.25" in based.guest("ps -o args"), "the step runs", 120)
    (record,) = (json.loads(path.read_text()) for path in based.state.rglob("builds/*.json"))
    assert record["has_secrets"]
    command.send_signal(signal.SIGKILL)
    command.communicate(timeout=60)
    based.guest("kill -9 $(ps -o pid,args | awk '$2 ~ /docker-buildx$/ {print $1}'); " + go_on)
    wait_until(lambda: based.guest(HELD) == "", "what it might know is gone, though nobody follows", 60)
