"""Training in rounds: the policy answers prompts, a judge scores the answers, and the policy trains on them.

Prompts, answers and optimizer steps are shared equally among the rounds, so the number of rounds changes only how
old the policy is that answers. The optimizer and the learning rate schedule are carried on.

A round writes `round-N` (answers with scores, counts), what its training needs into it, then `policy-N`, and last
`round-N.json`. Each of them is written atomically. An interrupted run continues after the last of them, or at the
last checkpoint of the training.
"""

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpo.common.distributed import shards_weights, this_process
from dpo.common.errors import InputError
from dpo.common.files import atomic_write, write_json
from dpo.data.settings import ValidateSettings
from dpo.engine.chat import prompt_of
from dpo.engine.flops import Cost, cost_of
from dpo.engine.logprobs import LogProbModel, load_model
from dpo.engine.pretrained import load_config, load_tokenizer
from dpo.engine.settings import EngineSettings
from dpo.engine.tokenization import TokenRow, prompt_ids
from dpo.evaluation.judges import Judge
from dpo.evaluation.sampling import response_table
from dpo.online.pairs import score_responses
from dpo.online.settings import OnlineSettings
from dpo.training.callbacks import Callback
from dpo.training.checkpoints import CheckpointStore
from dpo.training.loop import Segment
from dpo.training.settings import DpoSettings, Trial
from dpo.training.train import save_checkpoint

log = logging.getLogger(__name__)

