"""The promotion gate: make the selected policy the champion if it is significantly better than the current one.

The first champion has to beat the reference. Later champions have to beat the current champion: with a judge on
responses to the same held-out prompts with the same seed, without a judge on the held-out pairs. "Beat" means that
the 95% interval is above one half and that the sign-flip test rejects equality. The interval alone is not enough:
if every response wins, its width is zero for any number of prompts, while five wins of five have p = 0.06. The
bootstrap and the test resample prompts, not responses.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.common.files import atomic_write, md5, write_json
from dpo.config import Params, load_params
from dpo.engine.chat import prompt_of
from dpo.engine.logprobs import LogProbModel, load_model, sequence_logps
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.tokenization import encode_pairs
from dpo.evaluation.bootstrap import bootstrap, mean, paired_test
from dpo.evaluation.judges import load_judges
from dpo.evaluation.pair_metrics import pair_table
from dpo.evaluation.sampling import response_limit, response_table
from dpo.training.settings import Trial
from tasks.commands.lineage import of_version
from tasks.common import paths
from tasks.common.git import head_commit, uncommitted
from tasks.tracking import offline, registry, runs
from tasks.tracking.models import log_models
from tasks.tracking.provenance import weights

LEVEL = 0.05
"""Significance level of the sign-flip test."""


@dataclass(frozen=True)
class Evidence:
    """Mean win against another policy, from 0 to 1, its 95% interval, and p of the sign-flip test against 0.5."""

    figure: str
    against: str
    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """A decision of the gate and its reason."""

    promoted: bool
    reason: str
    challenger: str | None = None
    evidence: Evidence | None = None


def decide(challenger: str, violated: Sequence[str], evidence: Evidence) -> Verdict:
    """Promote a policy if it violates no guardrail (the KL budget is one) and is significantly better."""
    found = f"{evidence.figure} against {evidence.against}: {evidence.value:.3f} "
    found += f"[{evidence.low:.3f}, {evidence.high:.3f}], p = {evidence.p:.4f}"
    significant = evidence.p < LEVEL
    better = significant and evidence.low > 0.5
    if violated:
        reason = f"{challenger} is not promoted: it violates a guardrail ({', '.join(violated)}): {found}."
    elif better:
        reason = f"{challenger} is better: {found}."
    else:
        how = "worse" if significant and evidence.high < 0.5 else "not significantly better"
        rule = f"Promotion requires an interval above 0.5 and p below {LEVEL}."
        reason = f"{challenger} is {how}: {found}. {rule}"
    return Verdict(better and not violated, reason, challenger, evidence)


def promote() -> None:
    """Compare the selected policy with the champion, decide, move the alias `champion`, and write the verdict.

    Raises:
        InputError: a result is missing, out of date or not committed, or MLflow is unreachable.
    """
    params, compared = load_params(), read_comparison()
    if changed := uncommitted(*registry.VERSIONED):
        raise InputError(
            f"git: not committed: {', '.join(changed)}; commit first, so that a rollback can restore it"
        )
    offline.connect()
    champion = registry.champion()
    if compared["selected"] is None:
        report(Verdict(False, compared["reason"]))
        return
    trial = selected_trial(params, compared)
    facts = of_version(f"models:/{registry.REGISTERED}/{champion.version}") if champion else {}
    if champion and facts["weights"] == weights(paths.policy_folder(trial)):
        report(Verdict(False, f"{trial.name} is the champion already, version {champion.version}.", trial.name))
        return
    evidence = against_champion(params, trial, champion.version) if champion else against_reference(params, trial)
    verdict = decide(trial.name, compared["policies"][trial.name]["failure_modes"], evidence)
    run_id, model_id = logged_model(params, paths.policy_folder(trial))
    if verdict.promoted:
        tags = {registry.COMMIT: head_commit(), "data_md5": md5(paths.TRAIN), "trial": trial.name}
        registry.promote(model_id, tags)
    mlflow.MlflowClient().set_tag(run_id, "dpo.gate", "promoted" if verdict.promoted else "kept")
    mlflow.MlflowClient().set_tag(run_id, "dpo.gate_reason", verdict.reason)
    report(verdict)


def read_comparison() -> dict[str, Any]:
    """Return the metrics of the stage `compare`. Raise InputError if it has not run."""
    try:
        return json.loads(paths.COMPARISON.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{paths.COMPARISON}: {error}; `dvc repro` writes it") from error


def selected_trial(params: Params, compared: dict[str, Any]) -> Trial:
    """Return the selected trial. Raise InputError if its settings or its checkpoint have changed."""
    name = compared["selected"]
    trial = next((trial for trial in params.trials() if trial.name == name), None)
    if trial is None or weights(paths.policy_folder(trial))[:16] != compared["policies"][name]["weights"]:
        raise InputError(f"{paths.COMPARISON}: {name} has changed since the comparison; run `dvc repro`")
    return trial


def against_reference(params: Params, trial: Trial) -> Evidence:
    """Compare the selected policy with the reference, from the results of the stage `evaluate`."""
    if params.evaluate.judges:
        figure, table, wins = "win rate", pd.read_parquet(paths.policy_samples(trial)), "win"
    else:
        figure, table, wins = "reward accuracy", pd.read_parquet(paths.policy_margins(trial)), "correct"
    return weigh(figure, "the reference", table["prompt"].tolist(), table[wins].tolist(), params.seed)


def weigh(figure: str, against: str, prompts: Sequence[str], wins: Sequence[float], seed: int) -> Evidence:
    """Return mean, interval and test of N wins from 0 to 1 (NaN if unknown), clustered by their N prompts."""
    known = pd.DataFrame({"prompt": prompts, "win": wins}).dropna(subset="win")
    clusters = known["prompt"].tolist()
    found: Any = bootstrap({"wins": mean(known["win"].tolist())}, clusters, seed)
    low, high = found["wins_ci"]
    p = paired_test((known["win"] - 0.5).tolist(), clusters, seed)
    return Evidence(figure, against, found["wins"], low, high, p)


def against_champion(params: Params, trial: Trial, version: str) -> Evidence:
    """Compare the selected policy with the champion, whose weights are downloaded from MLflow."""
    with tempfile.TemporaryDirectory() as folder:
        uri = f"models:/{registry.REGISTERED}/{version}"
        champion = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
        tokenizer = load_tokenizer(champion / "components/tokenizer")
        model = load_model(champion / "model", params.engine.precision, params.engine.compile, frozen=True)
        model = model.to(this_process().device)
        judged = bool(params.evaluate.judges)
        prompts, wins = (judged_wins if judged else ranked_wins)(params, trial, model, tokenizer)
    figure = "win rate" if judged else "win rate in ranking held-out pairs"
    return weigh(figure, f"the champion, version {version}", prompts, wins, params.seed)


def judged_wins(
    params: Params, trial: Trial, champion: LogProbModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[float]]:
    """Return the prompt of every response and the win of the policy's response over the champion's.

    The policy's responses are those of the stage `evaluate`. The champion responds to the same prompts with the
    same seed and settings.
    """
    own, held_out = pd.read_parquet(paths.policy_samples(trial)), pd.read_parquet(paths.EVAL)
    limit = response_limit(params.evaluate.max_new_tokens, held_out, tokenizer, params.engine.max_length)
    prompts = [prompt_of(row, tokenizer) for row in pd.read_parquet(paths.REFERENCE_SAMPLES).to_dict("records")]
    responses = response_table(champion, tokenizer, prompts, **params.sampling(limit))["response"].tolist()
    verdicts = load_judges(params.evaluate.judges)[0].compare(
        prompts, responses, own["response"].tolist(), own.get("score")
    )
    return own["prompt"].tolist(), (1 - verdicts["win"]).tolist()


def ranked_wins(
    params: Params, trial: Trial, champion: LogProbModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[float]]:
    """Return the prompt of every held-out pair and the policy's win over the champion.

    The win is 1 if only the policy ranks the pair correctly, 0 if only the champion does, else 0.5. Both rewards
    are relative to the current reference, whose log-probs the stage `evaluate` stored.
    """
    engine = params.engine
    held_out, own = pd.read_parquet(paths.EVAL), pd.read_parquet(paths.policy_margins(trial))
    rows = encode_pairs(held_out.to_dict("records"), tokenizer, engine.max_length)
    theirs = pair_table(
        held_out,
        sequence_logps(champion, rows, engine.max_tokens_per_microbatch, "champion log-probs"),
        torch.tensor(own[["chosen_reference_logp", "rejected_reference_logp"]].to_numpy()),
        torch.tensor([row.lengths for row in rows]),
        trial,
    )
    return own["prompt"].tolist(), ((1 + own["correct"] - theirs["correct"]) / 2).tolist()


def logged_model(params: Params, folder: Path) -> tuple[str, str]:
    """Return the ids of a checkpoint's run and of its model, logged if missing. Raise InputError if it is lost."""
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
        f"MLflow: run {run_id} has no model of {folder}; train again: `dvc repro -f -s train@{folder.name}`"
    )


def report(verdict: Verdict) -> None:
    """Write the verdict as JSON and as Markdown, and print it."""
    champion = registry.champion()
    served = f"version {champion.version}" if champion else "none"
    heading = "Promoted" if verdict.promoted else "Not promoted"
    write_json(registry.GATE, asdict(verdict) | {"champion": str(champion.version) if champion else None})
    with atomic_write(registry.GATE.with_suffix(".md")) as tmp:
        tmp.write_text(f"## Gate: {heading.lower()}\n\n{verdict.reason}\n\nChampion: {served}.\n")
    print(f"{heading}: {verdict.reason} Champion: {served}.")
