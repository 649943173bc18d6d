"""Sampling by servers: one that samples from the tiny model, a fake vLLM command, and vLLM if it is here."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.common.errors import InputError, TransientError
from dpo.config import load_params
from dpo.engine.logprobs import load_model
from dpo.engine.settings import EngineSettings
from dpo.engine.tokenization import prompt_ids
from dpo.evaluation import sampling
from dpo.evaluation.kl import divergence
from dpo.evaluation.server_sampling import check_sampled, openai_endpoint, served_responses
from dpo.evaluation.settings import EvaluateSettings, OpenaiSampler, TransformersSampler, VllmSampler
from tasks import reference_samples
from tests.support.models import chat_tokenizer, make_model
from tests.support.openai_server import FakeServer, failure

ROOT = Path(__file__).parents[3]
CANARY = "canary-sampler-7f3c"
ENGINE = EngineSettings(max_length=128, max_tokens_per_microbatch=2048)
SAMPLING = {"max_new_tokens": 12, "max_prompt_tokens": 100, "max_tokens_per_batch": 4096, "seed": 3}
PROMPTS = ["film", "a much longer prompt about a film that was long", "x", "film"]
CPU_FIX = ("--no-enable-chunked-prefill",)
"""On a CPU, vLLM 0.32.0 ends if it splits the prompt of a request that has a seed."""
VLLM = os.environ.get("VLLM") or shutil.which("vllm")


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


class CompletionServer(FakeServer):
    """A completions server for a model. A test may change temperature and `shape`, which edits the choice."""

    def __init__(self, folder):
        super().__init__(self.complete)
        self.model, self.tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
        self.temperature, self.shape, self.lock = 1.0, lambda choice: choice, threading.Lock()

    def complete(self, body):
        length, ends = body["max_tokens"], body["stop_token_ids"]
        random = torch.rand(1, length, generator=torch.Generator().manual_seed(body["seed"]), dtype=torch.float64)
        with self.lock, torch.no_grad():
            (ids,) = sampling._decode(self.model, [body["prompt"]], random, self.temperature, ends)
        choice = {
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": "stop" if ids[-1] in ends else "length",
            "token_ids": ids,
        }
        return 200, {}, json.dumps({"choices": [self.shape(choice)]})


@pytest.fixture
def server(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAMPLER_API_KEY", raising=False)
    with CompletionServer(tiny_model_dir).running() as server:
        yield server


def served(server, folder, tokenizer, prompts=PROMPTS, **changes):
    sampler = OpenaiSampler(kind="openai", base_url=server.url, parallel=4)
    return served_responses(sampler, ENGINE, folder, tokenizer, prompts, SAMPLING | changes)


def check(folder, tokenizer, prompts, table):
    model, responses = load_model(folder), table["ids"].tolist()
    scores = divergence(model, model, prompt_ids(tokenizer, prompts, 100), responses, 4096)
    check_sampled(scores, [len(ids) for ids in responses], folder)


def test_requests_have_token_ids_and_a_seed_each_and_disable_the_settings_of_the_server(
    server, tiny_model_dir, tokenizer
):
    table = served(server, tiny_model_dir, tokenizer)
    requests = list(server.requests)
    rows = prompt_ids(tokenizer, PROMPTS)
    assert sorted(request.body["prompt"] for request in requests) == sorted(rows)
    assert len({request.body["seed"] for request in requests}) == len(PROMPTS)
    for request in requests:
        body = request.body
        assert request.path == "/v1/completions"
        assert "Authorization" not in request.headers
        assert body["model"] == tiny_model_dir.name
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (1.0, 1.0, -1, 0.0)
        assert (body["repetition_penalty"], body["max_tokens"], body["return_token_ids"]) == (1.0, 12, True)
        assert tokenizer.eos_token_id in body["stop_token_ids"]
    assert table["response"].tolist() == tokenizer.batch_decode(table["ids"].tolist(), skip_special_tokens=True)
    assert served(server, tiny_model_dir, tokenizer).equals(table)
    assert not served(server, tiny_model_dir, tokenizer, seed=4).equals(table)


def test_long_prompts_are_shortened_as_by_the_engine(server, tiny_model_dir, tokenizer):
    served(server, tiny_model_dir, tokenizer, ["film " * 300])
    assert server.requests[0].body["prompt"] == prompt_ids(tokenizer, ["film " * 300], 100)[0]


def test_the_own_sampler_needs_no_server(tiny_model_dir, tokenizer):
    settings = TransformersSampler()
    assert served_responses(settings, ENGINE, tiny_model_dir, tokenizer, PROMPTS, SAMPLING) is None


def test_samples_of_the_checkpoint_pass_the_check(server, tiny_model_dir, tokenizer):
    prompts = PROMPTS * 20
    table = served(server, tiny_model_dir, tokenizer, prompts)
    check(tiny_model_dir, tokenizer, prompts, table)


@pytest.mark.parametrize("fault", ["temperature", "another model"])
def test_samples_of_another_distribution_are_an_error(server, tiny_model_dir, tokenizer, tmp_path, fault):
    prompts = PROMPTS * 20
    if fault == "temperature":
        server.temperature = 0.5
    else:
        changes = {"vocab_size": len(tokenizer), "bos_token_id": None, "max_position_embeddings": 512}
        server.model = load_model(make_model("llama", tmp_path / "other", seed=1, **changes))
    table = served(server, tiny_model_dir, tokenizer, prompts)
    with pytest.raises(InputError, match=r"evaluate\.sampler: the responses are not samples from"):
        check(tiny_model_dir, tokenizer, prompts, table)


@pytest.mark.parametrize("after", [[], [1], [1, 5, 1]])
def test_a_response_ends_with_one_end_token(server, tiny_model_dir, tokenizer, after):
    assert tokenizer.eos_token_id == 1
    server.shape = lambda choice: {
        "text": "",
        "token_ids": choice["token_ids"][:4] + after,
        "finish_reason": "stop",
    }
    table = served(server, tiny_model_dir, tokenizer)
    assert all(len(ids) == 5 and ids[-1] == 1 for ids in table["ids"])
    assert table["finished"].all()


def test_text_without_tokens_is_tokenized_with_a_warning(server, tiny_model_dir, tokenizer, caplog):
    texts = {"film": "Film 3 is a joy.", "x": ""}
    left = list(texts.values())
    server.shape = lambda choice: {"text": left.pop(0), "finish_reason": "stop"}
    sampler = OpenaiSampler(kind="openai", base_url=server.url, parallel=1)
    table = served_responses(sampler, ENGINE, tiny_model_dir, tokenizer, list(texts), SAMPLING)
    own = tokenizer.encode("Film 3 is a joy.", add_special_tokens=False)
    assert table["ids"].tolist() == [[*own, tokenizer.eos_token_id], [tokenizer.eos_token_id]]
    assert table["response"].tolist() == list(texts.values())
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "2 of 2 responses came without `token_ids`" in warning
    assert "log-probs, KL and implicit rewards are approximate" in warning


def test_tokens_that_the_checkpoint_does_not_have_are_an_error(server, tiny_model_dir, tokenizer):
    server.shape = lambda choice: choice | {"token_ids": [len(tokenizer)], "finish_reason": "length"}
    with pytest.raises(InputError, match=r"returned tokens that .* does not have"):
        served(server, tiny_model_dir, tokenizer)


@pytest.mark.parametrize("text", ["<html>", "[]", '{"choices": []}', '{"choices": [{"text": null}]}'])
def test_reply_that_is_not_a_completion_is_an_error(server, tiny_model_dir, tokenizer, text):
    server.answer = lambda body: (200, {}, text)
    with pytest.raises(InputError, match=r"evaluate\.sampler: the reply of .*/v1/completions is not a completion"):
        served(server, tiny_model_dir, tokenizer)


@pytest.mark.parametrize(
    ("status", "fix"), [(400, "accepts token ids"), (401, "set SAMPLER_API_KEY"), (404, "under this name")]
)
def test_rejected_request_is_an_error_with_a_fix(server, tiny_model_dir, tokenizer, status, fix):
    server.answer = lambda body: failure(status, "no")
    with pytest.raises(InputError, match=rf"evaluate\.sampler: .* status {status}: .*; .*{fix}"):
        served(server, tiny_model_dir, tokenizer)


def test_transient_faults_are_retried_and_then_a_transient_error(server, tiny_model_dir, tokenizer, waits):
    left = [failure(503, "busy")] * 2
    server.answer = lambda body: left.pop() if left else server.complete(body)
    assert len(served(server, tiny_model_dir, tokenizer)) == len(PROMPTS)
    server.answer = lambda body: failure(503, "busy")
    with pytest.raises(TransientError, match=r"did not reply in 8 attempts, status 503: .*busy"):
        served(server, tiny_model_dir, tokenizer)


def test_api_key_is_only_in_the_header(server, tiny_model_dir, tokenizer, monkeypatch, caplog, waits):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SAMPLER_API_KEY", CANARY)
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-judge")
    served(server, tiny_model_dir, tokenizer)
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {CANARY}"}
    said = [caplog.text, repr(openai_endpoint(OpenaiSampler(kind="openai", base_url=server.url)))]
    for response in (failure(401, CANARY), failure(500, CANARY), (200, {}, CANARY)):
        server.answer = lambda body, response=response: response
        with pytest.raises((InputError, TransientError)) as error:
            served(server, tiny_model_dir, tokenizer)
        said += traceback.format_exception(error.value)
    assert CANARY not in "".join(said)


def test_reference_samples_come_from_the_server_and_are_checked(server, tiny_model_dir, tokenizer):
    params = load_params(ROOT / "params.yaml")
    sampler = OpenaiSampler(kind="openai", base_url=server.url, model="{name}-1", parallel=4)
    evaluate = dataclasses.replace(params.evaluate, sampler=sampler)
    params = dataclasses.replace(params, evaluate=evaluate)
    table = reference_samples.sample_responses(params, tiny_model_dir, tokenizer, PROMPTS * 20, 12)
    assert {request.body["model"] for request in server.requests} == {f"{tiny_model_dir.name}-1"}
    assert len(table) == 4 * 20
    server.temperature = 0.5
    with pytest.raises(InputError, match="not samples from"):
        reference_samples.sample_responses(params, tiny_model_dir, tokenizer, PROMPTS * 20, 12)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("transformers", TransformersSampler()),
        ("vllm", VllmSampler(kind="vllm")),
        ({"kind": "vllm", "arguments": ["-q", "fp8"]}, VllmSampler(kind="vllm", arguments=("-q", "fp8"))),
        (
            {"kind": "openai", "base_url": "http://host/v1", "model": "m"},
            OpenaiSampler(kind="openai", base_url="http://host/v1", model="m"),
        ),
    ],
)
def test_a_sampler_is_a_name_or_a_section(value, expected):
    values = json.dumps({"samples": 1, "max_new_tokens": 1, "sampler": value})
    assert TypeAdapter(EvaluateSettings).validate_json(values).sampler == expected


# ---------------------------------------------------------------- vLLM

FAKE_VLLM = f"""#!{sys.executable}
import http.server, json, os, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
with open("started.json", "w") as file:
    json.dump([sys.argv[1:], os.environ["VLLM_API_KEY"], "RANK" in os.environ, os.getpid()], file)