Records = Sequence[dict[Any, Any]]
Log = list[dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """Result of a training in rounds."""

    policy: Path
    """Folder of the policy."""
    log: Log
    """One entry per step."""
    counts: list[dict[str, Any]]
    """Counts of each round."""
    cost: Cost
    """Sampling and log-probs, without the training steps."""


@dataclass(frozen=True)
class Rounds(ABC):
    """Training of one policy in rounds. Call `run`.

    Attributes:
        reference: folder of the policy at the start; KL and rewards are measured to it.
        work: folder of the rounds. It belongs to these settings alone.
        sampling: arguments of `response_table`, without the seed.
        benchmarks: folder with texts that no pair may contain.
    """

    reference: Path
    work: Path
    judge: Judge
    trial: Trial
    online: OnlineSettings
    dpo: DpoSettings
    engine: EngineSettings
    contract: ValidateSettings
    sampling: dict[str, int]
    benchmarks: Path
    store: CheckpointStore

    @abstractmethod
    def prepare(self, folder: Path, name: str, prompts: Records, answers: pd.DataFrame) -> dict[str, Any]:
        """Write what training on the answers of the round `name` needs to `folder`, and return counts.

        If the count `pairs` is 0, the policy is not trained in this round.
        """

    @abstractmethod
    def train(
        self, folder: Path, policy: Path, prompts: Records, segment: Segment, callbacks: Sequence[Callback]
    ) -> tuple[LogProbModel, Log, Cost]:
        """Train the policy on the answers in `folder`. Return it with its log, and the cost of log-probs."""

    def run(self, prompts: Records, callbacks: Sequence[Callback] = ()) -> Outcome:
        """Train on answers to the prompts of canonical pairs.

        Raises:
            InputError: a round has no step, no round has something to train on, or weights are to be sharded.
        """
        if shards_weights():
            raise InputError(
                "run.launch: rounds do not work with sharded weights (FSDP); use a configuration for DDP, or set "
                "sweep.rounds and sweep.rloo to []"
            )
        rounds, per_step = self.trial.rounds or 1, self.dpo.pairs_per_step
        total = self.dpo.epochs * -(-len(prompts) // per_step)
        if total < rounds or len(prompts) < rounds:
            raise InputError(
                f"params.yaml: {self.trial.list_name}: {rounds} rounds of {total} steps, which is {len(prompts)} "
                f"prompts with {per_step} pairs per step: a round has no step; raise online.prompts or lower "
                "dpo.pairs_per_step"
            )
        policy, optimizer, history, counts, cost = self.reference, None, Log(), list[dict[str, Any]](), Cost()
        resumed = True
        for number in range(1, rounds + 1):
            done = self.work / f"round-{number}.json"
            if not done.is_file():
                if resumed and history:
                    for callback in callbacks:
                        callback.on_start(len(history), history)
                resumed = False
                first, last = (total * place // rounds for place in (number - 1, number))
                segment = Segment(first, last - first, total, optimizer, self.work / f"optimizer-{number}.pt")
                self._round(number, policy, prompts[number - 1 :: rounds], segment, callbacks)
                self._remove_states_before(number)
            state = json.loads(done.read_text())
            history += state["log"]
            counts.append(state["counts"])
            cost += Cost(**state["cost"])
            if state["log"]:
                policy, optimizer = self.work / f"policy-{number}", self.work / f"optimizer-{number}.pt"
        if not history:
            raise InputError(
                f"{self.trial.name}: no round has a pair: every prompt has equal scores, or fewer than two "
                "finished responses; raise online.answers or evaluate.max_new_tokens, or use another judge in "
                "feedback"
            )
        return Outcome(policy, history, counts, cost)

    def _round(
        self, number: int, policy: Path, prompts: Records, segment: Segment, callbacks: Sequence[Callback]
    ) -> None:
        """Do the parts of a round that are not done."""
        state, folder = this_process(), self.work / f"round-{number}"
        if not folder.is_dir():
            answers = self._answer(number, policy, prompts)
            if state.is_main_process:
                self._write_answers(folder, prompts, answers)
        state.wait_for_everyone()
        counts = json.loads((folder / "counts.json").read_text())
        config = load_config(self.reference)
        cost = cost_of(answer_rows(pd.read_parquet(folder / "answers.parquet"), folder.name), config, "sampled")
        history = Log()
        if counts.get("pairs") != 0:
            model, history, scored = self.train(folder, policy, prompts, segment, callbacks)
            save_checkpoint(model, load_tokenizer(self.reference), self.work / f"policy-{number}", {})
            cost += scored
        else:
            log.warning("round %d: no prompt has a pair; the policy is not trained in this round", number)
        if state.is_main_process:
            steps = [{**entry, "round": float(number)} for entry in history]
            done = {"log": steps, "counts": counts, "cost": asdict(cost)}
            write_json(self.work / f"round-{number}.json", done)
        state.wait_for_everyone()

    def _remove_states_before(self, number: int) -> None:
        """Delete policies and optimizer states that no later round needs."""
        if not this_process().is_main_process or not (self.work / f"policy-{number}").is_dir():
            return
        for earlier in range(1, number):
            shutil.rmtree(self.work / f"policy-{earlier}", ignore_errors=True)
            (self.work / f"optimizer-{earlier}.pt").unlink(missing_ok=True)

    def _answer(self, number: int, policy: Path, prompts: Records) -> pd.DataFrame:
        """Sample answers to every prompt from the policy."""
        tokenizer = load_tokenizer(self.reference)
        repeated = [place for place in range(len(prompts)) for _ in range(self.online.answers)]
        texts = [prompt_of(prompts[place], tokenizer) for place in repeated]
        model = load_model(policy, **self.engine.loading, frozen=True).to(this_process().device)
        seed = int(np.random.SeedSequence([self.trial.seed, number]).generate_state(1)[0])
        ids = prompt_ids(tokenizer, texts, self.sampling["max_prompt_tokens"])
        table = response_table(model, tokenizer, texts, **{**self.sampling, "seed": seed})
        return table.assign(number=repeated, prompt_ids=pd.Series(ids, dtype=object))

    def _write_answers(self, folder: Path, prompts: Records, answers: pd.DataFrame) -> None:
        """Score the answers and write them with what training on them needs."""
        tokenizer = load_tokenizer(self.reference)
        texts = [prompt_of(prompts[place], tokenizer) for place in answers["number"]]
        scores = score_responses(self.judge, texts, answers["response"].tolist(), self.online.answers)
        answers = answers.assign(score=scores)
        with atomic_write(folder) as tmp:
            tmp.mkdir()
            answers.to_parquet(tmp / "answers.parquet", index=False)
            counts = {
                "prompts": len(prompts),
                "answers": len(answers),
                "sampled_tokens": int(answers["ids"].map(len).sum()),
                "unfinished": int((~answers["finished"]).sum()),
                "mean_score": float(answers["score"].mean()),
                **self.prepare(tmp, folder.name, prompts, answers),
            }
            write_json(tmp / "counts.json", counts)


def answer_rows(answers: pd.DataFrame, name: str) -> list[TokenRow]:
    """Return a token row for each prompt with all its answers, as the ids that were sampled."""
    rows = []
    for number, group in answers.groupby("number"):
        prompt, *completions = (tuple(map(int, ids)) for ids in (group["prompt_ids"].iloc[0], *group["ids"]))
        rows.append(TokenRow(f"{name}-{number}", prompt, tuple(completions)))
    return rows


def drawn_prompts(train: pd.DataFrame, online: OnlineSettings, seed: int) -> Records:
    """Return the rows of up to `online.prompts` distinct prompts of the training pairs, in random order.

    Null values are None, and not NaN as in pandas.
    """
    distinct = train.drop_duplicates("prompt")
    count = len(distinct) if online.prompts is None else min(online.prompts, len(distinct))
    drawn = distinct.sample(count, random_state=seed).astype(object)
    return drawn.where(drawn.notna(), None).to_dict("records")


def save_rounds(work: Path, folder: Path) -> None:
    """Copy the folders of all rounds to `folder`, atomically."""
    with atomic_write(folder) as tmp:
        for path in sorted(work.glob("round-*")):
            if path.is_dir():
                shutil.copytree(path, tmp / path.name)
