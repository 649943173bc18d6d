"""Code from models, data and responses is never executed, and no secret is written to a file."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.data import sources
from dpo.data.settings import DataSettings
from dpo.engine.base_model import load_base, load_checkpoint
from dpo.engine.settings import ModelSettings
from dpo.evaluation.judges.reward_model import RewardModel
from dpo.evaluation.settings import RewardModelSettings
from tests.support.project import ENV, TRIAL, change, execute, make_project
from tools.licences import permitted

ROOT = Path(__file__).parents[2]


class Payload:
    """An object that writes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("ran").absolute(),)


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload()}, folder / "pytorch_model.bin")


def coded(folder, file="config.json", **values):
    """Add Python code that the model's configuration names."""
    settings = json.loads((folder / file).read_text())
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    names = dict.fromkeys(kinds, "own.Own") | {"AutoTokenizer": ["own.Own", "own.Own"]}
    settings |= {"auto_map": names, **values}
    (folder / file).write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(Path('ran').absolute())!r}).touch()\n")


HOSTILE = {
    "pickle": (pickled, ["pytorch_model.bin", "convert them to safetensors"]),
    "code of a model": (lambda folder: coded(folder, model_type="own"), ["is never run", "part of transformers"]),
    "code of a tokenizer": (
        lambda folder: coded(folder, "tokenizer_config.json", tokenizer_class="Own"),
        ["is never run", "part of transformers"],
    ),
    "no safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), ["cannot load"]),
}


@pytest.fixture
def own(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(tiny_model_dir, tmp_path / "models/own/tiny").relative_to(tmp_path)


LOADS = {
    "model.base": lambda name: load_base(ModelSettings(base=name, revision=None)),
    "evaluate.judges.0.model": lambda name: RewardModel(
        RewardModelSettings(kind="reward_model", model=name), "evaluate.judges.0"
    )(["a"], ["b"]),
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("place", LOADS)
def test_code_in_a_model_folder_is_not_executed(own, hostile, place, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers asks before it runs code
    prepare, words = HOSTILE[hostile]
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"num_labels": 1, "id2label": {"0": "score"}}))
    prepare(own)
    with pytest.raises(InputError) as error:
        LOADS[place](str(own))
    assert all(word in str(error.value) for word in (place, str(own), *words)), error.value
    assert not Path("ran").exists()


def test_code_next_to_a_known_architecture_is_ignored(own):
    coded(own)
    model, _ = load_base(ModelSettings(base=str(own), revision=None))
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert not Path("ran").exists()


def test_pickled_adapter_is_an_error(own):
    lora = LoraConfig(r=2, target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(own), lora).save_pretrained("adapter")
    assert load_checkpoint(Path("adapter")) is not None
    Path("adapter/adapter_model.safetensors").unlink()
    torch.save({"base_model": Payload()}, "adapter/adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin.*convert them to safetensors"):
        load_checkpoint(Path("adapter"))
    assert not Path("ran").exists()


