import json

import pytest

from dpo.common import progress as module
from dpo.common.progress import PROGRESS_FILE, progress


@pytest.fixture
def state(tmp_path, monkeypatch):
    file = tmp_path / "state/progress.json"
    monkeypatch.setenv(PROGRESS_FILE, str(file))
    monkeypatch.delenv("RANK", raising=False)
    return lambda: json.loads(file.read_text())


def test_the_file_has_the_state_of_the_bar(state, monkeypatch):
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.0)
    with progress(total=40, desc="tokens", unit="pair", mininterval=2, delay=2) as bar:
        bar.update(30)
        shown = state()
        assert (shown["title"], shown["done"], shown["total"]) == ("tokens", 30, 40)
        assert shown["elapsed_s"] > 0
        assert shown["remaining_s"] == pytest.approx(shown["elapsed_s"] / 3, rel=0.5)
        bar.update()
        assert state()["done"] == 31


def test_the_file_is_not_written_more_often_than_every_two_seconds(state):
    assert module.WRITE_SECONDS == 2.0
    with progress(total=40) as bar:
        for _ in range(20):
            bar.update()
        assert state()["done"] == 1
    assert state()["done"] == 20, "closing the bar writes the last state"


def test_iteration_reports_all_items(state):
    assert list(progress(range(5), total=5, desc="writing")) == [0, 1, 2, 3, 4]
    assert (state()["title"], state()["done"], state()["remaining_s"]) == ("writing", 5, 0.0)


def test_a_bar_without_a_total_has_no_remaining_time(state):
    bar = progress(desc="rows")
    bar.update(7)
    bar.close()
    assert (state()["done"], state()["total"], state()["remaining_s"]) == (7, None, None)


@pytest.mark.parametrize("case", ["disabled", "second process", "no file requested", "unwritable"])
def test_no_file_is_written(tmp_path, monkeypatch, state, case):
    if case == "second process":
        monkeypatch.setenv("RANK", "1")
    if case == "no file requested":
        monkeypatch.delenv(PROGRESS_FILE)
    if case == "unwritable":
        (tmp_path / "state").write_text("a file in the place of the folder")
    with progress(total=2, disable=case == "disabled") as bar:
        bar.update(2)
    assert not (tmp_path / "state/progress.json").exists()
