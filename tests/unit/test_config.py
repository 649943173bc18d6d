"""params.yaml: every key is known, typed and in range, or one line says which is not."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dpo.common.errors import InputError
from dpo.config import load_params
from dpo.training.losses import LOSSES, Ipo, Robust

PARAMS = Path(__file__).parents[2] / "params.yaml"


def assert_one_fault(path, words):
    """Assert that reading a file raises one line with the file's name that starts with `words`."""
    with pytest.raises(InputError) as error:
        load_params(path)
    assert str(error.value).startswith(f"{path}: {words}")
    assert len(str(error.value).splitlines()) == 1


def leaves(value, above=""):
    """The dotted keys of a nested mapping; an empty mapping is a leaf."""
    if not isinstance(value, dict) or not value:
        return {above}
    return set().union(*(leaves(inner, f"{above}.{key}".strip(".")) for key, inner in value.items()))


def test_params_yaml_shows_at_most_sixty_settings():
    assert len(leaves(YAML(typ="safe").load(PARAMS))) <= 60


def test_settings_that_params_yaml_does_not_list_have_defaults(change):
    params = load_params(change("validate", {}))
    assert params.validate.actions["mojibake"] == "quarantine"
    assert load_params(change("validate", {"rules": {"mojibake": "warn"}})).validate.actions["mojibake"] == "warn"
    assert load_params(change("run", ABSENT)).run.checkpoint_minutes == 5


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "engine.tokens_per_batch",
            1024,
            "engine.tokens_per_batch: renamed; use engine.max_tokens_per_micro",
        ),
        ("sft.warmup_steps", 4, "sft.warmup_steps: renamed; use sft.warmup_ratio, a share of the steps"),
        ("compare.signs", {}, "compare.signs: renamed; use compare.guardrails"),
        ("model.base", "embedded", "model.base: the value embedded is renamed; use default"),
        ("data.source", "embedded", "data.source: the value embedded is renamed; use default"),
        ("evaluate.judge", None, "evaluate.judge: renamed; use evaluate.judges, a list"),
        ("dpo.reference", "online", "dpo.reference: removed: reference log-probs always come from the cache"),
        ("evaluate.temperature", 1.0, "evaluate.temperature: removed: responses are always sampled at temp"),
    ],
)
def test_a_key_of_an_earlier_version_names_its_successor(change, key, value, words):
    assert_one_fault(change(key, value), words)


def test_values_arrive_as_written():
    params, written = load_params(PARAMS), YAML(typ="safe").load(PARAMS)
    assert params.seed == written["seed"]
    assert params.sweep.betas == tuple(written["sweep"]["betas"])
    assert params.sft.learning_rate == written["sft"]["learning_rate"]
    assert list(map(dataclasses.asdict, params.evaluate.judges)) == written["evaluate"]["judges"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1


@pytest.fixture
def change(tmp_path):
    """Write a params.yaml that differs from the real one in one key, and give its path."""

    def write(key, value):
        path = tmp_path / "params.yaml"
        values = YAML(typ="safe").load(PARAMS)
        *groups, name = key.split(".")
        target = values
        for group in groups:
            target = target[group]
        if value is ABSENT:
            del target[name]
        else:
            target[name] = value
        YAML().dump(values, path)
        return path

    return write


ABSENT = type(None)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dpo.epoch", 1, "dpo.epoch: unknown key"),
        ("model.revison", "main", "model.revison: unknown key"),
        ("extra", {"a": 1}, "extra: unknown key"),
        ("seed", "17", "seed: input should be a valid integer, got '17'"),
        ("seed", 1.5, "seed: input should be a valid integer, got 1.5"),
        ("sft.epochs", True, "sft.epochs: input should be a valid integer, got True"),
        ("data.min_rating_gap", math.inf, "data.min_rating_gap: input should be a finite number"),
        ("sweep.betas", [0.1, 0.10], "sweep.betas: value error, the same value appears twice"),
        ("seed", 2**32, "seed: input should be less than 4294967296"),
        ("model.base", 3, "model.base: input should be a valid string, got 3"),
        ("sft.learning_rate", "fast", "sft.learning_rate: input should be a valid number, got 'fast'"),
        (
            "dpo.optimizer",
            "adam",
            "dpo.optimizer: input should be 'adamw', 'rmsprop', 'adamw_8bit' or 'paged_adamw_8bit', got 'adam'",
        ),
        ("sft.completions", "rejected", "sft.completions: input should be 'both' or 'chosen'"),
        ("engine", 512, "engine: "),
        ("engine.max_length", ABSENT, "engine.max_length: missing; add it"),
        ("evaluate", ABSENT, "evaluate: missing; add it"),
        ("seed", -1, "seed: input should be greater than or equal to 0, got -1"),
        (
            "engine.max_tokens_per_microbatch",
            0,
            "engine.max_tokens_per_microbatch: input should be greater than 0, got 0",
        ),
        ("data.eval_fraction", 1, "data.eval_fraction: input should be less than 1, got 1"),
        ("data.max_train_pairs", 0, "data.max_train_pairs: input should be greater than 0, got 0"),
        ("sft.warmup_ratio", -0.1, "sft.warmup_ratio: input should be greater than or equal to 0, got -0.1"),
        ("dpo.warmup_ratio", 1.0, "dpo.warmup_ratio: input should be less than 1, got 1.0"),
        ("sweep.betas", [], "sweep.betas: "),
        ("sweep.losses", ["sigmoid", "none"], "sweep.losses.1: input should be 'sigmoid', 'ipo'"),
        ("sweep.seeds", [1, 1], "sweep.seeds: value error, the same value appears twice"),
        (
            "losses.robust",
            {"label_smoothing": 0.5},
            "losses.robust.label_smoothing: must be agreement, or a number at least 0",
        ),
        ("losses.sigmoid", {"label_smoothing": 0.1}, "losses.sigmoid.label_smoothing: unknown key"),
        ("losses.none", {}, "losses.none: unknown key"),
        ("evaluate.judges", [{"kind": "scoer"}], "evaluate.judges.0: input tag 'scoer'"),
        ("evaluate.judges", [{"kind": "scorer"}], "evaluate.judges.0.scorer.function: missing; add it"),
        ("evaluate.judges", [], "compare.select: win_rate needs a judge; add one to evaluate.judges, or"),
        ("sft", 3, "sft: "),
        ("sft.split", "train", "sft.split has no effect without sft.source; set sft.source, or remove it"),
        ("sft.source", "default", "sft.source: default has no demonstrations; name files, or set it to null"),
        ("model.adapter", "keep", "model.adapter: input should be 'merge' or 'continue', got 'keep'"),
        ("model.adapter", "continue", "sft: must be null with model.adapter: continue; the reference is the base"),
        (
            "evaluate.max_new_tokens",
            "all",
            "evaluate.max_new_tokens: must be auto or an integer above 0, got 'all'",
        ),
        ("evaluate.max_new_tokens", 512, "evaluate.max_new_tokens: 512 leaves no room for a prompt in engine.max"),
    ],
)
def test_each_fault_is_one_line_with_file_key_and_reason(change, key, value, words):
    assert_one_fault(change(key, value), words)


