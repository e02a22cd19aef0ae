"""A guest in which builds run: a table of answers, and a job whose output can be followed."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from typing import Any

import zstandard

from tests.unit.guest.fakes import FakeSession, Reply
from vmbuild.deadline import Deadline
from vmbuild.errors import VmbuildError
from vmbuild.guest import channel, job, secrets, sync
from vmbuild.guest.oci import BLOBS
from vmbuild.guest.session import ConnectionLostError

CONFIG = b"{}"
CONFIG_DIGEST = hashlib.sha256(CONFIG).hexdigest()
MANIFEST = json.dumps(
    {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"digest": f"sha256:{CONFIG_DIGEST}", "size": len(CONFIG), "mediaType": "config+gzip"},
        "layers": [],
    }
).encode()
IMAGE = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
METADATA = json.dumps({"containerimage.digest": IMAGE})
PIECE = 3


class Guest(FakeSession):
    """A guest in which every build succeeds, or ends with `code`; `log` is what its kernel says.

    A build writes `output`, a few bytes at a time. `endings` says how each following of it ends: after so many of its
    bytes the connection breaks, or an error is raised. When `gone` is set, nobody answers any more, and that is why.
    """

    def __init__(self, code: int = 0, log: bytes = b"", output: bytes = b"") -> None:
        super().__init__(
            *(
                (("cat", f"{work}/metadata.json"), Reply(stdout=METADATA.encode()))
                for work in ("/w", "/w/first", "/w/second")
            ),
            (("cat", f"{BLOBS}/{CONFIG_DIGEST}"), Reply(stdout=CONFIG)),
            (("cat",), Reply(stdout=MANIFEST)),
            ((job.PROGRAM,), Reply()),
            ((secrets.PROGRAM,), Reply()),
            ((sync.PROGRAM, "claim"), Reply(stdout=b"none\n")),
            (("rm",), Reply()),
            (("test",), Reply()),
            (("cut",), Reply(stdout=b"50.0\n")),
            (("dmesg",), Reply(stdout=log)),
        )
        self.code = code
        self.output = output
        self.endings: list[int | BaseException] = []
        self.reopenings: list[VmbuildError] = []
        self.gone: VmbuildError | None = None

    def run(self, argv: Sequence[str], **options: Any) -> int:
        if self.gone is not None:
            raise self.gone
        if argv[0] == "sh":
            self.table = ((("sh",), self._shell(argv)), *[row for row in self.table if row[0] != ("sh",)])
        code = super().run(argv, **options)
        return self._follow(int(argv[3]), options) if tuple(argv[:2]) == (job.PROGRAM, "follow") else code

    def _follow(self, at: int, options: dict[str, Any]) -> int:
        ending = self.endings.pop(0) if self.endings else len(self.output)
        end = ending if isinstance(ending, int) else len(self.output)
        for begin in range(at, end, PIECE):
            options["on_stdout"](self.output[begin : min(begin + PIECE, end)])
            options["on_tick"]()
        if isinstance(ending, BaseException):
            raise ending
        if end < len(self.output):
            raise ConnectionLostError("the connection to the guest broke")
        return self.code

    def reopen(self, deadline: Deadline) -> None:
        super().reopen(deadline)
        if self.gone is not None:
            raise self.gone
        if self.reopenings:
            raise self.reopenings.pop(0)

    def _shell(self, argv: Sequence[str]) -> Reply:
        if "mktemp" in argv[2]:
            return Reply(stdout=b"/w\n")
        # It has no drives for bulk data: all of it goes over SSH here, test_channel has the other way.
        return Reply(channel.NO_DRIVE if channel.FIND in argv[2] else 0)

    def shells(self, word: str) -> list[Any]:
        """Return the shell calls that have this word among their arguments."""
        return [call for call in self.ran("sh") if word in call.argv]

    def sent_names(self) -> list[str]:
        """Return the names in the context that was sent."""
        (call,) = self.shells("unpack")
        plain = zstandard.ZstdDecompressor().decompressobj().decompress(call.stdin)
        with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
            return [name.partition("/")[2] for name in tar.getnames() if "/" in name]

    def removed(self) -> list[str]:
        """Return the workspaces of builds that were ended and removed, in this order."""
        stopped = [call.argv[2] for call in self.ran(job.PROGRAM, "stop")]
        gone = [call.argv[2] for call in self.ran("rm", "-rf")]
        assert gone == stopped
        return gone
