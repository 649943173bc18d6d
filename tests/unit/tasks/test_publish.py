"""`dpo publish`."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dpo.common.errors import InputError
from dpo.common.files import sha256
from tasks.commands.publish import publish

ROOT = Path(__file__).parents[3]
TRIAL, REPO = "sigmoid-0.1-7e-05-17", "someone/policy"


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub's API that create a repository and commit small files."""

    calls: dict[str, bytes]
    status = 200

    def log_message(self, *words):
        pass

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"id": REPO, "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else self.read_chunks()
        type(self).calls[self.path] = body
        url = f"http://{self.headers['Host']}/{REPO}"
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            self.answer({"success": True, "commitUrl": f"{url}/commit/1", "commitOid": "1"})
        else:
            self.answer({"url": url, "name": REPO, "id": REPO})

    def read_chunks(self):
        parts = []
        while self.headers.get("Transfer-Encoding") == "chunked" and (
            size := int(self.rfile.readline().strip() or b"0", 16)
        ):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)


@pytest.fixture
def hub():
    handler = type("TestHub", (Hub,), {"calls": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    folder = tmp_path / "models" / TRIAL
    shutil.copytree(tiny_model_dir, folder)
    (folder / "provenance.json").write_text(json.dumps({"weights": sha256(*folder.glob("*.safetensors"))}))
    (tmp_path / f"models/{TRIAL}.md").write_text(f'# card\n\nfrom_pretrained("models/{TRIAL}")\n')
    return tmp_path


def run(project, port, *options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": "secret"}
    env.pop("HF_HUB_OFFLINE", None)
    words = [sys.executable, "-m", "tasks.commands.cli", "publish", TRIAL, REPO, *options]
    return subprocess.run(words, cwd=project, env=env, capture_output=True, text=True)


def test_a_dry_run_writes_the_folder_of_the_repository_and_calls_nobody(project, hub):
    port, handler = hub
    done = run(project, port, "--dry-run")
    assert done.returncode == 0, done.stderr
    folder = project / "published" / TRIAL
    assert {file.name for file in (project / "models" / TRIAL).iterdir()} < {
        file.name for file in folder.iterdir()
    }
    assert f'from_pretrained("{REPO}")' in (folder / "README.md").read_text()
    assert "nothing was uploaded" in done.stdout
    assert handler.calls == {}


def test_all_files_are_uploaded_to_a_private_repository(project, hub):
    port, handler = hub
    done = run(project, port)
    assert done.returncode == 0, done.stderr
    created = json.loads(handler.calls["/api/repos/create"])
    assert created.get("private") is True or created.get("visibility") == "private", created
    (commit,) = (body for path, body in handler.calls.items() if "/commit/" in path)
    sent = {row["value"]["path"] for row in map(json.loads, commit.splitlines()) if row["key"] == "file"}
    assert sent == {file.name for file in (project / "published" / TRIAL).iterdir()}
    assert f"vllm serve {REPO}" in done.stdout


def test_the_card_has_the_licence_and_the_folder_a_gguf_file_of_llama_cpp(project, tmp_path, monkeypatch):
    options = {"private": True, "dry_run": True, "license": "apache-2.0", "gguf": True}
    with pytest.raises(InputError, match=r"--gguf: convert_hf_to_gguf\.py is not on the PATH; install llama\.cpp"):
        publish(TRIAL, REPO, **options)
    program = tmp_path / "bin/convert_hf_to_gguf.py"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$4 $5" = "--outtype bf16" ] && cat "$1/config.json" > "$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    publish(TRIAL, REPO, **options)
    folder = Path("published") / TRIAL
    assert (folder / f"{TRIAL}.gguf").read_bytes() == (folder / "config.json").read_bytes()
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
    assert f'from_pretrained("{REPO}")' in (folder / "README.md").read_text()
    program.write_text("#!/bin/sh\necho unknown architecture >&2; exit 1\n")
    with pytest.raises(InputError, match="cannot convert the model; its last output:\nunknown architecture"):
        publish(TRIAL, REPO, **options)


def test_a_refusal_of_the_hub_is_one_message(project, hub):
    port, handler = hub
    handler.status = 403
    done = run(project, port)
    assert done.returncode == 2
    assert f"error: {REPO}: the hub refuses the upload" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_policy_that_is_not_complete_is_refused(project):
    options = {"private": True, "dry_run": True}
    with pytest.raises(InputError, match=r"TRIAL: 'absent' is not a trial"):
        publish("absent", REPO, **options)
    Path(f"models/{TRIAL}.md").rename("card.md")
    with pytest.raises(InputError, match="no model card"):
        publish(TRIAL, REPO, **options)
    Path("card.md").rename(f"models/{TRIAL}.md")
    Path(f"models/{TRIAL}/adapter_config.json").write_text('{"base_model_name_or_path": "models/reference"}')
    with pytest.raises(InputError, match="would not load elsewhere"):
        publish(TRIAL, REPO, **options)
    assert not Path("published").exists()
