"""Launched stages."""

import pytest

from tasks.common.runner import run_launched


def test_context_parallelism_is_refused_before_the_stage_starts(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(SystemExit) as stopped:
        run_launched(lambda: pytest.fail("the stage must not run"))
    assert stopped.value.code == 2
    assert "context, sequence and tensor parallelism are not supported" in capsys.readouterr().err
