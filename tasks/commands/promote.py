"""The promotion gate: make the selected policy the champion if it is significantly better than the current one.

The first champion has to beat the reference, later ones the current champion. Both respond again to held-out
prompts, with another seed than the responses by which `compare` chose the policy. Without a judge, the gate uses
the half of the held-out rows that `compare` left out. Comparisons with one champion are counted and share an
error rate, see `dpo.evaluation.gate`.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow.parquet as pq
import torch
from mlflow.entities.model_registry import ModelVersion
from transformers import PreTrainedTokenizerBase

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.common.files import atomic_write, md5, write_json
from dpo.config import Params, load_params
from dpo.data.prompts import prompt_table
from dpo.engine.chat import prompt_of
from dpo.engine.logprobs import LogProbModel, load_model, sequence_logps
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.tokenization import encode_pairs
from dpo.evaluation.bootstrap import bootstrap, mean, paired_test
from dpo.evaluation.capabilities import drop
from dpo.evaluation.gate import gate_prompts, kept_for_gate, prompts_needed, significance_level
from dpo.evaluation.judges import load_judges
from dpo.evaluation.label_metrics import label_table
from dpo.evaluation.pair_metrics import pair_table
from dpo.evaluation.sampling import response_limit, response_table
from dpo.training.settings import Trial
from tasks.commands.lineage import of_version
from tasks.common import paths
from tasks.common.git import head_commit, uncommitted
from tasks.common.markdown import inline
from tasks.report.promotion import describe
from tasks.tracking import champions, offline, registry, runs
from tasks.tracking.models import log_models
from tasks.tracking.provenance import weights
from tasks.tracking.sweeps import name_sweeps, record_decision

WORSE_LEVEL = 0.05
"""Two-sided significance level for the word "worse"; it decides nothing."""


@dataclass(frozen=True)
class Evidence:
    """Mean win against another policy, from 0 to 1, its 95% interval, and the one-sided p of the sign-flip test.

    `comparison` counts the comparisons with this opponent; `level` is the significance level that it may use.
    """

    figure: str
    against: str
    value: float
    low: float
    high: float
    p: float
    comparison: int
    level: float


@dataclass(frozen=True)
class Verdict:
    """A decision of the gate and its reason."""

    promoted: bool
    reason: str
    challenger: str | None = None
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Contest:
    """The held-out rows on which two policies are compared, and what the verdict says about them."""

    rows: pd.DataFrame
    seed: int
    note: str


Opponent = tuple[LogProbModel, PreTrainedTokenizerBase]


def decide(challenger: str, violated: Sequence[str], evidence: Evidence, note: str = "") -> Verdict:
    """Promote a policy if it violates no guardrail (the KL budget is one) and is significantly better."""
    found = f"{evidence.figure} against {evidence.against}: {evidence.value:.3f} "
    found += f"[{evidence.low:.3f}, {evidence.high:.3f}], p = {evidence.p:.2g}; "
    found += f"comparison {evidence.comparison} with {evidence.against} needs p of at most {evidence.level:.2g}"
    better = evidence.value > 0.5 and evidence.p <= evidence.level
    if violated:
        reason = f"{challenger} is not promoted: it violates a guardrail ({', '.join(violated)}): {found}."
    elif better:
        reason = f"{challenger} is better: {found}."
    else:
        how = "worse" if 1 - evidence.p < WORSE_LEVEL / 2 else "not significantly better"
        reason = f"{challenger} is {how}: {found}."
    return Verdict(better and not violated, f"{reason} {note}".strip(), challenger, evidence)


def promote() -> None:
    """Compare the selected policy with the champion, decide, move the alias `champion`, and write the verdict.

    Raises:
        InputError: a result is missing, out of date or not committed, MLflow is unreachable, or its registry was
            changed by hand.
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
    folder = paths.policy_folder(trial)
    if champion and of_version(f"models:/{registry.REGISTERED}/{champion.version}")["weights"] == weights(folder):
        report(Verdict(False, f"{trial.name} is the champion already, version {champion.version}.", trial.name))
        return
    run_id, model_id = logged_model(params, folder)
    comparison = champions.comparison_number(run_id, str(champion.version) if champion else "reference")
    level = significance_level(comparison, params.promote)
    contest = contest_rows(params, trial, champion, comparison)
    if reason := too_few(contest.rows["prompt"], level, more_prompts(params)):
        report(Verdict(False, f"{trial.name} is not promoted: {reason} {contest.note}".strip(), trial.name))
        return
    figure, wins = compete(params, trial, champion, contest)
    against = f"the champion, version {champion.version}" if champion else "the reference"
    evidence = weigh(figure, against, contest.rows["prompt"].tolist(), wins, params.seed, comparison, level)
    violated = [*compared["policies"][trial.name]["failure_modes"], *lost_capabilities(params, trial)]
    verdict = decide(trial.name, violated, evidence, contest.note)
    if verdict.promoted:
        champions.log_prompts(run_id)
        pairs = str(pq.read_metadata(paths.TRAIN).num_rows)
        tags = {registry.COMMIT: head_commit(), "data_md5": md5(paths.TRAIN), "trial": trial.name}
        tags |= {registry.PAIRS: pairs}
        registry.promote(model_id, tags | champions.conditions(params) | {champions.RUN: run_id})
    record_decision(run_id, "promoted" if verdict.promoted else "kept", verdict.reason)
    report(verdict)


