"""The recipe of the ways out: a container image in the guest -> archives, folders, registries, engines, boards.

All of them are made on the host of the same blobs: what can be done natively is not done under emulation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from vmbuild import board, load
from vmbuild.guest import archive, folder, oci, rewrite
from vmbuild.guest.blobs import HostBlobs
from vmbuild.guest.flatten import Tree
from vmbuild.guest.image import Image
from vmbuild.guest.session import Sink
from vmbuild.model import PLATFORM_ALIASES, Delivered
from vmbuild.outputs import STDOUT, Kind, Output, board_of, check_together, default_compression, names_of
from vmbuild.registry import logins
from vmbuild.registry.push import Part, Repository, Target
from vmbuild.registry.transport import connected
from vmbuild.report import Reporter
from vmbuild.whole import writing_in

Files = Mapping[Output, Sink]


def place_of(output: Output, cwd: str) -> str:
    """Return where an output of the host goes, as an absolute path or `-`."""
    return output.dest if output.dest == STDOUT else str(Path(cwd) / output.dest)


def check_places(outputs: Sequence[Output], cwd: str) -> None:
    """See that what goes to the host's disk can be written there. Raises UsageError or HostError."""
    for output in outputs:
        if output.is_folder:
            folder.check_folder(Path(place_of(output, cwd)))
        elif not output.leaves_host and output.kind is not Kind.IMAGE:
            archive.check_output(place_of(output, cwd))


def check_all(outputs: Sequence[Output], tags: Sequence[str], platforms: Sequence[str], cwd: str) -> None:
    """See that all ways out are open before a build goes them. Raises UsageError, HostError or DeliveryError."""
    check_together(outputs, tags)
    check_places(outputs, cwd)
    for output in outputs:
        if output.kind is Kind.LOAD and board_of(output.dest):
            board.check(output.dest, platforms)
        elif output.kind is Kind.LOAD:
            load.choose(output.dest, len(platforms))
        elif output.kind is Kind.REGISTRY:
            for target in _targets(output, tags):
                with _connected(target.registry, output) as transport:
                    Repository(transport, target.repository).check()


@contextmanager
def open_files(outputs: Sequence[Output], cwd: str, stdout: IO[bytes]) -> Iterator[Files]:
    """Yield where each output writes that is a file: they appear whole when the block ends well. Raises HostError."""
    with ExitStack() as stack:
        yield {
            output: stack.enter_context(archive.open_output(place_of(output, cwd), stdout))
            for output in outputs
            if not output.leaves_host and not output.is_folder and output.kind is not Kind.IMAGE
        }


@contextmanager
def room_beside(place: Path) -> Iterator[Path]:
    """Yield a folder for blobs, empty, which is gone afterwards."""
    shutil.rmtree(place, ignore_errors=True)
    with writing_in(place.parent):
        place.mkdir(mode=0o700)
        (place / "blobs").mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


