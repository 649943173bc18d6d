"""The gate: `python -m tasks.commands.promote` makes the selected policy the champion if it is shown to be better.

The first champion has to beat its reference. Every later one has to beat the champion, on answers to the same
held-out prompts with the same seed, or without a judge on the held-out pairs. Better means that the 95% interval
lies wholly above one half, and that the sign-flip test tells it from chance: where every answer wins, no resample
differs and the interval has no width, however few the prompts are; five wins in five have p = 0.06. Whole prompts
are drawn and flipped. A tie changes nothing.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.common.files import atomic_write, md5, write_json
from dpo.config import Params, load_params
from dpo.engine.logprobs import load_model, sequence_logps
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.tokenization import encode_pairs, prompt_of
from dpo.evaluation.bootstrap import bootstrap, mean, paired_test
from dpo.evaluation.judges.scorer import Scorer, load_judge, score_wins
from dpo.evaluation.pair_metrics import pair_table
from dpo.evaluation.sampling import answer_table
from dpo.training.settings import Trial
from tasks.commands.lineage import of_version
from tasks.common.paths import (
    COMPARISON,
    EVAL,
    REFERENCE_SAMPLES,
    TRAIN,
    policy_folder,
    policy_margins,
    policy_samples,
)
from tasks.common.runner import run
from tasks.tracking import offline, registry, runs
from tasks.tracking.models import log_models
from tasks.tracking.provenance import commit, weights

LEVEL = 0.05
"""p below which a difference is told from chance."""


@dataclass(frozen=True)
class Evidence:
    """How a policy did against another: 1 always better, 0 always worse, with its 95% interval.

    `p` is that of the sign-flip test for "as often better as worse".
    """

    figure: str
    against: str
    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """What the gate decided, and why in words."""

    promoted: bool
    reason: str
    challenger: str | None = None
    evidence: Evidence | None = None


def decide(challenger: str, signs: Sequence[str], evidence: Evidence) -> Verdict:
    """Promote a policy only if it shows no sign of failure and is shown to be better: by the interval and by p.

    Args:
        challenger: its name.
        signs: the signs of failure that it shows, the KL budget among them.
        evidence: against the champion, or against the reference where there is no champion.
    """
    found = f"{evidence.figure} against {evidence.against}: {evidence.value:.3f} "
    found += f"[{evidence.low:.3f}, {evidence.high:.3f}], p = {evidence.p:.4f}"
    if signs:
        reason = f"{challenger} is not promoted: it shows a sign of failure ({', '.join(signs)}). Its {found}."
        return Verdict(False, reason, challenger, evidence)
    told = evidence.p < LEVEL
    if told and evidence.low > 0.5:
        return Verdict(True, f"{challenger} is better: {found}.", challenger, evidence)
    how = "worse" if told and evidence.high < 0.5 else "not shown to be better"
    rule = f"A better one has its interval wholly above 0.5, and p below {LEVEL}."
    return Verdict(False, f"{challenger} is {how}: {found}. {rule}", challenger, evidence)


def main() -> None:
    """Weigh, decide, move the alias, write down why."""
    params = load_params()
    compared = read_comparison()
    changed = registry.uncommitted(*registry.VERSIONED)
    if changed:
        raise InputError(f"git: not committed: {', '.join(changed)}; commit first, so that a rollback finds it")
    offline.connect()
    champion = registry.champion()
    if compared["selected"] is None:
        record(Verdict(False, compared["reason"]))
        return
    trial = selected_trial(params, compared)
    facts = of_version(f"models:/{registry.REGISTERED}/{champion.version}") if champion else {}
    if champion and facts["weights"] == weights(policy_folder(trial)):
        record(Verdict(False, f"{trial.name} is the champion already, version {champion.version}.", trial.name))
        return
    evidence = against_champion(params, trial, champion.version) if champion else against_reference(params, trial)
    verdict = decide(trial.name, compared["policies"][trial.name]["signs"], evidence)
    run_id, model_id = logged_model(params, policy_folder(trial))
    if verdict.promoted:
        revision, _ = commit()
        registry.promote(model_id, {registry.COMMIT: revision, "data_md5": md5(TRAIN), "trial": trial.name})
    tags = {"dpo.gate": "promoted" if verdict.promoted else "kept", "dpo.gate_reason": verdict.reason}
    for name, value in tags.items():
        mlflow.MlflowClient().set_tag(run_id, name, value)
    record(verdict)


def read_comparison() -> dict[str, Any]:
    """What the stage `compare` wrote.

    Raises:
        InputError: it has not run yet.
    """
    try:
        compared: dict[str, Any] = json.loads(COMPARISON.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{COMPARISON}: {error}; `dvc repro` writes it") from error
    return compared


def selected_trial(params: Params, compared: dict[str, Any]) -> Trial:
    """The trial that was selected, whose checkpoint must be the one that was compared.

    Raises:
        InputError: the comparison is not of these settings or of this checkpoint.
    """
    key = compared["selected"]
    trials = {trial.name: trial for trial in params.sweep.trials()}
    if key not in trials or not weights(policy_folder(trials[key])).startswith(
        compared["policies"][key]["weights"]
    ):
        raise InputError(f"{COMPARISON}: it selects {key} as it was before; `dvc repro` brings all up to date")
    return trials[key]


def against_reference(params: Params, trial: Trial) -> Evidence:
    """How the selected policy did against the reference: what the stage `evaluate` found."""
    if params.evaluate.judge is None:
        figure, table, wins = "reward accuracy", pd.read_parquet(policy_margins(trial)), "correct"
    else:
        figure, table, wins = "win rate", pd.read_parquet(policy_samples(trial)), "win"
    return weigh(figure, "the reference", table["prompt"].tolist(), table[wins].tolist(), params.seed)


def weigh(figure: str, against: str, prompts: Sequence[str], wins: Sequence[float], seed: int) -> Evidence:
    """The mean of N wins, each from 0 to 1 or NaN if unknown, with interval and test, clustered by N prompts."""
    known = [(prompt, win) for prompt, win in zip(prompts, wins, strict=True) if not math.isnan(win)]
    prompts, wins = [prompt for prompt, _ in known], [win for _, win in known]
    found: Any = bootstrap({"wins": mean(wins)}, prompts, seed)
    low, high = found["wins_ci"]
    p = paired_test([win - 0.5 for win in wins], prompts, seed)
    return Evidence(figure, against, found["wins"], low, high, p)


def against_champion(params: Params, trial: Trial, version: str) -> Evidence:
    """The selected policy against the champion, head to head.

    The champion's weights come from MLflow: no checkpoint here needs to be the one that it was made from.
    """
    with tempfile.TemporaryDirectory() as folder:
        uri = f"models:/{registry.REGISTERED}/{version}"
        champion = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
        judged = params.evaluate.judge is not None
        prompts, wins = judged_wins(params, trial, champion) if judged else ranked_wins(params, trial, champion)
    figure = "win rate" if judged else "win rate in ranking held-out pairs"
    return weigh(figure, f"the champion, version {version}", prompts, wins, params.seed)


def judged_wins(params: Params, trial: Trial, champion: Path) -> tuple[list[str], list[float]]:
    """For each answer its prompt, and how often the policy's is better than the champion's.

    The policy's answers are those that were kept when it was evaluated; the champion answers the same prompts with
    the same seed and settings.
    """
    judge = load_judge(params.evaluate.judge)
    assert judge is not None
    own, baseline = pd.read_parquet(policy_samples(trial)), pd.read_parquet(REFERENCE_SAMPLES)
    tokenizer = load_tokenizer(champion / "components/tokenizer")
    prompts = [prompt_of(pair, tokenizer) for pair in baseline.to_dict("records")]
    engine, device = params.engine, this_process().device
    model = load_model(champion / "model", engine.precision, engine.compile).to(device)
    texts = answer_table(model, tokenizer, prompts, **params.sampling)["answer"].tolist()
    if isinstance(judge, Scorer):
        wins = score_wins(own["policy_score"], judge.score(prompts, texts))
    else:
        wins = judge.compare(prompts, own["policy"].tolist(), texts)
    return own["prompt"].tolist(), wins


def ranked_wins(params: Params, trial: Trial, champion: Path) -> tuple[list[str], list[float]]:
    """For each held-out pair its prompt, and 1 if only the policy ranks it rightly, 0 if only the champion does.

    Both rewards are measured from today's reference, whose log-probs were kept when the policy was evaluated.
    """
    engine = params.engine
    held_out, own = pd.read_parquet(EVAL), pd.read_parquet(policy_margins(trial))
    tokenizer = load_tokenizer(champion / "components/tokenizer")
    rows = encode_pairs(held_out.to_dict("records"), tokenizer, engine.max_length)
    model = load_model(champion / "model", engine.precision, engine.compile).to(this_process().device)
    theirs = pair_table(
        held_out,
        sequence_logps(model, rows, engine.max_tokens_per_microbatch, "champion log-probs"),
        torch.tensor(own[["chosen_reference_logp", "rejected_reference_logp"]].to_numpy()),
        torch.tensor([[len(ids) for ids in row.completions] for row in rows]),
        trial,
        params.losses,
    )
    return own["prompt"].tolist(), ((1 + own["correct"] - theirs["correct"]) / 2).tolist()


def logged_model(params: Params, folder: Path) -> tuple[str, str]:
    """The run that made a checkpoint and MLflow's id of the model in it; logged now if no run here has it.

    Raises:
        InputError: MLflow has lost the model.
    """
    log_models(params, [folder])
    made = runs.run_of(folder)
    run_id = runs.sweep_run(params) if made is None else made.info.run_id
    models = mlflow.search_logged_models(
        experiment_ids=[mlflow.get_run(run_id).info.experiment_id],
        filter_string=f"name = 'policy' AND source_run_id = '{run_id}'",
        output_format="list",
    )
    for model in models:
        if of_version(f"models:/{model.model_id}")["weights"] == weights(folder):
            return run_id, model.model_id
    raise InputError(
        f"MLflow: run {run_id} has lost the model of {folder}; train again: `dvc repro -f -s train@{folder.name}`"
    )


def record(verdict: Verdict) -> None:
    """Keep the verdict for people and for programs, and print it."""
    champion = registry.champion()
    serves = f"version {champion.version}" if champion else "none"
    heading = "Promoted" if verdict.promoted else "Not promoted"
    write_json(registry.GATE, asdict(verdict) | {"champion": str(champion.version) if champion else None})
    with atomic_write(registry.GATE.with_suffix(".md")) as tmp:
        tmp.write_text(f"## Gate: {heading.lower()}\n\n{verdict.reason}\n\nChampion: {serves}.\n")
    print(f"{heading}: {verdict.reason} Champion: {serves}.")


if __name__ == "__main__":
    run(main)