@pytest.mark.parametrize("beta", [0, -0.1, "0.1", None])
def test_a_bad_beta_is_named_by_its_place(change, beta):
    path = change("sweep.betas", [0.1, beta])
    with pytest.raises(InputError) as error:
        load_params(path)
    assert all(line.startswith(f"{path}: sweep.betas.1") for line in str(error.value).splitlines())


def test_whole_numbers_are_betas_and_null_lifts_a_limit(change):
    assert load_params(change("sweep.betas", [1, 0.5])).sweep.betas == (1, 0.5)
    assert load_params(change("data.max_train_pairs", None)).data.max_train_pairs is None


def test_all_faults_are_told_at_once(tmp_path):
    path = tmp_path / "params.yaml"
    text = PARAMS.read_text().replace("seed: 17", "seed: x").replace("  samples: ", "  sampels: ")
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_params(path)
    assert {line.removeprefix(f"{path}: ").split(":")[0] for line in str(error.value).splitlines()} == {
        "seed",
        "evaluate.samples",
        "evaluate.sampels",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: [1", "line 1"),
        ("seed: 1\nseed: 2\n", "seed"),
        ("", "top level"),
        ("- 1\n", "top level"),
    ],
)
def test_a_file_that_is_no_set_of_parameters_is_one_line(tmp_path, text, words):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_params(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "\n" not in message


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"params\.yaml.*No such file"):
        load_params(tmp_path / "params.yaml")


def test_not_a_number_is_no_number(change):
    path = change("data.min_rating_gap", float("nan"))
    with pytest.raises(InputError, match=r"data\.min_rating_gap: .* got nan"):
        load_params(path)


def test_a_date_is_read_as_a_word(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.read_text().replace("revision: null", "revision: 2024-01-01", 1))
    assert load_params(path).model.revision == "2024-01-01"


def test_a_key_that_is_no_word_is_named(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.read_text() + "? [a, b]\n: 1\n")
    with pytest.raises(InputError, match=r"params\.yaml: keys must be"):
        load_params(path)


def test_losses_that_the_section_omits_have_their_defaults(change):
    losses = load_params(change("losses", {"sigmoid": {}, "robust": {"label_smoothing": 0.3}})).losses
    assert losses == {name: cls() for name, cls in LOSSES.items()} | {"robust": Robust(label_smoothing=0.3)}


def test_a_loss_of_the_sweep_that_the_section_omits_is_named_with_the_fix(change):
    assert_one_fault(change("sweep.losses", ["sigmoid", "wpo"]), "losses.wpo: missing, but sweep.losses uses it")


