"""Ordinary users of this host with an empty home, for tests of what needs no root."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(frozen=True)
class User:
    """An ordinary user with an empty home; `account` is None where it is the one who runs the tests."""

    name: str
    home: Path
    account: pwd.struct_passwd | None = None

    def start(self, argv: list[str], cwd: Path, **env: str) -> subprocess.Popen[str]:
        """Start a program as this user, all that it says in one pipe."""
        kept = {key: value for key, value in os.environ.items() if key in PASSED_ON or key.startswith("PIP_")}
        # Else snapshots are made and idle machines watched in the background, by what would outlive the user.
        quiet = {"CI": "1", "VMBUILD_SNAPSHOTS": "off"}
        own = {"HOME": str(self.home), "USER": self.name, "PATH": PATH, **quiet}
        return subprocess.Popen(
            argv,
            cwd=cwd,
            env={**kept, **own, **env},
            user=self.account and self.account.pw_uid,
            group=self.account and self.account.pw_gid,
            extra_groups=[] if self.account else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )


@contextmanager
def fresh_user() -> Iterator[User]:
    """Yield a user with an empty home, who is gone at the end."""
    home = Path(tempfile.mkdtemp(prefix="vmbuild-fresh-", dir="/tmp"))  # a short path: there are sockets in it
    name = f"fresh{secrets.token_hex(4)}"
    try:
        if os.geteuid() != 0:
            yield User(pwd.getpwuid(os.getuid()).pw_name, home)
            return
        subprocess.run(["useradd", "--no-create-home", "--home-dir", str(home), name], check=True)
        try:
            shutil.chown(home, name)
            yield User(name, home, pwd.getpwnam(name))
        finally:
            subprocess.run(["userdel", name], check=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def clone_into(folder: Path, user: User) -> None:
    """Copy what git has, as it now lies in the work tree: the same as a clone once it is committed."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT).decode().split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["chown", "-R", user.name, str(folder)], check=True)
