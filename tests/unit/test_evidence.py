"""The evidence: its plan, cases of every method with a tiny model, and results that are kept."""

import dataclasses
import json
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace

import pandas as pd
import pytest
from transformers import GenerationConfig

import benchmarks.evidence.__main__ as command
from benchmarks.evidence import page, plan, schedule
from benchmarks.evidence.cases import best_of_n, by_prompt, measure
from benchmarks.evidence.plan import PLAN, is_finished, load_cases, load_plan, read_results, used, write_result
from benchmarks.evidence.products import Products
from benchmarks.evidence.results import Evidence
from dpo.common.errors import InputError, Stopped, TransientError
from dpo.common.files import sha256
from dpo.config import load_params
from dpo.evaluation.yardsticks import best_of_n as exact_best_of_n
from tests.support.evidence import METHODS, entry, tiny_plan
from tests.support.models import chat_tokenizer, make_model
from tests.support.project import ROOT
from tests.support.training import make_pairs


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A folder with a tiny model, data and a plan; the path of the plan."""
    folder = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tokenizer, model = chat_tokenizer(), Path("models/own/tiny")
        make_model("llama", model, vocab_size=len(tokenizer), initializer_range=0.05, max_position_embeddings=512)
        settings = GenerationConfig.from_pretrained(model)
        settings.eos_token_id = list(range(40, 80))  # responses end soon
        settings.save_pretrained(model)
        tokenizer.save_pretrained(model)
        Path("data/own").mkdir(parents=True)
        Path("data/own/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(40)))
        yield tiny_plan(folder)


@pytest.fixture(scope="module")
def measured(planned):
    """The result of every case."""
    cases = load_cases(planned)["all"]
    return {case.name: measure(case, Path("measured")) for case in cases}


def options(plan, *more):
    return command.parser().parse_args(
        ["--plan", str(plan), "--results", "results", "--cache", "cache", "--minutes", "9", *more]
    )


def answers(measured, before=lambda name: None):
    """Return a stand-in for `alone`, whose cases have a result and are noted in `measured`."""

    def run(function, cases, cache):
        if function.__name__ == "build":
            measured.append(f"seed {cases[0].seed}")
            return 0.0
        measured.append(cases.name)
        before(cases.name)
        return entry(1.0, 0.5)

    return run


# The plan


def test_options_that_are_off_do_not_change_the_hash_of_settings():
    settings = load_params(ROOT / "params.yaml")
    off = used(settings.dpo)
    assert "router_aux_loss" not in off
    assert used({**off, "new_option": None, "other": {"rank": 0, "names": []}}) == off
    assert used({**off, "new_option": 0.5}) != off
    assert used(dataclasses.replace(settings.dpo, epochs=settings.dpo.epochs + 1)) != off


def test_the_plan_has_cases_of_every_method_and_complete_seeds_come_first():
    groups = load_cases(ROOT / PLAN)
    assert next(iter(groups)) == load_plan(ROOT / PLAN).comparison.group == "primary"
    primary = groups["primary"]
    assert [case.seed for case in primary] == sorted(case.seed for case in primary)
    assert len(primary) == 3 * 2 * 5
    assert primary[0].params.evaluate.samples == 384
    methods = {case.method for cases in groups.values() for case in cases}
    assert methods >= {
        "online-1",
        "online-4",
        "online-8",
        "rloo-4",
        "best-of-4",
        "sigmoid",
        "sft",
        "online-1-sft",
    }


def test_a_judge_that_evaluates_trains_no_policy_unless_it_is_a_verifier():
    for cases in load_cases(ROOT / PLAN).values():
        for case in cases:
            evaluating = [judge.kind for judge in case.params.evaluate.judges]
            assert case.params.feedback.kind not in evaluating or evaluating == ["verifier"]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"betas": [0.7]}, r"tiny.yaml: sweep: no trial online-1 with beta 0.7.*add the values"),
        ({"methods": ["online-1"]}, r"comparison.better: online-2 is no method of the group"),
        ({"sedes": [3]}, r"plan.yaml: groups.all.sedes: Unexpected keyword"),
    ],
)
def test_faults_of_a_plan_are_errors(tmp_path, group, message):
    with pytest.raises(InputError, match=message):
        load_cases(tiny_plan(tmp_path, **group))


# Cases


def check(result):
    """Check what the result of every method has."""
    prompts, metrics = result["prompts"], result["metrics"]
    assert sum(prompts["responses"]) == metrics["responses"] > 0
    assert metrics["kl"] == pytest.approx(sum(prompts["kl"]) / metrics["kl_responses"], abs=1e-3)
    assert metrics["kl"] > 0
    assert set(prompts) >= {"score/vader_compound", "reference_score/vader_compound"}
    assert min(result["seconds"]["training"], result["peak_memory_gib"], result["cost"]["human_pairs"]) > 0
    assert len(json.dumps(result)) < 20_000


def test_a_case_runs_with_a_tiny_model_from_data_to_judged_responses(planned):
    case = next(case for case in load_cases(planned)["all"] if case.method == "sigmoid")
    check(measure(case, Path("cache")))


@pytest.mark.slow
def test_every_method_runs_with_a_tiny_model(measured, planned):
    assert len(measured) == len(METHODS)
    for result in measured.values():
        check(result)
    cases = {case.name: case for case in load_cases(planned)["all"]}
    costs = {cases[name].method: each["cost"] for name, each in measured.items()}
    assert costs["sigmoid"]["sampled_tokens"] == costs["sft"]["scored_tokens"] == 0
    assert costs["online-1"]["judged_answers"] == costs["online-2"]["judged_answers"] == 8 * 3
    assert costs["rloo-2"]["sampled_tokens"] > 0
    assert costs["online-1"]["flops"] > costs["online-1"]["reward_model_flops"] == costs["best-of-2"]["flops"] > 0
    assert not list(Path("measured").rglob("work/*")), "the files of a finished case are removed"


@pytest.mark.slow
def test_a_shared_first_round_has_the_same_cost_as_a_sampled_one(measured, planned):
    case = load_cases(planned)["all"][0]
    again, first = measure(case, Path("measured")), measured[case.name]
    assert (again["metrics"], again["cost"]) == (first["metrics"], first["cost"])


def test_products_of_another_seed_are_other_data_and_another_reference(planned):
    case = load_cases(planned)["all"][0]
    own = Products(case.params, Path("cache"))
    other = Products(dataclasses.replace(case.params, seed=4), Path("cache"))
    assert own.folder != other.folder
    assert own.base == other.base
    assert sha256(own.reference / "model.safetensors") != sha256(other.reference / "model.safetensors")


def test_best_of_n_is_the_exact_expectation_of_its_own_judge():
    """If the judge that trains also evaluates, the pooled expectation of the library is the same."""
    scores = [3.0, 1.0, 2.0, 5.0, 4.0]

    answers = pd.DataFrame(
        {"prompt": ["p"] * 5 + ["q"], "ids": [[1]] * 6, "finished": True, "score/judge": [*scores, 9.0]}
    )
    products = SimpleNamespace(reference_samples=answers, reference_feedback=[*scores, 9.0])
    for n in (2, 4):
        table = best_of_n(products, n)
        kl, expected = exact_best_of_n(scores, n)
        assert set(table["prompt"]) == {"p"}, "a prompt with fewer than n responses is left out"
        assert table["score/judge"].tolist() == pytest.approx([expected] * 5)
        assert table["kl"].iloc[0] == pytest.approx(kl)
        assert by_prompt(table, ["p", "q"])["responses"] == [5, 0]


# Results


def test_finished_cases_are_skipped_and_changed_settings_are_measured_again(
    planned, tmp_path, monkeypatch, capsys
):
    def refuse(function, *args):
        raise AssertionError("a finished case must not run")

    monkeypatch.setattr(schedule, "alone", refuse)
    for case in load_cases(planned)["all"]:
        write_result(case, entry(1.0, 0.5), tmp_path)
    assert command.run(options(planned, "--results", str(tmp_path))) == 0
    assert "6 of 6 cases have a result" in capsys.readouterr().out
    case, results = load_cases(planned)["all"][0], read_results(tmp_path)
    assert is_finished(case, results)
    params = case.params
    for section, change in {
        "online": {"answers": 2},
        "engine": {"max_length": 99},
        "evaluate": {"samples": 13},
    }.items():
        changed = dataclasses.replace(getattr(params, section), **change)
        assert not is_finished(
            dataclasses.replace(case, params=dataclasses.replace(params, **{section: changed})), results
        )
    run = dataclasses.replace(params.run, checkpoint_minutes=1)
    assert is_finished(dataclasses.replace(case, params=dataclasses.replace(params, run=run)), results)
    for part in ("engine", "packages"):
        other = {case.name: results[case.name] | {"key": case.key | {part: None}}}
        assert not is_finished(case, other)


def test_cases_without_a_result_run_before_those_of_another_engine(planned, tmp_path, monkeypatch):
    cases, measured = load_cases(planned)["all"], []
    for case in cases[:2]:
        write_result(case, entry(1.0, 0.5), tmp_path)
    monkeypatch.setattr(plan, "ENGINE_VERSION", -1)
    monkeypatch.setattr(schedule, "alone", answers(measured))
    assert command.run(options(planned, "--results", str(tmp_path))) == 0
    assert measured == ["seed 3", *(case.name for case in [*cases[2:], *cases[:2]])]


def test_cases_of_several_seeds_run_at_once_each_after_its_shared_products(tmp_path, monkeypatch):
    plan, measured, together = tiny_plan(tmp_path, seeds=[3, 4]), [], Barrier(4)

    def meet(name):
        if name.startswith("tiny-online"):
            together.wait(timeout=20)  # four cases, two of each seed, run at the same time

    monkeypatch.setattr(schedule, "alone", answers(measured, meet))
    folder = str(tmp_path / "results")
    assert command.run(options(plan, "--results", folder, "--jobs", "4")) == 0
    assert {"seed 3", "seed 4"} == set(measured[:2])
    assert len(set(measured)) == len(measured) == 2 + 2 * len(METHODS)
    assert {each["seconds"]["cases_at_once"] for each in read_results(Path(folder)).values()} == {4}


def test_a_fault_of_the_machine_keeps_the_results_of_the_cases_that_run(tmp_path, monkeypatch):
    plan, measured, failed = tiny_plan(tmp_path), [], Event()

    def fail_or_wait(name):
        if "online-1" in name:
            failed.set()
            raise BrokenProcessPool("killed")
        assert failed.wait(20)
        time.sleep(0.2)  # ends after the fault

    monkeypatch.setattr(schedule, "alone", answers(measured, fail_or_wait))
    folder = tmp_path / "results"
    with pytest.raises(BrokenProcessPool):
        command.run(options(plan, "--results", str(folder), "--jobs", "2"))
    assert list(read_results(folder)) == ["tiny-online-2-sigmoid-0.1-0.01-3"]
    assert len(measured) == 3, "no case starts after the fault"


def test_a_failed_case_is_recorded_and_not_repeated(planned, tmp_path, monkeypatch, capsys):
    def diverge(function, *args):
        if function.__name__ == "build":
            return 0.0
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(schedule, "alone", diverge)
    arguments = options(planned, "--results", str(tmp_path), "--cases", "online-1")
    assert command.run(arguments) == 0
    (result,) = read_results(tmp_path).values()
    assert result["error"] == "FloatingPointError: the loss is not finite"
    monkeypatch.setattr(schedule, "alone", None)
    assert command.run(arguments) == 0
    assert command.run(options(planned, "--results", str(tmp_path), "--list")) == 0
    assert "failed   tiny-online-1-sigmoid-0.1-0.01-3\nnot run  tiny-online-2" in capsys.readouterr().out
    evidence = Evidence.read(planned, tmp_path)
    assert (
        "| all | online-1, online-2, rloo-2, best-of-2, sigmoid, sft | 6 | 0 | 1 | 5 **not run** |"
        in page.status(evidence)
    )


@pytest.mark.parametrize(
    ("part", "fault"),
    [
        ("build", TransientError("no network")),
        ("build", InputError("a reward model needs TRL")),
        ("measure", OSError(28, "disk full")),
        ("measure", BrokenProcessPool("killed")),
        ("measure", Stopped("SIGTERM")),
    ],
)
def test_a_fault_of_the_machine_is_no_result_of_a_method(planned, tmp_path, monkeypatch, part, fault):
    def fail(function, *args):
        if function.__name__ == part:
            raise fault
        return 0.0

    monkeypatch.setattr(schedule, "alone", fail)
    with pytest.raises(type(fault)):
        command.run(options(planned, "--results", str(tmp_path)))
    assert not read_results(tmp_path)


def test_no_case_starts_that_is_likely_to_exceed_the_time(planned, tmp_path, monkeypatch):
    calls = []

    def record(function, *args):
        calls.append(function.__name__)
        return 0.0 if function.__name__ == "build" else {
            "seconds": {"training": 500.0, "evaluation": 100.0}, "metrics": {}, "peak_memory_gib": 1.0
        }  # fmt: skip

    monkeypatch.setattr(schedule, "alone", record)
    assert command.run(options(planned, "--results", str(tmp_path))) == 1
    assert calls == ["build", "measure"], "the next case needs 10 minutes of 9"


def test_the_first_case_of_a_seed_needs_the_time_of_what_its_cases_share(planned):
    first, second = load_cases(planned)["all"][:2]
    timed = entry(1.0, 0.5)
    timed["seconds"] |= {"shared_products": 300.0}
    results = {name: {"a": {"task": "tiny", "seed": int(name), "method": "online-1", **timed}} for name in "39"}
    assert command.expected(first, {}, built=False) == 0
    assert command.expected(second, results["3"], built=False) == 90
    assert command.expected(second, results["9"], built=False) == 390
    assert command.expected(second, results["9"], built=True) == 90


def test_unknown_cases_are_an_error(planned):
    with pytest.raises(InputError, match="--cases: no group, method or case rlo-2; groups are all"):
        command.run(options(planned, "--cases", "rlo-2"))