def sweep_of(change, losses, reference_free, **settings):
    sections = {name: {} for name in ("sigmoid", "ipo", "simpo", "weighted_sum")} | settings
    sweep = YAML(typ="safe").load(PARAMS)["sweep"]
    path = change("sweep", sweep | {"losses": losses, "reference_free_losses": reference_free})
    params = YAML(typ="safe").load(path)
    YAML().dump(params | {"losses": sections}, path)
    return path


@pytest.mark.parametrize(
    ("losses", "reference_free", "settings", "fault"),
    [
        (["sigmoid", "simpo"], [], {}, "sweep.losses: simpo needs no reference log-probs; move it to sweep."),
        (["simpo"], ["simpo"], {}, "sweep.losses: simpo needs no reference log-probs"),
        ([], ["ipo"], {}, "sweep.reference_free_losses: ipo needs reference log-probs; move it to sweep.losses"),
        ([], ["weighted_sum"], {}, "sweep.reference_free_losses: weighted_sum needs reference log-probs"),
        (["weighted_sum"], [], {"weighted_sum": {"weights": {"simpo": 1.0}}}, "sweep.losses: weighted_sum"),
        ([], ["sft"], {}, "losses.sft: missing, but sweep.reference_free_losses uses it"),
        ([], [], {}, "sweep.losses: the sweep has no loss; name one here"),
    ],
)  # fmt: skip
def test_a_loss_is_in_the_list_that_says_whether_it_needs_reference_log_probs(
    change, losses, reference_free, settings, fault
):
    assert_one_fault(sweep_of(change, losses, reference_free, **settings), fault)


@pytest.mark.parametrize(("losses", "reference_free"), [(["ipo"], ["simpo"]), ([], ["simpo"]), (["ipo"], [])])
def test_trials_are_those_of_both_lists(change, losses, reference_free):
    trials = load_params(sweep_of(change, losses, reference_free)).trials()
    assert [trial.loss.name for trial in trials] == [name for name in losses + reference_free for _ in range(3)]


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        (
            "sweep.losses",
            ["custom"],
            "losses.custom.function: '' cannot be imported: it is not in",
        ),
        (
            "evaluate.judges",
            [{"kind": "scorer", "function": "a:b"}],
            "evaluate.judges.0.function: 'a:b' cannot be",
        ),
        ("feedback", {"kind": "scorer", "function": "a:b"}, "feedback.function: 'a:b' cannot be imported"),
    ],
)
def test_functions_of_losses_and_judges_are_checked_with_the_settings(change, key, value, fault):
    path = change(key, value)
    text = path.read_text()
    path.write_text(text.replace("  sigmoid: {}", "  sigmoid: {}\n  custom: {}"))
    assert_one_fault(path, fault)


@pytest.mark.parametrize("weights", [{}, {"kto": 1.0}, {"weighted_sum": 1.0}, {"custom": 1.0}])
def test_the_parts_of_a_sum_are_known_losses(change, weights):
    fault = "losses.weighted_sum.weights: value error, the losses must be among sigmoid, ipo"
    assert_one_fault(change("losses.weighted_sum", {"weights": weights}), fault)


def test_reading_settings_does_not_import_torch():
    code = "import sys, dpo.config; dpo.config.load_params(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=PARAMS.parent, check=True)


def test_cells_are_every_combination_named_as_dvc_names_them(change):
    path = change(
        "sweep",
        {
            "losses": ["sigmoid", "ipo"],
            "reference_free_losses": [],
            "betas": [0.1, 1],
            "learning_rates": [5e-5],
            "seeds": [1, 2],
        },
    )
    trials = load_params(path).trials()
    assert [trial.name for trial in trials] == [
        f"{loss}-{beta}-5e-05-{seed}" for loss in ("sigmoid", "ipo") for beta in ("0.1", "1") for seed in (1, 2)
    ]
    assert trials[-1].loss == Ipo()
    assert (trials[-1].beta, trials[-1].learning_rate, trials[-1].seed) == (1, 5e-5, 2)


def test_without_sft_the_reference_is_the_base_model(change):
    assert load_params(PARAMS).hub_reference is None
    path = change("sft", None)
    assert (load_params(path).sft, load_params(path).hub_reference, load_params(path).imitated) == (
        None,
        None,
        "both",
    )
    values = YAML(typ="safe").load(path)
    values["model"] |= {"base": "Org/Model", "revision": "abc"}
    YAML().dump(values, path)
    assert load_params(path).hub_reference == ("Org/Model", "abc")


def test_without_a_judge_another_figure_selects(change):
    path = change("evaluate.judges", [])
    path.write_text(path.read_text().replace("select: win_rate", "select: margin"))
    assert load_params(path).compare.select == "margin"
