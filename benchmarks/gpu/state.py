"""What a run has found so far: written by the process that runs sections, read by the one that watches it."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class State:
    """What was found so far; a child process hands it to its parent as JSON, and the next child goes on from it."""

    gpu: str = ""
    section: str = ""
    deadline: float = 0.0  # of the section, in time.monotonic()
    seconds: dict[str, float] = field(default_factory=dict)  # of the sections that ended
    checks: list[dict] = field(default_factory=list)
    measurements: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)  # "copy" bytes/s, "matmul" FLOP/s, measured

    @classmethod
    def read(cls, file: Path) -> "State":
        return cls(**json.loads(file.read_text())) if file.exists() else cls()

    def write(self, file: Path) -> None:
        """Replaces `file` at once, so that a reader sees a whole one."""
        new = file.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        os.replace(new, file)

    def check(self, name: str, error: float, limit: float, note: str = "") -> bool:
        """Passed if error <= limit; NaN never passes."""
        passed = bool(error <= limit)
        self.checks.append(dict(section=self.section, name=name, passed=passed, error=float(error), limit=limit, note=note))
        print(f"  {'ok  ' if passed else 'FAIL'} {name}: {error:.3g} (limit {limit:g}) {note}", flush=True)
        return passed
