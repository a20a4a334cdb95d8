"""Reading a bundle: a folder of immutable files named by content, and `manifest.json`, its only commit point.

A file that the manifest does not name is garbage. The manifest is replaced by write, fsync and rename, so a reader sees
the old bundle or the new one, and a build that is killed leaves the old one whole.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from latentrt.runtime.bundle.manifest import FORMAT_VERSION, FileRef, Manifest, Target
from latentrt.runtime.errors import BundleError

MANIFEST, FILES, EVIDENCE = "manifest.json", "files", "evidence"
BISECTED, RECORDED = ".bisect", ".recorded"  # behind a target's name: a comparison part by part, and of a recorded run
_CHUNK = 1 << 20  # fits a core's cache


class Bundle:
    """An opened bundle. Opening reads the manifest only; `target` checks what one target needs, `verify` everything."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.manifest, self.digest = read_manifest(self.path)

    @classmethod
    def uncommitted(cls, path: Path, manifest: Manifest) -> "Bundle":
        """What the bundle at `path` will be with this manifest. It has no digest, so no evidence."""
        bundle = cls.__new__(cls)
        bundle.path, bundle.manifest, bundle.digest = path, manifest, ""
        return bundle

    def target(self, name: str | None = None) -> tuple[str, Target]:
        """The target called `name`, or the only one; checks that its files are there and whole."""
        targets = self.manifest.targets
        if name is None and len(targets) != 1:
            raise BundleError(f"{self.path}: has targets {', '.join(targets) or 'none'}; choose one")
        name = name or next(iter(targets))
        if name not in targets:
            raise BundleError(f"{self.path}: has no target {name!r}, only {', '.join(targets)}; build it with latentrt build")
        target = targets[name]
        weights = self.manifest.weight_sets[target.weight_set].files
        for ref in [*target.refs(), *weights, *self.manifest.text.refs()]:
            self.file(ref)
        return name, target

    def file(self, ref: FileRef) -> Path:
        """Path of a file, after a look at its size."""
        path = self.path / FILES / ref.file
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise BundleError(f"{path}: missing; the bundle is damaged, build it again")
        if found != ref.size:
            raise BundleError(f"{path}: has {found} bytes, the manifest says {ref.size}; the bundle is damaged, build it again")
        return path

    def verify(self, progress: Callable[[int], None] = lambda size: None) -> list[str]:
        """Reads every file and compares digests; returns what is wrong, one line each."""
        findings = []
        for ref in dict.fromkeys(self.manifest.refs()):
            try:
                if file_digest(self.file(ref), progress) != ref.sha256:
                    findings.append(f"{self.path / FILES / ref.file}: content does not fit its digest; build the bundle again")
            except BundleError as error:
                findings.append(str(error))
        return findings

    def evidence_file(self, target: str) -> Path:
        """Where the evidence on one target lies, keyed by the manifest's digest: changed bundles have none yet."""
        return self.path / EVIDENCE / f"{self.digest[:16]}.{target}.json"

    def evidence_files(self, target: str) -> list[Path]:
        """What validation found: of the target's own runs, and of its graph run by PyTorch, whole, by parts, or recorded."""
        kinds = (f"{target}{backend}{way}" for way in ("", BISECTED, RECORDED) for backend in ("", ".torch"))
        return [f for f in map(self.evidence_file, kinds) if f.is_file()]


def read_manifest(path: Path) -> tuple[Manifest, str]:
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path}: not a bundle ({MANIFEST} is missing); make one with latentrt build") from None
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}); build the bundle again") from None
    try:
        parsed = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{file}: not valid JSON ({error}); build the bundle again") from None
    version = parsed.get("format_version") if isinstance(parsed, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(f"{file}: format version {version!r}, this version reads {FORMAT_VERSION}; build the bundle again")
    try:
        return Manifest.model_validate(parsed), hashlib.sha256(raw).hexdigest()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or MANIFEST
        raise BundleError(f"{file}: {where}: {first['msg']}; build the bundle again") from None


def file_digest(file: Path, progress: Callable[[int], None] = lambda size: None) -> str:
    """sha256 of a file's content."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
            progress(size)
    return digest.hexdigest()
