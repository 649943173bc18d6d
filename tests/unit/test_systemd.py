"""The systemd unit that starts the servers at boot."""

import os
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "configs/dpo-pipeline.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path):
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "--user", "verify", str(UNIT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    wrong = tmp_path / "wrong.service"
    wrong.write_text(UNIT.read_text().replace("ExecStart=/usr/bin/env", "ExecStart=/no/such"))
    command[-1] = str(wrong)
    assert subprocess.run(command, env=environment, capture_output=True).returncode != 0, "the check can fail"


def test_the_unit_starts_and_stops_the_servers():
    unit = ConfigParser()
    unit.optionxform = str
    unit.read_string(UNIT.read_text())
    assert unit["Service"]["ExecStart"].endswith("make up")
    assert unit["Service"]["ExecStop"].endswith("make down")
    assert (unit["Service"]["Type"], unit["Service"]["RemainAfterExit"]) == ("oneshot", "yes"), (
        "its children live on"
    )
