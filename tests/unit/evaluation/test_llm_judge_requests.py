"""Requests of LLM judges: retries, refusals, costs and API keys."""

import logging
import shutil
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from dpo.common.errors import InputError, TransientError
from dpo.common.files import write_json
from dpo.evaluation.judges import reply_cache, used_replies
from tests.support.judges import LONGER, PAIRS, completion, longer, wins
from tests.support.openai_server import DROPPED, failure

CANARY = "sk-canary-0123456789abcdef"


def test_requests_are_parallel(server):
    barrier = threading.Barrier(6)

    def respond(question):
        barrier.wait(timeout=20)
        return completion(longer(question))

    server.respond = respond
    assert wins(server.judge(parallel=6), *PAIRS) == LONGER


def first_then(*responses):
    """Send these responses to the first requests, then verdicts."""
    left, lock = list(responses), threading.Lock()

    def respond(question):
        with lock:
            return left.pop(0) if left else completion(longer(question))

    return respond


@pytest.mark.parametrize(
    "fault", [DROPPED, *(failure(status, "busy") for status in (408, 409, 429, 500, 502, 503))]
)
def test_transient_fault_is_retried(server, waits, fault):
    server.respond = first_then(fault, fault)
    assert wins(server.judge(parallel=1), *PAIRS) == LONGER
    assert len(server.questions()) == 6 + 2
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


def test_retry_after_header_is_respected(server, waits):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    responses = [failure(429, "slow down", Retry_After=value) for value in ("7", date, "soon", "0.1", "-3", "nan")]
    server.respond = first_then(*responses)
    assert wins(server.judge(parallel=1), *PAIRS) == LONGER
    assert waits[0] == 7
    assert 60 < waits[1] <= 90
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits) if n > 1)
    assert len(waits) == 6


def test_retry_after_of_hours_is_a_transient_error(server, waits):
    server.respond = lambda question: failure(429, "daily quota", Retry_After=7200)
    with pytest.raises(TransientError, match=r"in 1 attempts, status 429: .*daily quota.*wait 7200 seconds"):
        server.judge(parallel=1).compare(*PAIRS)
    assert waits == []


def test_unavailable_server_is_a_transient_error_after_eight_attempts_with_backoff(server, waits):
    server.respond = lambda question: failure(503, "down for maintenance")
    with pytest.raises(TransientError, match=r"in 8 attempts, status 503: .*down for maintenance") as error:
        server.judge(parallel=1).compare(["film"], ["good"], ["bad"])
    assert server.url in str(error.value)
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits))
    assert len(waits) == 7
    assert len(server.questions()) == 8
    assert len({wait / 2**n for n, wait in enumerate(waits)}) > 1


def test_unreachable_server_is_a_transient_error_with_its_url(server, waits):
    judge = server.judge(parallel=1)
    server.http.socket.close()
    with pytest.raises(
        TransientError, match=rf"{server.url}/chat/completions did not reply in 8 attempts, \w*Error"
    ):
        judge.compare(["film"], ["good"], ["bad"])


@pytest.mark.parametrize(
    ("status", "fix"),
    [
        (400, "use a chat model"),
        (401, "set OPENAI_API_KEY"),
        (403, "set OPENAI_API_KEY"),
        (404, "base_url"),
        (307, "correct the settings in"),
    ],
)
def test_rejected_request_is_an_error_with_a_fix(server, waits, status, fix):
    server.respond = lambda question: failure(status, "so says the server")
    with pytest.raises(InputError, match=rf"status {status}: .*so says the server.*; .*{fix}"):
        server.judge(parallel=1).compare(["film"], ["good"], ["bad"])
    assert waits == []
    assert len(server.questions()) == 1


@pytest.mark.parametrize(
    "text", ["<html>Welcome</html>", "[]", '{"error": "x"}', '{"choices": []}', '{"choices": [{"message": null}]}']
)
def test_reply_that_is_not_a_chat_completion_is_an_error_and_not_saved(server, text):
    server.respond = lambda question: (200, {}, text)
    with pytest.raises(InputError, match=r"is not a chat completion.*correct base_url"):
        server.judge(parallel=1).compare(["film"], ["good"], ["bad"])
    server.respond = lambda question: completion(longer(question))
    assert wins(server.judge(), ["film"], ["good"], ["bad"]) == [1.0]