def check() -> None:
    """Print whether the gate can promote a policy. Raise InputError if the registry was changed by hand."""
    params = load_params()
    offline.connect()
    champion = registry.champion()
    print(f"champion: {f'version {champion.version}' if champion else 'none'}")
    if paths.EVAL.is_file():
        held_out = gate_rows(params)["prompt"]
        if champion:
            held_out = held_out[~held_out.map(champions.prompt_hash).isin(champions.trained_prompts(champion))]
        if reason := too_few(held_out, significance_level(1, params.promote), more_prompts(params)):
            print(f"warning: no policy can be promoted: {reason}")


def set_champion(number: str) -> None:
    """Set the champion to a version that was promoted, or to `none`, after the registry was changed by hand."""
    offline.connect()
    registry.set_champion(number)
    name_sweeps()
    print(f"Champion: {f'version {number}' if number != 'none' else 'none'}.")


def more_prompts(params: Params) -> str:
    """Return how to give the gate more prompts."""
    if separate_prompts(params):
        return f"Add prompts to {params.evaluate.prompts}."
    return "Add held-out rows or raise data.eval_fraction."


def too_few(prompts: pd.Series, level: float, fix: str) -> str | None:
    """Return why N prompts are too few to promote any policy, and how to fix it; None if they are enough."""
    count, needed = prompts.nunique(), prompts_needed(level)
    if count >= needed:
        return None
    return (
        f"{count} distinct held-out prompts are too few: even if every one is won, p is {0.5**count:.2g}, above "
        f"the level {level:.2g}; at least {needed} are needed. {fix}"
    )


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


def lost_capabilities(params: Params, trial: Trial) -> list[str]:
    """Return the tasks of `capabilities` in which the policy is worse than the reference, beyond the limit."""
    lost, limit = [], params.compare.guardrails.max_capability_drop
    for task in params.capabilities.tasks:
        path = paths.capability(task)
        result = json.loads(path.read_text()) if path.is_file() else {}
        if result.get("policy") != trial.name:
            raise InputError(f"{path}: no result of {trial.name}; run `dvc repro`")
        if (fall := drop(result, "reference")) > limit:
            lost.append(f"lost capability: {task} fell by {fall:.3g}, limit {limit:.3g}")
    return lost


def separate_prompts(params: Params) -> bool:
    """Return whether policies respond to the prompts of a file instead of those of the held-out rows."""
    return params.evaluate.prompts is not None and bool(params.evaluate.judges)


def gate_rows(params: Params) -> pd.DataFrame:
    """Return the rows on which policies can be compared: the held-out ones, or the prompts of `evaluate.prompts`.

    Raises:
        InputError: the file of prompts is invalid, or a training pair has one of its prompts.
    """
    if not separate_prompts(params):
        return pd.read_parquet(paths.EVAL)
    trained = pd.read_parquet(paths.TRAIN, columns=["prompt"])["prompt"]
    return prompt_table(str(params.evaluate.prompts), trained)


def contest_rows(params: Params, trial: Trial, champion: ModelVersion | None, comparison: int) -> Contest:
    """Return the held-out rows of a comparison. Prompts that the champion was trained on are left out.

    Raises:
        InputError: the champion is not comparable.
    """
    held_out, notes = gate_rows(params), []
    if champion:
        notes += champions.changes(params, champion)
        trained = held_out["prompt"].map(champions.prompt_hash).isin(champions.trained_prompts(champion))
        if trained.any():
            notes.append(f"{trained.sum()} held-out rows are left out: the champion was trained on their prompts.")
        held_out = held_out[~trained]
    if not params.evaluate.judges:
        return Contest(held_out[kept_for_gate(held_out["prompt"].tolist())], params.seed, " ".join(notes))
    if held_out.empty:
        return Contest(held_out, params.seed, " ".join(notes))
    seed = (params.seed + comparison) % 2**32
    used = set(pd.read_parquet(paths.policy_samples(trial), columns=["prompt"])["prompt"])
    rows, fresh = gate_prompts(held_out, used, params.promote.samples or params.evaluate.samples, seed)
    kind = "prompts that the choice did not use" if fresh else "the prompts of the choice, with another seed"
    notes.insert(0, f"{len(rows)} new responses of each, to {kind} ({rows['prompt'].nunique()} distinct).")
    return Contest(rows, seed, " ".join(notes))


def compete(
    params: Params, trial: Trial, champion: ModelVersion | None, contest: Contest
) -> tuple[str, list[float]]:
    """Return the name of the figure and the policy's win on each row of the contest."""
    judged = bool(params.evaluate.judges)
    if champion is None and not judged:
        return "reward accuracy", margins(trial, contest)["correct"].tolist()
    with opponent(params, champion) as other:
        if judged:
            return "win rate", judged_wins(params, trial, contest, other)
        return "win rate in ranking held-out rows", ranked_wins(params, trial, contest, other)


