"""Training in rounds: the policy answers prompts, a judge ranks the answers, and the policy trains on the pairs.

Prompts, answers and optimizer steps are shared equally among the rounds, so the number of rounds changes only how
old the policy is that answers. The optimizer and the learning rate schedule are carried on.

A round writes `round-N` (answers with scores, pairs, quarantine, counts), then the reference log-probs of its
pairs into it, then `policy-N`, and last `round-N.json`. Each of them is written atomically. An interrupted run
continues after the last of them, or at the last checkpoint of the training.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.common.files import atomic_write, write_json
from dpo.data.settings import ValidateSettings
from dpo.engine.chat import prompt_of
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.reference_cache import cache_key, compute_reference, load_reference, policy_key
from dpo.engine.settings import EngineSettings
from dpo.engine.tokenization import TokenRow, prompt_ids
from dpo.evaluation.judges import Judge
from dpo.evaluation.sampling import response_table
from dpo.online.pairs import check_pairs, ranked_pairs, score_responses
from dpo.online.settings import OnlineSettings
from dpo.training.callbacks import Callback
from dpo.training.checkpoints import CheckpointStore
from dpo.training.loop import Segment
from dpo.training.settings import DpoSettings, Trial
from dpo.training.train import save_checkpoint, train_dpo

log = logging.getLogger(__name__)

Records = Sequence[dict[Any, Any]]


@dataclass(frozen=True)
class Rounds:
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

    def run(
        self, prompts: Records, callbacks: Sequence[Callback] = ()
    ) -> tuple[Path, list[dict[str, float]], list[dict[str, Any]]]:
        """Train on answers to the prompts of canonical pairs.

        Returns:
            The folder of the policy, one log entry per step, and the counts of each round.

        Raises:
            InputError: a round has no step, or no round has a pair.
        """
        rounds, per_step = self.trial.rounds or 1, self.dpo.pairs_per_step
        total = self.dpo.epochs * -(-len(prompts) // per_step)
        if total < rounds or len(prompts) < rounds:
            raise InputError(
                f"params.yaml: sweep.rounds: {rounds} rounds of {total} steps, which is {len(prompts)} prompts "
                f"with {per_step} pairs per step: a round has no step; raise online.prompts or lower "
                "dpo.pairs_per_step"
            )
        policy, optimizer, history, counts = self.reference, None, list[dict[str, float]](), []
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
            state = json.loads(done.read_text())
            history += state["log"]
            counts.append(state["counts"])
            if state["log"]:
                policy, optimizer = self.work / f"policy-{number}", self.work / f"optimizer-{number}.pt"
        if not history:
            raise InputError(
                f"{self.trial.name}: no round has a pair: every prompt has equal scores, or fewer than two "
                "finished responses; raise online.answers or evaluate.max_new_tokens, or use another judge in "
                "feedback"
            )
        return policy, history, counts

    def _round(
        self, number: int, policy: Path, prompts: Records, segment: Segment, callbacks: Sequence[Callback]
    ) -> None:
        """Do the parts of a round that are not done."""
        state, folder = this_process(), self.work / f"round-{number}"
        if not folder.is_dir():
            answers = self._answer(number, policy, prompts)
            if state.is_main_process:
                self._write_pairs(folder, prompts, answers)
        state.wait_for_everyone()
        counts = json.loads((folder / "counts.json").read_text())
        history: list[dict[str, float]] = []
        if counts["pairs"]:
            rows = self._rows(folder, prompts)
            history = self._train(policy, rows, self._reference_logps(folder, policy, rows), segment, callbacks)
        else:
            log.warning("round %d: no prompt has a pair; the policy is not trained in this round", number)
        if state.is_main_process:
            steps = [{**entry, "round": float(number)} for entry in history]
            write_json(self.work / f"round-{number}.json", {"log": steps, "counts": counts})
        state.wait_for_everyone()

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

    def _write_pairs(self, folder: Path, prompts: Records, answers: pd.DataFrame) -> None:
        """Score the answers and write them with their pairs."""
        tokenizer = load_tokenizer(self.reference)
        texts = [prompt_of(prompts[place], tokenizer) for place in answers["number"]]
        scores = score_responses(self.judge, texts, answers["response"].tolist(), self.online.answers)
        answers = answers.assign(score=scores)
        with atomic_write(folder) as tmp:
            tmp.mkdir()
            answers.to_parquet(tmp / "answers.parquet", index=False)
            pairs, _ = ranked_pairs(prompts, answers, folder.name)
            rules = check_pairs(
                pairs, tmp, self.contract, tokenizer=self.reference, max_length=self.engine.max_length,
                benchmarks=self.benchmarks,
            )  # fmt: skip
            kept = len(pd.read_parquet(tmp / "pairs.parquet"))
            counts = {
                "prompts": len(prompts),
                "answers": len(answers),
                "sampled_tokens": int(answers["ids"].map(len).sum()),
                "unfinished": int((~answers["finished"]).sum()),
                "without_pair": 1 - len(pairs) / len(prompts),
                "quarantined": len(pairs) - kept,
                "pairs": kept,
                "mean_score": float(answers["score"].mean()),
                "rules": rules,
            }
            write_json(tmp / "counts.json", counts)

    def _rows(self, folder: Path, prompts: Records) -> list[TokenRow]:
        """Return the token rows of the pairs that the data contract accepts."""
        _, rows = ranked_pairs(prompts, pd.read_parquet(folder / "answers.parquet"), folder.name)
        accepted = set(pd.read_parquet(folder / "pairs.parquet", columns=["id"])["id"])
        return [row for row in rows if row.id in accepted]

    def _reference_logps(self, folder: Path, policy: Path, rows: list[TokenRow]) -> dict[str, tuple[float, float]]:
        """Return the reference log-probs of the pairs, from the cache in the round's folder."""
        if "reference" not in self.trial.loss.needs:
            return {}
        source = policy if self.online.reference == "moving" else self.reference
        tokenizer, state = load_tokenizer(source), this_process()
        if not (folder / "reference").is_dir():
            model = load_model(source, **self.engine.loading, frozen=True).to(state.device)
            key = policy_key(source, tokenizer, self.engine)
            compute_reference(folder / "reference", key, rows, model, self.engine, self.work / "shards", state)
            state.wait_for_everyone()
        return load_reference(folder / "reference", cache_key(source, tokenizer, rows, self.engine))

    def _train(
        self,
        policy: Path,
        rows: list[TokenRow],
        reference: dict[str, tuple[float, float]],
        segment: Segment,
        callbacks: Sequence[Callback],
    ) -> list[dict[str, float]]:
        """Train the policy on pairs, save it beside the rounds, and return the log of the steps."""
        model = load_model(policy, **self.engine.loading)
        history = train_dpo(
            model, rows, reference, self.dpo, self.trial, store=self.store, segment=segment, callbacks=callbacks,
            max_tokens_per_microbatch=self.engine.max_tokens_per_microbatch,
        )  # fmt: skip
        number = segment.after.stem.rpartition("-")[2]
        save_checkpoint(model, load_tokenizer(self.reference), self.work / f"policy-{number}", {})
        return history


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
