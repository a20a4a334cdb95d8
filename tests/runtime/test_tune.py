"""The tuner of block sizes: every candidate has a plan, and tables are as they were afterwards. Times need a GPU."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import tune
from benchmarks.gpu.run import Run
from latentrt.plugins.architecture import ARCHITECTURES, Gpu
from latentrt.plugins.mla_attention.tiles import TILES as ATTENTION


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_todays_tile_comes_first_and_no_candidate_twice(capability):
    for make in tune.SUBJECTS.values():
        for subject in make(capability):
            assert len(set(subject.candidates)) == len(subject.candidates) > 3, subject.name
            assert subject.candidates[0] == subject.table.get(subject.name, subject.candidates[0])


def test_every_candidate_of_attention_has_kernels_of_its_own(tmp_path):
    run, before = Run(torch.device("cpu"), True), dict(ATTENTION[90])
    tuner = tune.Tuner(run, Gpu.of(90), tmp_path, 1.0)
    for subject in tune.attention_subjects(90):
        sets = next(iter(subject.cases.values()))(run)
        shares = [next(s for s in tuner.specs(subject, t, sets) if s.function == "attend_shares") for t in subject.candidates]
        assert len(set(shares)) == len(shares), subject.name
    assert ATTENTION[90] == before


def test_a_candidate_that_does_not_compile_is_told_and_not_timed(tmp_path, monkeypatch, capsys):
    run = Run(torch.device("cpu"), True)
    monkeypatch.setattr(tune, "WORKERS", 1)
    monkeypatch.setattr(tune.Tuner, "compile", lambda self, wanted: dict.fromkeys(wanted, "out of resource: shared memory"))
    tuner = tune.Tuner(run, Gpu.of(90), Path(tmp_path), 60.0)
    tuner.tune(next(iter(tune.attention_subjects(90))))
    assert "out of resource" in capsys.readouterr().out
    assert all(row["cost"] == float("inf") and not row["times"] for row in tuner.rows)