def test_no_setting_enables_remote_code(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    for group in ("model:\n", "data:\n"):
        (tmp_path / "params.yaml").write_text(text.replace(group, f"{group}  trust_remote_code: true\n"))
        with pytest.raises(InputError, match="trust_remote_code: unknown key"):
            load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("kind", ["script", "pickle"])
def test_data_set_with_code_or_a_pickle_is_an_error(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    hub = tmp_path / "elsewhere/pairs"
    hub.mkdir(parents=True)
    if kind == "script":
        (hub / "pairs.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    else:
        pd.to_pickle({"prompt": Payload()}, hub / "train.pkl")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, revision: load(str(hub)))
    params = load_params(ROOT / "params.yaml").data
    params = DataSettings(**{**vars(params), "source": "someone/pairs", "revision": "main"})
    with pytest.raises(InputError, match=r"data\.source: cannot load 'someone/pairs'"):
        list(sources.read_source(params, 0))
    assert not (tmp_path / "ran").exists()


OWNED = "document.documentElement.dataset.owned=1"
SCRIPTS = [
    f"<script>{OWNED}</script>",
    f"</script><script>{OWNED}</script>",
    f'"><img src=x onerror="{OWNED}">',
    f"'><svg onload='{OWNED}'>",
    f"</textarea></style><iframe srcdoc='<script>parent.{OWNED}</script>'></iframe>",
    f"<!--{{{{ 7*7 }}}} {{% raw %}} ${{{OWNED}}} `{OWNED}`",
    f"--><a autofocus onfocus={OWNED} href=javascript:{OWNED}>x</a>\u2028",
]
CANARIES = {
    "OPENAI_API_KEY": "canary-key-5d1f",
    "SAMPLER_API_KEY": "canary-key-6a2b",
    "AWS_SECRET_ACCESS_KEY": "canary-secret-83ab",
    "MLFLOW_TRACKING_PASSWORD": "canary-password-17c2",
    "HF_TOKEN": "canary-token-9e04",
}


STAGES = [
    "fetch_model", "ingest", "validate", "tokens", "sft", "reference_logprobs", "reference_samples",
    "train", "evaluate", "compare"
]  # fmt: skip
ALL_STAGES = f"""
import importlib, sys
for stage in {STAGES}:
    sys.argv = [stage] + (["{TRIAL}"] if stage in ("train", "evaluate") else [])
    importlib.import_module("tasks." + stage).main()
"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, tiny_model_dir):
    """Run all stages, with secrets in the environment, on a model and data with scripts in names and texts."""
    folder = make_project(tmp_path_factory.mktemp("hostile"), tiny_model_dir)
    name = SCRIPTS[2].replace("/", "")
    (folder / "models/own/tiny").rename(folder / f"models/own/{name}")
    (folder / "data/own/pairs.jsonl").unlink()
    texts = [(f"{script} {number}", script) for number in range(6) for script in SCRIPTS]
    rows = [{"prompt": f"Say {t}", "chosen": f"Joy {t}", "rejected": f"Bore {t}", "source": s} for t, s in texts]
    rows = [{**row, "split": "eval" if number % 3 else "train"} for number, row in enumerate(rows)]
    rows += [{**row, "id": script, "split": script} for row, script in zip(rows, SCRIPTS, strict=False)]
    rows += [{**row, "id": row["prompt"], "rejected": row["chosen"]} for row in rows[:7]]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / f"data/own/{name}.jsonl").write_text(f"{lines}{SCRIPTS[0]}\n")
    names = {"model.base": f"models/own/{name}", "data.source": f"data/own/{name}.jsonl"}
    change(folder, {**names, "validate.max_quarantined": 0.9})
    done = subprocess.run(
        [sys.executable, "-c", ALL_STAGES],
        cwd=folder,
        env={**ENV, **CANARIES},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.slow
def test_no_secret_is_written_to_a_file(hostile):
    files = [path for path in hostile.rglob("*") if path.is_file()]
    assert {"mlflow.db", "provenance.json", "index.html", "output.txt"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert [name for name, value in CANARIES.items() if value.encode() in content] == [], path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", "https://someone:canary@example.org/pairs.jsonl"),
        ("data.source", ["data/own/a.jsonl", "s3://canary@bucket/b.jsonl"]),
        ("model.base", "https://canary@example.org/model"),
        ("evaluate.judges", [{"kind": "llm", "base_url": "http://a:canary@127.0.0.1:8000/v1"}]),
    ],
)
def test_credentials_in_an_address_are_an_error_that_does_not_show_them(tmp_path, key, value):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    change(tmp_path, {key: value})
    with pytest.raises(InputError, match=rf"params\.yaml: {key}.*set them in the environment") as error:
        load_params(tmp_path / "params.yaml")
    assert "canary" not in str(error.value)


def dom(page):
    """Return the page's HTML after headless Chromium has run its scripts."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("Chromium is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    profile = f"--user-data-dir={page.parent / '.profile'}"
    command = [browser, *flags, profile, "--virtual-time-budget=5000", page.absolute().as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def script_ran(page):
    return "data-owned" in re.search(r"<html[^>]*>", page)[0]


def test_script_in_an_unescaped_page_is_detected(tmp_path):
    (tmp_path / "page.html").write_text(f'<html><body><p title="{SCRIPTS[2]}"></p></body></html>')
    assert script_ran(dom(tmp_path / "page.html"))


@pytest.mark.slow
def test_scripts_in_data_model_and_responses_do_not_run_in_the_reports(hostile):
    for samples in (hostile / f"samples/{TRIAL}.parquet", hostile / "samples/reference.parquet"):
        table = pd.read_parquet(samples)
        responses = [name for name in table.columns if name in ("response", "reference_response")]
        table[responses] = [[f"{SCRIPTS[i % 7]} {i}"] * len(responses) for i in range(len(table))]
        samples.unlink()
        table.to_parquet(samples)
    execute(hostile, sys.executable, "-m", "tasks.compare")
    for name in ("index.html", "validate.html"):
        page = dom(hostile / "reports" / name)
        assert not script_ran(page), name
        assert "{{ 7*7 }}" in page, name
        assert f"onerror=&quot;{OWNED}" in page or f'onerror="{OWNED}"&gt;' in page, name


def test_requirements_are_locked_with_hashes():
    entries = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for entry in re.split(r"\n(?=[^\s#])", path.read_text())[1:]:
            name, version = re.match(r"([\w.-]+)==([\w.+-]+)", entry).groups()
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), f"{path}: {name}"
            entries.setdefault(name, set()).add(version.split("+")[0])
    assert [name for name, found in entries.items() if len(found) > 1] == [], "torch.txt, torch-cpu.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    for requirement in map(Requirement, required):
        (version,) = entries[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement}: run `make lock`"


@pytest.mark.parametrize(
    ("stated", "free"),
    [
        ("MIT", True),
        ("BSD-3-Clause AND Zlib", True),
        ("Apache Software License", True),
        ("MPL-2.0", True),
        ("GPL-3.0-or-later", False),
        ("MIT OR GPL-2.0", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("Proprietary", False),
        ("permitted", False),
        ("", False),
    ],
)
def test_unknown_or_copyleft_licence_needs_a_stated_reason(stated, free):
    assert permitted("some-package", stated) is free
    assert permitted("pygit2", stated)


def test_bandit_finds_no_issue():
    command = [sys.executable, "-m", "bandit", "--quiet", "--recursive", "--configfile", "pyproject.toml"]
    execute(ROOT, *command, "dpo", "tasks", "flows", "tools")
