"""Writing a bundle: finished files under names made of their content, then the manifest, in one rename."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Lock
from typing import TextIO

from latentrt.runtime.bundle.manifest import FileRef, Manifest
from latentrt.runtime.bundle.reader import EVIDENCE, FILES, MANIFEST, Bundle, file_digest, read_manifest
from latentrt.runtime.errors import BundleError

BUILDING, JOURNAL, LOCK = "building", "journal.json", "lock"  # only there while a build runs, or after one was killed
_OWN = {MANIFEST, f"{MANIFEST}.new", FILES, EVIDENCE, BUILDING}
_BYSTANDERS = re.compile(r"\..*|README.*|LICENSE.*|Thumbs\.db|desktop\.ini", re.IGNORECASE)  # of hubs and file managers
_MADE = re.compile(r"[0-9a-f]{40}\.[a-z]+")  # names of files that a build makes


class BundleWriter:
    """Adds files to the bundle at `path` and commits a manifest. Made by `open_writer`, one at a time.

    `previous` is the manifest in force, None for a new bundle.
    """

    def __init__(self, path: Path, previous: Manifest | None):
        self.path, self.previous = path, previous
        self.building, self.folder = path / BUILDING, path / FILES
        self._journal, self._noting = _journal(path), Lock()
        self._drafts = count()

    def finished(self, key: str) -> str | None:
        """The file written under `key` by a build that was interrupted, if it is still whole."""
        ref = self._journal.get(key)
        return ref.file if ref and self.holds(ref, read=True) else None

    def has_finished(self) -> bool:
        """Whether a next build could take a file over from this one."""
        return bool(self._journal)

    def write(self, key: str, suffix: str, fill: Callable[[Path], None]) -> str:
        """Lets `fill` write a file, keeps it under its content's name and notes it under `key`; returns the name."""
        ref = self.add(suffix, fill)
        with self._noting:
            self._journal[key] = ref
            text = json.dumps({k: r.model_dump() for k, r in self._journal.items()}, indent=1)
            _replace(self.building / JOURNAL, text.encode())
        return ref.file

    def add(self, suffix: str, fill: Callable[[Path], None]) -> FileRef:
        """Lets `fill` write a file and keeps it under its content's name. Several threads may add files at once."""
        draft = self.building / f"draft.{next(self._drafts)}{suffix}"
        try:
            fill(draft)
            _sync(draft)
            digest = file_digest(draft)
        except BaseException:
            draft.unlink(missing_ok=True)  # its space is wanted where the disk is full
            raise
        ref = FileRef(file=f"{digest[:40]}{suffix}", size=draft.stat().st_size, sha256=digest)
        os.replace(draft, self.path / FILES / ref.file)
        _sync(self.path / FILES)
        return ref

    def copy(self, source: Path) -> FileRef:
        """Keeps a copy of `source` under its content's name."""
        return self.add(source.suffix, lambda draft: shutil.copyfile(source, draft))

    def move(self, source: Path) -> FileRef:
        """Keeps `source`, a file under `building`, under its content's name: the largest plans lie on the disk once."""
        return self.add(source.suffix, lambda draft: os.replace(source, draft))

    def ref(self, file: str) -> FileRef:
        """The reference of a file noted by `write`, in this build or in one before."""
        return next(r for r in self._journal.values() if r.file == file)

    def file(self, ref: FileRef) -> Path:
        """Path of a file, as `Bundle.file` gives it, before the commit."""
        return self.path / FILES / ref.file

    def holds(self, ref: FileRef, read: bool = False) -> bool:
        """Whether the file is there with the size that it should have, and, if it is to be read, the content."""
        return holds(self.path, ref) and (not read or file_digest(self.file(ref)) == ref.sha256)

    def preview(self, manifest: Manifest) -> Bundle:
        """The bundle as `commit` would make it."""
        return Bundle.uncommitted(self.path, manifest)

    def commit(self, manifest: Manifest) -> None:
        """Puts `manifest` in force. What it does not name goes when the writer is closed."""
        _replace(self.path / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())
        self.previous = manifest

    def clean(self) -> None:
        """Removes what the manifest in force does not name; without one, everything that a build makes."""
        kept = {ref.file for ref in self.previous.refs()} if self.previous else set()
        for file in (self.path / FILES).iterdir():
            if file.name not in kept and _MADE.fullmatch(file.name):
                file.unlink()
        digest = file_digest(self.path / MANIFEST)[:16] if self.previous else None
        for file in (self.path / EVIDENCE).glob("*.json"):
            if file.name.split(".")[0] != digest:
                file.unlink()
        for left in [f for f in self.building.iterdir() if f.name != LOCK]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if self.previous is None:
            (self.path / MANIFEST).unlink(missing_ok=True)
            with suppress(OSError):
                (self.path / FILES).rmdir()
        (self.building / LOCK).unlink()  # from here on another build may begin: only folders that it did not fill go
        with suppress(OSError):
            self.building.rmdir()
            if self.previous is None:
                self.path.rmdir()



