"""A vLLM server for one checkpoint, as a subprocess."""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from dpo.common.errors import InputError, TransientError
from dpo.engine.pretrained import ADAPTER_CONFIG, adapter_base, read_adapter_config
from dpo.engine.settings import EngineSettings
from dpo.evaluation.endpoint import Endpoint
from dpo.evaluation.settings import VllmSampler

LOGS = Path(".vllm")
NAME = "policy"
"""Name of the checkpoint on the server."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's option --max-lora-rank."""
OF_THE_STAGE = ("GLIBC_TUNABLES", "LOCAL_", "MASTER_", "RANK", "ROLE_", "GROUP_", "TORCHELASTIC_", "WORLD_SIZE")
"""Starts of variables that concern the stage and its launch; vLLM would read those of torchrun."""
GRACE_SECONDS, POLL_SECONDS = 30, 0.5


@contextmanager
def vllm_server(folder: Path, sampler: VllmSampler, engine: EngineSettings, where: str) -> Iterator[Endpoint]:
    """Start vLLM for the checkpoint in a folder and yield its endpoint. Stop it at the end, on errors and signals.

    The server listens on this machine only and requires a random key. Its output is in `.vllm/FOLDER.log`.

    Raises:
        InputError: the executable is missing, or the server ends or is not ready in time.
        TransientError: the server ends while it samples.
    """
    log = LOGS / f"{folder.name}.log"
    log.parent.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    key = secrets.token_hex(16)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(OF_THE_STAGE)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [_executable(sampler, where), *_arguments(folder, engine, port), *sampler.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables | {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1"},
            start_new_session=True,
            preexec_fn=_end_with_the_stage() if sys.platform == "linux" else None,
        )
    try:
        with _stopped_by_signals(process):
            _wait_until_ready(process, port, sampler.start_minutes, log, where)
            url = f"http://127.0.0.1:{port}/v1"
            yield Endpoint(url, "completions", where, "", {}, f"{log} is the server's log", api_key=key)
    except TransientError as error:
        if process.poll() is None:
            raise
        raise TransientError(f"{where}: {_ending(process, log)}") from error
    finally:
        _stop(process)


def _executable(sampler: VllmSampler, where: str) -> str:
    found = shutil.which(sampler.executable)
    if found is None:
        fix = "install vLLM, in an environment of its own if its version of torch differs, and set its path"
        raise InputError(f"{where}.executable: '{sampler.executable}' not found; {fix}")
    return found


def _arguments(folder: Path, engine: EngineSettings, port: int) -> list[str]:
    """Return the arguments of vLLM. `--generation-config vllm` ignores the model's own generation settings."""
    words = ["--host", "127.0.0.1", "--port", str(port), "--generation-config", "vllm"]
    words += ["--dtype", DTYPES[engine.precision], "--max-model-len", str(engine.max_length)]
    words += ["--quantization", "bitsandbytes"] if engine.quantization == "nf4" else []
    if not (folder / ADAPTER_CONFIG).is_file():
        return ["serve", str(folder), *words, "--served-model-name", NAME]
    base, revision = _without_adapter(folder) if (folder / "config.json").is_file() else adapter_base(folder)
    config = read_adapter_config(folder)
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    allowed = next((each for each in RANKS if each >= rank), rank)
    words += ["--enable-lora", "--lora-modules", f"{NAME}={folder}", "--max-lora-rank", str(allowed)]
    return ["serve", str(base), *(["--revision", revision] if revision else []), *words]


def _without_adapter(folder: Path) -> tuple[Path, None]:
    """Return a folder with links to the base model of a folder that has both. vLLM would load both as weights."""
    base = LOGS / f"{folder.name}-base"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith("adapter_"):
            (base / file.name).symlink_to(file.resolve())
    return base, None


def _end_with_the_stage() -> Any:
    """Return a function for the new process: Linux sends it SIGTERM if the stage ends, even by SIGKILL."""
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def _stopped_by_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Inside the block, stop the server on SIGTERM, before the signal has its usual effect."""

    def stop(number: int, _: Any) -> None:
        _stop(process)
        signal.signal(number, before)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, minutes: float, log: Path, where: str) -> None:
    deadline = time.monotonic() + 60 * minutes
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise InputError(f"{where}: {_ending(process, log)}")
            with suppress(httpx.RequestError):
                if client.get(f"http://127.0.0.1:{port}/health").is_success:
                    return
            time.sleep(POLL_SECONDS)
    raise InputError(
        f"{where}.start_minutes: vLLM was not ready after {minutes:g} minutes; see {log}, or raise it"
    )


def _ending(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the exit code of the server and the last lines of its log, those with errors if there are some."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line]
    text = "\n".join((errors or lines)[-10:])
    return f"vLLM ended with code {process.returncode}; from its log, {log}:\n{text}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the server's process group, and SIGKILL to what is left of it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
