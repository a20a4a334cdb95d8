"""A recorded run, whose tokens are those that it was recorded on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentrt.validation import recording
from latentrt.validation.errors import ValidationError
from latentrt.validation.sources import SourceOptions
from latentrt.validation.sources.base import Rows, Source


class RecordedSource(Source):
    """What its engine made of whole prompts. Raises ValidationError if the file is none."""

    kind = "recorded"

    def __init__(self, location: str, options: SourceOptions):
        super().__init__(location)
        self.recording = recording.read(Path(location))
        self.given = self.recording.tokens
        self.longest = max(map(len, self.given.windows))
        self.vocab_size = self.recording.facts["config"]["vocab_size"]

    def rows(self, windows: list[np.ndarray]) -> Iterator[Rows]:
        known = self.given.windows
        if len(windows) > len(known) or any(not np.array_equal(a, b) for a, b in zip(windows, known, strict=False)):
            raise ValidationError(f"{self.name}: was recorded on other tokens ({self.given.source})")
        return iter(self.recording.modes["prefill"][: len(windows)])

    def describe(self) -> dict:
        facts = self.recording.facts
        return {
            "kind": self.kind, "name": self.name, "date": facts["date"], "machine": facts["machine"],
            "manifest_sha256": facts["bundle"]["manifest_sha256"], "checkpoint_sha256": facts["checkpoint"]["sha256"],
            "executed": f"{facts['executed']['summary']}, recorded {facts['date']}",
        }  # fmt: skip
