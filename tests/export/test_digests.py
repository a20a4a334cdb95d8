"""Digests of files: the same whether several at once or at the pace of another reader, never ahead of what that allows."""

import hashlib
from threading import Thread

import pytest

from latentrt.export.checkpoint import digests
from latentrt.export.checkpoint.digests import Pace, sha256, sha256_in_order
from latentrt.export.workers import Stopped

SIZES = {"a": 1000, "empty": 0, "b": 2500, "c": 1}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_CHUNK", 100)
    for name, size in SIZES.items():
        (tmp_path / name).write_bytes(bytes(len(name) + n % 251 for n in range(size)))
    return [tmp_path / name for name in SIZES]


def test_both_ways_give_sha256(files):
    expected = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    told: list[int] = []
    assert sha256(files, told.append) == expected and sum(told) == 3501
    assert sha256_in_order(files, Pace(), told.append) == expected and sum(told) == 7002


def test_hashing_waits_for_its_pace(files):
    """It may read 1,100 bytes, then 400 more, then the rest."""
    pace, told, found = Pace(1100), [], {}
    reached = {1100: 400, 1500: None}

    def progress(size: int) -> None:
        told.append(size)
        if sum(told) in reached:  # the next chunk would be beyond what is allowed
            assert pace._allowed == sum(told)
            more = reached[sum(told)]
            Thread(target=lambda: pace.advance(more) if more else pace.release()).start()

    found = sha256_in_order(files, pace, progress)
    assert found == sha256(files) and sum(told) == 3501


def test_stopping_ends_a_reader_that_waits(files):
    pace, told = Pace(1000), []

    def progress(size: int) -> None:
        told.append(size)
        if sum(told) == 1000:
            Thread(target=pace.stop).start()

    with pytest.raises(Stopped):
        sha256_in_order(files, pace, progress)
    assert sum(told) == 1000
