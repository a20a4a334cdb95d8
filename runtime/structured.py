from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Constraint:
    kind: str
    value: Any
class Guides:
    def __init__(self, *args): ...
