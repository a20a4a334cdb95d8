"""Reads what a TensorRT-RTX plan says about itself: its compiler's instructions lie in it as text (TensorRT-RTX 1.7)."""

import re
from collections import Counter
from pathlib import Path

_INSTRUCTION = re.compile(r'\n\s*fully_connected=\{ name="[^"]*" output=\{([^}]*)\} input=\{([^}]*)\}')
_TENSOR = re.compile(r'name="([^"]+)"[^\n]*? type=(\w+)')


def products(plan: Path) -> Counter:
    """How often (type of left operand, type of right operand, type of result) is multiplied, over all profiles."""
    found: Counter = Counter()
    for section in plan.read_bytes().decode("latin1").split("header {\n")[1:]:
        types = dict(_TENSOR.findall(section))
        for output, inputs in _INSTRUCTION.findall(section):
            left, right = re.findall(r'"([^"]+)"', inputs)[:2]
            (result,) = re.findall(r'"([^"]+)"', output)
            found[types[left], types[right], types[result]] += 1
    return found
