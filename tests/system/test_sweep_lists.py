"""The lists of a sweep in params.yaml."""

import pytest

from dpo.common.errors import InputError
from flows import sweep
from tests.support.project import ROOT


def test_a_sweep_changes_only_its_lists_and_nothing_if_they_are_invalid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (ROOT / "params.yaml").read_text()
    sweep.PARAMS.write_text(before)
    sweep.set_lists({"losses": ["sigmoid", "ipo"], "learning_rates": [1e-5]})
    lines = list(zip(before.splitlines(), sweep.PARAMS.read_text().splitlines(), strict=True))
    changed = {new.strip() for old, new in lines if old != new}
    assert {line.split(":")[0] for line in changed} == {"losses", "learning_rates"}
    (trial, other) = {trial.name for trial in sweep.load_params().trials() if trial.beta == 0.1}
    assert {trial, other} == {"sigmoid-0.1-1e-05-17", "ipo-0.1-1e-05-17"}
    sweep.set_lists({"losses": ["simpo", "nca"]})  # params.yaml does not list their settings
    assert {trial.loss.name for trial in sweep.load_params().trials()} == {"simpo", "nca"}
    assert sweep.load_params().sweep.reference_free_losses == ("simpo",)
    sweep.set_lists({"losses": ["simpo"]})
    assert {trial.loss.name for trial in sweep.load_params().trials()} == {"simpo"}
    assert "  simpo: {}\n" in sweep.PARAMS.read_text()
    changed_once = sweep.PARAMS.read_text()
    with pytest.raises(InputError, match=r"params\.yaml: sweep\.seeds"):
        sweep.set_lists({"seeds": [1, 1]})
    assert sweep.PARAMS.read_text() == changed_once
