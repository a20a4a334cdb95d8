"""Load generators of the benchmarks: those that are missing are named; ours asks for what it says, and pages are free again."""

import asyncio
from pathlib import Path

from benchmarks import load_generators
from benchmarks.load_generators import Asked
from tests.runtime.server.serving import until


def test_what_is_missing_is_named(capsys):
    generators = load_generators.found({"guidellm": "/nowhere/guidellm", "aiperf": "true"})
    assert list(generators) == ["own", "aiperf"]
    assert capsys.readouterr().out == "guidellm: skipped, /nowhere/guidellm is not there (--guidellm names it)\n"


def test_ours_asks_for_all_streams(live):
    before = live.engine.loop.schedulers.total("asked_tokens")
    found = asyncio.run(load_generators.own(live.url, Asked(clients=3, requests=5, new=8, checkpoint=Path())))
    assert live.engine.loop.schedulers.total("asked_tokens") - before >= 5 * load_generators.PROMPT
    assert found.rate > 0 and found.first_p50 <= found.first_p99 and found.between_p50 <= found.between_p99
    until(live.all_free)
