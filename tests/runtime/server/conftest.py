"""Servers that the tests of a module share."""

import pytest

import latentrt
from tests.runtime.server.serving import Live, serving


@pytest.fixture(scope="module")
def live(example_bundle) -> Live:
    """The example model, served."""
    with serving(latentrt.load(example_bundle)) as live:
        yield live