print("loading the model", flush=True)
if "--fail" in sys.argv:
    sys.exit("no memory for the cache")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(b"")
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer " + os.environ["VLLM_API_KEY"] or "--die" in sys.argv:
            print("engine core died", flush=True)
            os._exit(3)
        time.sleep(300 if "--hang" in sys.argv else 0)
        ids = [*body["prompt"][-2:], body["stop_token_ids"][0]]
        choice = {{"text": "", "token_ids": ids, "finish_reason": "stop"}}
        self.reply(json.dumps({{"choices": [choice]}}).encode())
    def reply(self, text):
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch, waits):
    """Return a function that samples with a fake vLLM command, and what it was started with."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "vllm"
    path.write_text(FAKE_VLLM)
    path.chmod(0o755)
    return path


def started():
    arguments, key, has_rank, pid = json.loads(Path("started.json").read_text())
    return SimpleNamespace(arguments=arguments, key=key, has_rank=has_rank, pid=pid)


def vllm_responses(executable, folder, tokenizer, *arguments, precision="fp32", **options):
    sampler = VllmSampler(kind="vllm", executable=str(executable), arguments=arguments, **options)
    engine = EngineSettings(max_length=128, max_tokens_per_microbatch=2048, precision=precision)
    return served_responses(sampler, engine, folder, tokenizer, PROMPTS, SAMPLING)


def test_vllm_is_started_for_the_checkpoint_and_stopped(fake_vllm, tiny_model_dir, tokenizer, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    table = vllm_responses(fake_vllm, tiny_model_dir, tokenizer, "--tensor-parallel-size", "2", precision="bf16")
    rows = prompt_ids(tokenizer, PROMPTS)
    assert [ids[:2] for ids in table["ids"]] == [row[-2:] for row in rows]
    server = started()
    words = " ".join(server.arguments)
    assert words.startswith(f"serve {tiny_model_dir} --host 127.0.0.1 --port ")
    assert "--generation-config vllm --dtype bfloat16 --max-model-len 128 --served-model-name policy" in words
    assert words.endswith("--tensor-parallel-size 2")
    assert len(server.key) == 32
    assert server.key not in words
    assert not server.has_rank
    assert not psutil.pid_exists(server.pid)
    assert Path(f".vllm/{tiny_model_dir.name}.log").read_text() == "loading the model\n"


def test_an_adapter_is_served_on_its_base_model(fake_vllm, tiny_model_dir, tokenizer, tmp_path):
    adapter = tmp_path / "policy-1"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(tiny_model_dir), "r": 12, "rank_pattern": {"q_proj": 20}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    vllm_responses(fake_vllm, adapter, tokenizer)
    words = " ".join(started().arguments)
    assert words.startswith(f"serve {tiny_model_dir} ")
    assert f"--enable-lora --lora-modules policy={adapter} --max-lora-rank 32" in words


def test_missing_vllm_is_an_error(tiny_model_dir, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"evaluate\.sampler\.executable: 'no-vllm' not found; install vLLM"):
        vllm_responses("no-vllm", tiny_model_dir, tokenizer)


def test_vllm_that_does_not_start_is_an_error_with_its_last_lines(fake_vllm, tiny_model_dir, tokenizer):
    with pytest.raises(InputError, match=r"(?s)vLLM ended with code 1; .*\.vllm/model\.log:.*no memory"):
        vllm_responses(fake_vllm, tiny_model_dir, tokenizer, "--fail")


def test_vllm_that_is_not_ready_in_time_is_stopped(fake_vllm, tiny_model_dir, tokenizer):
    fake_vllm.write_text(FAKE_VLLM.replace("print(", "time.sleep(300)\nprint(", 1))
    with pytest.raises(InputError, match=r"start_minutes: vLLM was not ready after 0\.05 minutes"):
        vllm_responses(fake_vllm, tiny_model_dir, tokenizer, start_minutes=0.05)
    assert not psutil.pid_exists(started().pid)


def test_vllm_that_ends_while_it_samples_is_a_transient_error_with_its_last_lines(
    fake_vllm, tiny_model_dir, tokenizer
):
    with pytest.raises(TransientError, match=r"(?s)vLLM ended with code 3; .*engine core died"):
        vllm_responses(fake_vllm, tiny_model_dir, tokenizer, "--die")


SAMPLE_WITH_VLLM = """
import sys
from pathlib import Path
from tests.unit.evaluation.test_server_sampling import vllm_responses
from transformers import AutoTokenizer
folder = Path(sys.argv[2])
vllm_responses(sys.argv[1], folder, AutoTokenizer.from_pretrained(folder), "--hang")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.skipif(sys.platform != "linux", reason="after SIGKILL only Linux ends the server")
def test_vllm_ends_with_a_stage_that_is_killed(fake_vllm, tiny_model_dir, number):
    stage = subprocess.Popen(
        [sys.executable, "-c", SAMPLE_WITH_VLLM, str(fake_vllm), str(tiny_model_dir)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 60
    while not Path(".vllm/model.log").exists() or "loading" not in Path(".vllm/model.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    stage.send_signal(number)
    assert stage.wait(60) == -number
    server = started().pid
    while psutil.pid_exists(server) and psutil.Process(server).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="vLLM is neither on PATH nor named by the variable VLLM")
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_responses_of_vllm_are_samples_of_the_checkpoint(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    tokenizer = chat_tokenizer()
    end = tokenizer.eos_token_id
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 128, "max_position_embeddings": 512}
    ends = {"eos_token_id": end, "pad_token_id": end, "bos_token_id": None}
    folder = make_model("llama", Path("models/reference"), **sizes, **ends, initializer_range=0.1)
    tokenizer.save_pretrained(folder)
    if kind == "adapter":
        base = AutoModelForCausalLM.from_pretrained(folder)
        settings = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
        folder = Path("models/policy")
        get_peft_model(base, settings).save_pretrained(folder)
    prompts = PROMPTS * 64
    sampler, sampling = (
        VllmSampler(kind="vllm", executable=VLLM, arguments=CPU_FIX),
        SAMPLING | {"max_new_tokens": 28},
    )
    table = served_responses(sampler, ENGINE, folder, tokenizer, prompts, sampling)
    assert 0 < table["finished"].sum() < len(table)
    assert all(len(ids) == 28 or ids[-1] == end for ids in table["ids"])
    assert len({tuple(ids) for ids in table["ids"]}) > 0.9 * len(table)
    check(folder, tokenizer, prompts, table)
    if kind == "adapter":
        with pytest.raises(InputError, match=r"not samples from models/reference"):
            check(Path("models/reference"), tokenizer, prompts, table)
