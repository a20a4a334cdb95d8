"""The README's Python example runs as it is printed."""

import re
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

README = Path(__file__).parent.parent / "README.md"


def test_python_example(example_bundle, capsys):
    block = re.search(r"In Python:\n\n((?:    .*\n)+)", README.read_text())[1]
    exec(textwrap.dedent(block).replace('"BUNDLE"', repr(str(example_bundle))), {})
    assert capsys.readouterr().out.strip()
