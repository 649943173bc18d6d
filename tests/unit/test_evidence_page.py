"""The figures of the evidence's page, from results."""

import dataclasses
import json

import numpy as np
import pytest
from ruamel.yaml import YAML

from benchmarks.evidence import page
from benchmarks.evidence.plan import PLAN, load_cases, write_result
from benchmarks.evidence.results import Evidence
from benchmarks.page import markers
from dpo.training.losses import LOSSES
from tests.support.evidence import entry, read, tiny_plan
from tests.support.project import ROOT


def test_the_page_is_up_to_date_with_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    evidence = Evidence.read()
    for file, blocks in ((page.PAGE, page.blocks(evidence)), (page.LOSSES_PAGE, page.loss_blocks(evidence))):
        for name, block in blocks.items():
            start, end = markers(f"evidence-{name}")
            written = file.read_text().split(start)[1].split(end)[0].strip()
            assert written == block, "run `python -m benchmarks.evidence --table`"


def test_every_loss_for_pairs_is_in_the_plan_at_three_betas_and_three_seeds():
    losses = Evidence.read(ROOT / PLAN).losses
    for_pairs = {name for name, loss in LOSSES.items() if "labels" not in loss().needs}
    assert set(losses) == for_pairs - {"custom", "sft"}  # `sft` has no beta and is a group of its own
    for cases in losses.values():
        assert len({case.trial.beta for case in cases}) == len({case.seed for case in cases}) == 3
        assert len(cases) == 9


@pytest.mark.parametrize("seeds", [4, 5])
def test_the_primary_test_waits_for_all_seeds(tmp_path, seeds):
    plan = tiny_plan(tmp_path, task="sentences", methods=["online-1", "online-2"], seeds=[1, 2, 3, 4, 5])
    task = read(tmp_path / "sentences.yaml")
    task["sweep"] |= {"seeds": [1, 2, 3, 4, 5], "reward_models": [1, 2, 3, 4, 5]}
    YAML().dump(task, tmp_path / "sentences.yaml")
    for case in load_cases(plan)["all"]:
        if case.seed <= seeds:
            score = 0.8 + case.seed / 100 if case.method == "online-2" else 0.4 + case.seed / 100
            write_result(case, entry(0.004, score), tmp_path / "results")
    evidence = Evidence.read(plan, tmp_path / "results")
    text = page.primary(evidence, ["vader_compound"])
    assert "difference +0.200 [+0.200, +0.200]" in text  # half of 0.4 at a quarter of the KL
    if seeds == 5:
        assert f"p = {2 / 252:.3f} by permutation" in text
    else:
        assert "4 seeds of 5; the test is **not run** until all seeds are complete" in text
    assert page.answer(evidence, [("online-2", "rloo-2")]) == ["- online-2 minus rloo-2: **not run**"]
    if seeds == 5:
        assert "| online-1 | 0.22 [0.21, 0.22] | 2.0 | 9 | 24 |" in page.compute(evidence)
        assert "| sentences, online-1 | 1.0 | 0.0 | 0.0 | 1.0 | 0.5 | 1.0 | CPU |" in page.cost(evidence)


def equal_kl(evidence):
    """Return the table of the primary judge."""
    return page.equal_kl(evidence, "vader_compound", evidence.methods("sentences"))


def test_a_seed_counts_if_all_its_policies_have_finished_or_failed(tmp_path):
    evidence = Evidence.read(ROOT / PLAN, tmp_path)
    first, second = evidence.methods("sentences")["online-1"][:2]
    about = {"seed": 1, "method": "online-1", "task": "sentences"}
    evidence = dataclasses.replace(evidence, results={first.name: about | entry(4.0, 0.5)})
    assert "| online-1 | no complete seed |" in equal_kl(evidence)
    assert "| online-4 | **not run** |" in equal_kl(evidence)
    evidence = dataclasses.replace(
        evidence, results=evidence.results | {second.name: about | {"error": "diverged"}}
    )
    assert "| online-1 | 1 | 0.25 | 0.31 | 0.35 | 0.43 | 0.50 |" in equal_kl(evidence)


def test_memory_is_that_of_the_results_and_of_ppo(tmp_path):
    ppo = tmp_path / "ppo.json"
    evidence = Evidence.read(ROOT / PLAN, tmp_path)
    assert page.memory(evidence, ppo).count("| **not run** |  |") == 4
    measured = {"packages": {"trl": "1.12.0"}, "answers": 32, "peak_memory_gib": 7.14, "device": "a GPU"}
    ppo.write_text(json.dumps(measured))
    last = page.memory(evidence, ppo).splitlines()[-1]
    assert last.startswith("| PPO of TRL 1.12.0, one step of 32 answers | policy, value")
    assert last.endswith("| 4 | 7.1 | a GPU |")


def test_a_kl_that_no_policy_reaches_has_no_reward(tmp_path):
    plan = tiny_plan(tmp_path, task="sentences")
    for case in load_cases(plan)["all"]:
        write_result(case, entry(0.0015, 0.3), tmp_path / "results")
    evidence = Evidence.read(plan, tmp_path / "results")
    line = next(line for line in equal_kl(evidence).splitlines() if "online-1" in line)
    assert line == "| online-1 | 1 | 0.24 | not reached |"
    sides = [evidence.methods("sentences")[method] for method in ("online-2", "online-1")]
    assert np.isnan(page.difference(evidence, sides, "vader_compound", 1.0)[0])


def test_losses_are_compared_with_sigmoid_in_the_same_seeds(tmp_path):
    evidence = Evidence.read(ROOT / PLAN, tmp_path)
    scores, results = {"sigmoid": (0.5, 0.5), "ipo": (0.7, 0.6), "hinge": (0.5,)}, {}
    for loss, of_seeds in scores.items():
        for seed, score in enumerate(of_seeds, 1):
            for case in (case for case in evidence.losses[loss] if case.seed == seed):
                about = {"seed": seed, "method": loss, "task": "sentences"}
                results[case.name] = about | entry(1.0 if loss == "hinge" else 1.5, score)
    text = page.beside_sigmoid(dataclasses.replace(evidence, results=results), ["vader_compound"])
    assert "| ipo | 2 | +0.15 [+0.15, +0.15] | not reached |" in text  # seeds are not drawn if there are two
    assert "| hinge | 1 | not reached | not reached |" in text
    assert "| robust | **not run** |  |  |" in text
    assert "| sigmoid |" not in text


def test_arithmetic_has_the_gain_over_the_reference_on_the_same_problems(tmp_path):
    evidence = Evidence.read(ROOT / PLAN, tmp_path)
    case = evidence.methods("arithmetic")["sigmoid"][0]
    counts = {"responses": [8.0] * 4, "kl_responses": [8.0] * 4, "kl": [1.6] * 4}
    solved = {"score/verifier": [8.0, 8.0, 8.0, 0.0], "reference_score/verifier": [4.0] * 4}
    result = {"seed": 1, "task": "arithmetic", "method": "sigmoid", "prompts": counts | solved}
    text = page.arithmetic(dataclasses.replace(evidence, results={case.name: result}))
    assert "| sigmoid, 0.05 | 1 | 0.20 | 0.75 | 0.50 | 0.75 | +0.25 |" in text
    assert "| sigmoid, 0.1 | **not run** |  |  |  |  |  |" in text
