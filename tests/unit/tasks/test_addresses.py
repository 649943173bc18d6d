"""User and password of an address: never in messages, and refused where they would be stored."""

import logging
import os
import threading

import pytest

from dpo.common.errors import InputError
from flows.processes import execute
from tasks.common.addresses import refuse_credentials, shown, without_credentials
from tasks.tracking import offline

HIDDEN = {
    "https://someone:canary@host:8080/a/b.jsonl?token=canary#canary": "https://host:8080/a/b.jsonl",
    "s3://canary@bucket/folder": "s3://bucket/folder",
    "postgresql+pg8000://someone:can%40ary@host/database": "postgresql+pg8000://host/database",
}


@pytest.mark.parametrize("address", HIDDEN)
def test_an_address_is_shown_without_user_password_and_query(address):
    assert shown(address) == HIDDEN[address]
    assert "canary" not in without_credentials(f"cannot reach '{address.partition('?')[0]}': timeout")
    with pytest.raises(InputError, match=r"landing: .*contains a user or a password") as error:
        refuse_credentials("landing", address)
    assert "canary" not in str(error.value)


@pytest.mark.parametrize("address", ["data/landing", "s3://bucket/a@b.jsonl", "https://host/a@b", "a@b: c"])
def test_an_address_without_credentials_is_kept(address):
    assert (shown(address), without_credentials(address)) == (address, address)
    refuse_credentials("landing", address)


def test_the_output_of_commands_is_logged_without_credentials(tmp_path, monkeypatch, caplog):
    (tmp_path / "noisy.py").write_text("print('fatal: https://someone:canary@host/x.git: denied')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with caplog.at_level(logging.INFO):
        code, lines = execute(["noisy"], threading.Event(), logging.getLogger("test"))
    assert (code, lines) == (0, ["fatal: https://host/x.git: denied"])
    assert "canary" not in caplog.text


def test_an_unreachable_mlflow_server_is_reported_without_credentials(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name, value in (("URI", "http://someone:can%40ary@127.0.0.1:1"), ("USERNAME", ""), ("PASSWORD", "")):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    with pytest.raises(
        InputError, match=r"MLFLOW_TRACKING_URI: http://127\.0\.0\.1:1: connection refused"
    ) as error:
        offline.connect()
    assert not [text for text in (caplog.text, str(error.value)) if "can@ary" in text or "can%40ary" in text]
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:1", "MLflow prints addresses of its pages"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == (
        "someone",
        "can@ary",
    )