@pytest.mark.parametrize("url", ["", "localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_invalid_url_is_an_error_at_load_time(server, url):
    server.url = url
    with pytest.raises(InputError, match=r"evaluate\.judges\.0\.base_url"):
        server.judge()


# 512 reply tokens, the maximum, cost $1. A reply of 128 tokens costs a quarter.
ONE_DOLLAR_PER_REQUEST = {"input_price": 0.0, "output_price": 1e6 / 512}
QUARTER = {"prompt_tokens": 900, "completion_tokens": 128, "total_tokens": 1028}


@pytest.mark.parametrize("parallel", [1, 4])
def test_no_request_is_sent_that_could_exceed_max_cost(server, parallel):
    server.respond = lambda question: completion(longer(question), QUARTER)
    capped = {**ONE_DOLLAR_PER_REQUEST, "parallel": parallel, "max_cost": 2.0}
    with pytest.raises(InputError, match=r"max_cost: \$1\.2500 of \$2\.0000 are spent.*; 2 of 3 pairs are judged"):
        server.judge(**capped).compare(*PAIRS)
    assert len(server.questions()) == 5  # after five quarters another dollar could make 2.25
    with pytest.raises(InputError, match=r"\$1\.2500 of \$2\.0000"):
        server.judge(**capped).compare(*PAIRS)
    assert server.questions() == []
    assert wins(server.judge(**{**capped, "max_cost": 2.25}), *PAIRS) == LONGER
    assert len(server.questions()) == 1
    assert wins(server.judge(**{**capped, "max_cost": 0.01}), *PAIRS) == LONGER


def test_repeated_runs_of_a_stage_do_not_spend_more_than_max_cost_together(server):
    server.respond = lambda question: completion(longer(question), QUARTER)
    spent = 0
    for _ in range(4):
        with pytest.raises(InputError, match=r"\$1\.2500 of \$2\.0000"):
            server.judge(**ONE_DOLLAR_PER_REQUEST, parallel=1, max_cost=2.0).compare(*PAIRS)
        spent += 0.25 * len(server.questions())
    assert spent == 1.25
    other = server.judge(**ONE_DOLLAR_PER_REQUEST, parallel=1, max_cost=2.0)
    assert wins(other, ["film 9"], ["good"], ["bad"]) == [1.0]  # the replies of another trial do not count
    assert sum(other.costs.values()) == 0.5


def test_replies_that_another_checkout_paid_for_are_used_and_count_once(server, tmp_path):
    server.respond = lambda question: completion(longer(question), QUARTER)
    first = server.judge(**ONE_DOLLAR_PER_REQUEST, parallel=1, max_cost=9.0)
    expected = wins(first, *PAIRS)
    assert len(server.questions()) == 6
    replies = used_replies([first])
    assert len(replies) == 6
    shutil.rmtree(reply_cache.FOLDER)
    write_json(reply_cache.SHARED, replies)
    again = server.judge(**ONE_DOLLAR_PER_REQUEST, parallel=1, max_cost=1.5)
    assert wins(again, *PAIRS) == expected
    assert server.questions() == []
    assert sum(again.costs.values()) == 1.5
    assert used_replies([again]) == replies


@pytest.mark.parametrize("text", ["[1, 2]", "{", '{"key": ["A"]}', '{"key": 3}'])
def test_unreadable_shared_replies_are_an_error_that_names_the_file(server, text):
    reply_cache.SHARED.parent.mkdir(exist_ok=True)
    reply_cache.SHARED.write_text(text)
    with pytest.raises(InputError, match=r"reports/replies\.json: not readable.*dvc checkout"):
        server.judge().compare(*PAIRS)


def test_cost_is_input_and_output_tokens_at_their_prices(server):
    server.respond = lambda question: completion("A", {"prompt_tokens": 1000, "completion_tokens": 10})
    judge = server.judge(parallel=1, input_price=100.0, output_price=1000.0, max_cost=1.0)
    with pytest.raises(InputError, match=r"\$0\.2200 of \$1\.0000"):
        judge.compare(["film", "x " * 5000], ["good"] * 2, ["bad"] * 2)  # 2 * (1000 * 100 + 10 * 1000) / 1e6


def test_max_cost_holds_over_several_calls(server):
    server.respond = lambda question: completion(longer(question), QUARTER)
    judge = server.judge(**ONE_DOLLAR_PER_REQUEST, parallel=1, max_cost=1.5)
    for _ in range(3):
        assert wins(judge, ["film"], ["good"], ["bad"]) == [1.0]
    with pytest.raises(InputError, match=r"\$0\.7500 of \$1\.5000"):
        judge.compare(["film 2"], ["good"], ["bad"])


def test_reply_without_usage_counts_with_the_maximum_cost(server):
    with pytest.raises(InputError, match=r"\$2\.0000 of \$2\.5000"):
        server.judge(**ONE_DOLLAR_PER_REQUEST, parallel=1, max_cost=2.5).compare(*PAIRS)
    assert len(server.questions()) == 2


def test_requests_in_flight_count_towards_max_cost(server):
    in_flight, most, lock = 0, 0, threading.Lock()

    def respond(question):
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(0.05)
        with lock:
            in_flight -= 1
        return completion(longer(question), {"prompt_tokens": 1, "completion_tokens": 0})

    server.respond = respond
    assert wins(server.judge(**ONE_DOLLAR_PER_REQUEST, parallel=6, max_cost=2.0), *PAIRS) == LONGER
    assert most == 2


def test_api_key_is_only_in_the_header(server, monkeypatch, caplog, waits):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f"{CANARY}\n")
    server.respond = first_then(failure(500, CANARY), completion(f"You are {CANARY}. A"))
    judge = server.judge(parallel=1)
    judge.compare(["film"], ["good"], ["bad"])
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {CANARY}"}
    said = []
    for number, response in enumerate(
        [failure(401, "x" * 250 + CANARY), failure(500, CANARY), (200, {}, f"<p>{CANARY}"), DROPPED]
    ):
        server.respond = lambda question, response=response: response
        with pytest.raises((InputError, TransientError)) as error:
            judge.compare([f"film {number}"], ["good"], ["bad"])
        said += traceback.format_exception(error.value)
    kept = b"".join(path.read_bytes() for path in reply_cache.FOLDER.iterdir())
    assert b"You are [key]. A" in kept
    assert caplog.text
    for text in (kept.decode(errors="replace"), caplog.text, "".join(said), repr(judge)):
        assert CANARY[:12] not in text


def test_invalid_api_key_is_an_error_that_does_not_show_it(server, monkeypatch):
    for key in (f"{CANARY}\x1b", f"{CANARY}é", f"{CANARY}\n{CANARY}"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(InputError, match="OPENAI_API_KEY") as error:
            server.judge()
        assert CANARY not in str(error.value)