def margins(trial: Trial, contest: Contest) -> pd.DataFrame:
    """Return the policy's results on the held-out rows of a contest, which the stage `evaluate` stored."""
    table = pd.read_parquet(paths.policy_margins(trial))
    return table.set_index("id").loc[contest.rows["id"]].reset_index()


def weigh(
    figure: str,
    against: str,
    prompts: Sequence[str],
    wins: Sequence[float],
    seed: int,
    comparison: int,
    level: float,
) -> Evidence:
    """Return mean, interval and test of N wins from 0 to 1 (NaN if unknown), clustered by their N prompts."""
    known = pd.DataFrame({"prompt": prompts, "win": wins}).dropna(subset="win")
    clusters = known["prompt"].tolist()
    found: Any = bootstrap({"wins": mean(known["win"].tolist())}, clusters, seed)
    low, high = found["wins_ci"]
    p = paired_test((known["win"] - 0.5).tolist(), clusters, seed) / 2
    return Evidence(
        figure, against, found["wins"], low, high, p if found["wins"] > 0.5 else 1 - p, comparison, level
    )


@contextmanager
def opponent(params: Params, champion: ModelVersion | None) -> Iterator[Opponent]:
    """Yield model and tokenizer of the champion, downloaded from MLflow, or of the reference."""
    device = this_process().device
    if champion is None:
        model = load_model(paths.REFERENCE, **params.engine.loading, frozen=True)
        yield model.to(device), load_tokenizer(paths.REFERENCE)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = champions.download(champion, temporary)
        model = load_model(folder / "model", **params.engine.loading, frozen=True)
        yield model.to(device), load_tokenizer(folder / "components/tokenizer")


def judged_wins(params: Params, trial: Trial, contest: Contest, other: Opponent) -> list[float]:
    """Return the win of the policy's response over the opponent's for each row.

    Each model has the tokenizer and the chat template that it was trained with.
    """
    tokenizer = load_tokenizer(paths.REFERENCE)
    policy = load_model(paths.policy_folder(trial), **params.engine.loading, frozen=True)
    limit = response_limit(
        params.evaluate.max_new_tokens, pd.read_parquet(paths.EVAL), tokenizer, params.engine.max_length
    )
    settings = params.sampling(limit) | {"seed": contest.seed}
    rows = contest.rows.to_dict("records")
    responses = []
    for model, its_tokenizer in ((policy.to(this_process().device), tokenizer), other):
        prompts = [prompt_of(row, its_tokenizer) for row in rows]
        responses.append(response_table(model, its_tokenizer, prompts, **settings)["response"].tolist())
    prompts = [prompt_of(row, tokenizer) for row in rows]
    return load_judges(params.evaluate.judges)[0].compare(prompts, *responses)["win"].tolist()


def ranked_wins(params: Params, trial: Trial, contest: Contest, other: Opponent) -> list[float]:
    """Return the policy's win over the opponent for each held-out row.

    The win is 1 if only the policy has the order of a pair or the sign of a labelled row right, 0 if only the
    opponent has, else 0.5. Both rewards
    are relative to the current reference, whose log-probs the stage `evaluate` stored.
    """
    model, tokenizer = other
    own = margins(trial, contest)
    rows = encode_pairs(contest.rows.to_dict("records"), tokenizer, params.engine.max_length)
    reference = torch.tensor(own[["chosen_reference_logp", "rejected_reference_logp"]].to_numpy())
    policy = sequence_logps(model, rows, params.engine.max_tokens_per_microbatch, "opponent's log-probs")
    lengths = torch.tensor([row.lengths for row in rows])
    if policy.shape[1] == 1:  # labelled rows
        theirs = label_table(contest.rows, policy, reference.sum(1, keepdim=True), lengths, trial)
    else:
        theirs = pair_table(contest.rows, policy, reference, lengths, trial)
    return ((1 + own["correct"] - theirs["correct"].to_numpy()) / 2).tolist()


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
        f"MLflow: run {run_id} has no model of {folder}; train again: "
        f"`dvc repro -f -s --glob 'train*@{folder.name}'`"
    )


def report(verdict: Verdict) -> None:
    """Write the verdict as JSON and as Markdown, and print it."""
    champion = registry.champion()
    served = f"version {champion.version}" if champion else "none"
    heading = "Promoted" if verdict.promoted else "Not promoted"
    details = describe(champion) if verdict.promoted and champion else ""
    facts = {"champion": str(champion.version) if champion else None, "details": details}
    write_json(registry.GATE, asdict(verdict) | facts)
    with atomic_write(registry.GATE.with_suffix(".md")) as tmp:
        parts = [f"## Gate: {heading.lower()}", inline(verdict.reason), f"Champion: {served}.", details]
        tmp.write_text("\n\n".join(filter(None, parts)) + "\n")
    print(f"{heading}: {verdict.reason} Champion: {served}.")