class Delivery:
    """A container image on its ways out; `blobs` are in a folder that `scratch` is beside."""

    def __init__(
        self, blobs: HostBlobs, scratch: Path, image_id: str, tags: Sequence[str], cwd: str, report: Reporter
    ) -> None:
        self._blobs, self._scratch, self._report = blobs, scratch, report
        self._image_id, self._tags, self._cwd = image_id, tags, cwd
        self._read: Image | None = None

    @property
    def image(self) -> Image:
        """The container image as the guest has it."""
        if self._read is None:
            self._read = self._blobs.image(self._image_id)
        return self._read

    def to_file(self, output: Output, out: Sink) -> Delivered:
        """Write an archive or a tar. Raises GuestError or HostError."""
        if output.kind is Kind.TAR:
            image, size = self.image, folder.write_tar(self._trees(), out, self._report)
        else:
            image = self._wanted(output)
            image = image.single() if output.kind is Kind.DOCKER else image
            size = self._write_archive(image, names_of(output, self._tags), out)
        return Delivered(output.kind, output.dest, f"sha256:{image.digest}", size)

    def onward(self, output: Output) -> Delivered:
        """Go any other way. Raises GuestError, HostError or DeliveryError."""
        return _WAYS[output.kind](self, output)

    def to_folder(self, output: Output) -> Delivered:
        """Write the file system of a container image, a platform each a folder where it has several."""
        target = Path(place_of(output, self._cwd))
        self._report.step(f"Writing the files to {output.dest}")
        size = folder.write_folder(self._trees(), target, self._report)
        return Delivered(output.kind, output.dest, f"sha256:{self.image.digest}", size)

    def to_layout(self, output: Output) -> Delivered:
        """Write an OCI layout in a folder."""
        image = self._wanted(output)
        self._report.step(f"Writing the layout {output.dest}")
        self._blobs.bring(image.blobs)
        names = names_of(output, self._tags)
        size = folder.write_layout(image, names, Path(place_of(output, self._cwd)), self._blobs.path)
        return Delivered(output.kind, output.dest, f"sha256:{image.digest}", size)

    def to_engine(self, output: Output) -> Delivered:
        """Load the container image into an engine of the host, or a board's."""
        if board_of(output.dest):
            return self._to_board(output)
        image = self.image.single()
        engine = load.choose(output.dest, len(image.runnable()))
        self._report.step(f"Loading into {engine.program}")
        self._blobs.bring(image.blobs)
        size = load.load(engine, lambda pipe: self._write_archive(image, self._tags, pipe))
        return Delivered(output.kind, engine.program, f"sha256:{image.digest}", size)

    def _to_board(self, output: Output) -> Delivered:
        parts = {self._platform(each): each for each in self.image.runnable()}
        name = board.choose_platform(output.dest, board.ask_machine(output.dest), list(parts))
        wish = rewrite.Wish("gzip")
        image = rewrite.rewrite(parts[name], wish, self._blobs)
        path = self._scratch / "parcel"
        with path.open("wb") as file:
            size = self._write_archive(image, self._tags, file)
        with path.open("rb") as file:
            parcel = board.Parcel(path, hashlib.file_digest(file, "sha256").hexdigest(), size)
        self._report.step(f"Loading into {output.dest}")
        with self._report.meter("send", size) as meter:
            board.load(output.dest, parcel, meter)
        return Delivered(output.kind, output.dest, f"sha256:{image.digest}", size)

    def to_registry(self, output: Output) -> Delivered:
        """Push the container image, to each of its names."""
        image, pushed = self._wanted(output), 0
        by_registry: dict[str, dict[str, list[str]]] = {}
        for target in _targets(output, self._tags):
            by_registry.setdefault(target.registry, {}).setdefault(target.repository, []).append(target.tag)
        for registry, repositories in by_registry.items():
            with _connected(registry, output) as transport:
                done: list[str] = []
                for name, names in repositories.items():
                    self._report.step(f"Pushing to {registry}/{name}")
                    pushed += self._push(
                        Repository(transport, name, done[:1]), image, [] if output.by_digest else names
                    )
                    done.append(name)
        where = ",".join(names_of(output, self._tags))
        return Delivered(output.kind, where, f"sha256:{image.digest}", pushed)

    def _push(self, repository: Repository, image: Image, names: Sequence[str]) -> int:
        parts = [Part(blob.digest, blob.size) for blob in image.each_blob_once()]
        missing = repository.missing(parts)
        wanted = {part.digest for part in missing}
        self._blobs.bring(blob for blob in image.each_blob_once() if blob.digest in wanted)
        with self._report.meter("push", sum(part.size for part in missing)) as meter:
            sent = sum(repository.upload(part, self._blobs.path(part.digest), meter) for part in missing)
        for entry in image.entries() if image.is_index else []:
            digest = oci.Blob.from_descriptor(entry).digest
            repository.put_manifest(f"sha256:{digest}", str(entry["mediaType"]), image.documents[digest])
        for name in names or [f"sha256:{image.digest}"]:
            repository.put_manifest(name, image.media_type, image.documents[image.digest])
        return sent

    def _wanted(self, output: Output) -> Image:
        """Return the container image as an output wants it."""
        if output.kind is Kind.DOCKER and output.compression is None and output.oci_types is None:
            return self.image
        oci_types = True if output.kind is Kind.OCI and output.oci_types is None else output.oci_types
        compression = output.compression or default_compression(output.kind)
        wish = rewrite.Wish(compression, output.level, output.force, oci_types)
        return rewrite.rewrite(self.image, wish, self._blobs)

    def _write_archive(self, image: Image, names: Sequence[str], out: Sink) -> int:
        self._blobs.bring(image.blobs)
        return archive.write_from_host(image, names, out, self._blobs.path, self._report)

    def _trees(self) -> list[tuple[str, Tree]]:
        images = self.image.runnable()
        trees = []
        for image in images:
            layers = image.blobs[1:]
            self._blobs.bring(layers)
            name = self._platform(image).replace("/", "_") if len(images) > 1 else ""
            trees.append((name, Tree([self._blobs.path(layer.digest) for layer in layers])))
        return trees

    def _platform(self, image: Image) -> str:
        """Return the platform of a container image by its name in PLATFORMS, or as it calls itself."""
        facts = oci.parse_object(self._blobs.read(image.blobs[0]))
        words = [str(facts.get(key) or "") for key in ("os", "architecture", "variant")]
        name = "/".join(word for word in words if word)
        return PLATFORM_ALIASES.get(name, name)


_WAYS: dict[Kind, Callable[[Delivery, Output], Delivered]] = {
    Kind.LOCAL: Delivery.to_folder,
    Kind.OCI: Delivery.to_layout,
    Kind.LOAD: Delivery.to_engine,
    Kind.REGISTRY: Delivery.to_registry,
}


def _targets(output: Output, tags: Sequence[str]) -> list[Target]:
    return [Target.parse(oci.full_reference(name)) for name in names_of(output, tags)]


def _connected(registry: str, output: Output) -> Any:
    return connected(registry, logins.find_login(registry), insecure=output.insecure)


def pushed_metadata(metadata: str, pushed: Delivered) -> str:
    """Return BuildKit's metadata with the digest by which a registry knows the container image."""
    facts = json.loads(metadata)
    facts["containerimage.digest"] = pushed.digest
    facts["image.name"] = pushed.where
    facts.pop("containerimage.descriptor", None)
    return json.dumps(facts, indent=2)


def kept_inside(output: Output, inside: Callable[[str], str]) -> Output:
    """Return an output whose place is mapped by a function, unless it has none."""
    if output.leaves_host or output.kind is Kind.IMAGE or output.dest == STDOUT:
        return output
    return replace(output, dest=inside(output.dest))