def holds(path: Path, ref: FileRef) -> bool:
    """Whether the bundle at `path` has the file, with the size that it should have."""
    file = path / FILES / ref.file
    return file.is_file() and file.stat().st_size == ref.size


def finished_bytes(path: Path) -> int:
    """What an interrupted build left finished at `path`."""
    return sum(ref.size for ref in _journal(path).values() if holds(path, ref))


def _journal(path: Path) -> dict[str, FileRef]:
    try:
        noted = json.loads((path / BUILDING / JOURNAL).read_text())
        return {k: FileRef.model_validate(r) for k, r in noted.items()}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def check_folder(path: Path, needed: int = 0) -> None:
    """Refuses a folder that is no place for a bundle, or has no room for `needed` more bytes. Makes nothing.

    Files beside a bundle's own are left alone; a folder that holds something else entirely is not taken for a bundle.
    """
    if path.exists() and not path.is_dir():
        raise BundleError(f"{path}: is a file; give a folder for the bundle")
    names = {f.name for f in path.iterdir()} if path.is_dir() else set()
    foreign = sorted(name for name in names - _OWN if not _BYSTANDERS.fullmatch(name))
    if foreign and not {MANIFEST, BUILDING} & names:
        raise BundleError(f"{path}: holds {foreign[0]!r}, which is no part of a bundle; give another folder")
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise BundleError(f"{path}: {there} is not writable; give a folder in a place that is")
    free = shutil.disk_usage(there).free
    if needed > free:
        raise BundleError(
            f"{path}: the build writes {needed / 1e9:.2f} GB ({needed} bytes), and {there} has {free / 1e9:.2f} GB free; "
            "free some space there, or give another folder"
        )


@contextmanager
def open_writer(path: Path, discard_unreadable: bool = False) -> Iterator[BundleWriter]:
    """A writer for the bundle at `path`, new or old; `discard_unreadable` starts anew where the manifest is damaged.

    On leaving, and on errors, everything but the committed bundle is removed; only an interruption (signal or
    KeyboardInterrupt) and a full disk leave finished files for the next build. Raises BundleError if the folder is something
    else, or in use, or its disk is full.
    """
    check_folder(path)
    previous_manifest(path, discard_unreadable)  # refused before anything is made
    while (lock := _lock(path)) is None:
        pass
    with lock:
        (path / FILES).mkdir(exist_ok=True)
        writer = BundleWriter(path, previous_manifest(path, discard_unreadable))
        try:
            yield writer
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if _disk_is_full(error) and writer.has_finished():
                raise BundleError(
                    f"{path}: no space left on its disk ({error.strerror}); what is finished stays: free some space and run "
                    "the same command, which resumes"
                ) from None
            writer.clean()
            if _disk_is_full(error):
                raise BundleError(f"{path}: no space left on its disk ({error.strerror}); give a folder on another") from None
            raise
        writer.clean()


def _disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _lock(path: Path) -> TextIO | None:
    """The bundle's lock file, made and locked; None if the build before removed it between opening and locking."""
    file = path / BUILDING / LOCK
    file.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError), ExitStack() as unless_kept:
        lock = unless_kept.enter_context(file.open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BundleError(f"{path}: another build is writing to it; wait for it or give another folder") from None
        if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
            unless_kept.pop_all()
            return lock
    return None


def previous_manifest(path: Path, discard_unreadable: bool = False) -> Manifest | None:
    """The manifest in force at `path`; None where there is no bundle, or an unreadable one that may be discarded."""
    if not (path / MANIFEST).exists():
        return None
    try:
        return read_manifest(path)[0]
    except BundleError as error:
        if discard_unreadable:
            return None
        raise BundleError(f"{error} with --force") from None


def _replace(file: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    draft = file.with_name(file.name + ".new")
    draft.write_bytes(content)
    _sync(draft)
    os.replace(draft, file)
    _sync(file.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
