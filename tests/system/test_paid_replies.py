"""Replies of a paid judge, which `dvc push` and `dvc pull` bring to a second clone."""

import json
import re
from pathlib import Path

import pytest

from tests.support.openai_server import FakeServer
from tests.support.project import TRIAL, change, execute, make_project

COMMIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "results")


def longer(body):
    """Answer with the longer of the two responses of a question."""
    first, second = re.findall(
        r"<response-[AB]-\w+>\n(.*?)\n</response", body["messages"][0]["content"], re.DOTALL
    )
    verdict = "A" if len(first) > len(second) else "B" if len(second) > len(first) else "TIE"
    usage = {"prompt_tokens": 900, "completion_tokens": 1}
    choice = {"message": {"content": verdict}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage})


@pytest.mark.slow
def test_a_second_clone_evaluates_again_without_a_paid_request(tmp_path, tiny_model_dir: Path):
    with FakeServer(longer).running() as server:
        judge = {
            "kind": "llm", "model": "m", "base_url": server.url, "criterion": "It is longer.", "parallel": 2,
            "input_price": 1.0, "output_price": 1.0, "max_cost": 1.0,
        }  # fmt: skip
        first, clone = make_project(tmp_path / "first", tiny_model_dir), tmp_path / "clone"
        change(first, {"evaluate.judges": [judge]})
        execute(first, "dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "remote"))
        execute(first, "dvc", "repro")
        paid = len(server.requests)
        assert paid > 8
        assert len(json.loads((first / "reports/replies.json").read_text())) == paid
        execute(first, "git", "add", "-A")
        execute(first, *COMMIT)
        execute(first, "dvc", "push")
        execute(tmp_path, "git", "clone", "-q", str(first), str(clone))
        execute(clone, "dvc", "pull")
        assert "up to date" in execute(clone, "dvc", "status")
        output = execute(
            clone, "dvc", "repro", "--force", "-s", "reference_samples", f"evaluate@{TRIAL}", "compare"
        )
        assert output.count("Running stage") == 3
        assert len(server.requests) == paid
        results = [
            json.loads((folder / f"metrics/evaluate/{TRIAL}.json").read_text()) for folder in (first, clone)
        ]
        assert "replies" not in results[0]
        assert [each["win_rate"] for each in results] == [results[0]["win_rate"]] * 2
        replies = [(folder / "reports/replies.json").read_bytes() for folder in (first, clone)]
        assert replies[0] == replies[1]
