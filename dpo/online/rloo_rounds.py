"""Rounds of RLOO: reinforcement learning on the scores of all answers to each prompt.

The reward of an answer is its score minus beta times log(pi(y|x) / pi_ref(y|x)), in nats of the whole answer, at
the policy that sampled it. Its advantage is the reward minus the mean reward of the other answers to the prompt
(Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
LLMs").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from dpo.common.distributed import share, this_process
from dpo.common.files import atomic_write
from dpo.engine.flops import Cost, cost_of
from dpo.engine.logprobs import LogProbModel, load_model, sequence_logps
from dpo.engine.sharding import together
from dpo.engine.tokenization import TokenRow
from dpo.online.rounds import Log, Records, Rounds, answer_rows
from dpo.training.callbacks import Callback
from dpo.training.loop import Segment
from dpo.training.objectives import Answers
from dpo.training.train import train_rloo

FILE = "advantages.parquet"


@dataclass(frozen=True)
class RlooRounds(Rounds):
    """Rounds that write `advantages.parquet`: rewards, log-probs and advantage of each answer."""

    def prepare(self, folder: Path, name: str, prompts: Records, answers: pd.DataFrame) -> dict[str, Any]:
        """Count prompts whose answers have equal scores. They are trained on, too, because their KL differs."""
        equal = answers.assign(score=rewarded(answers)).groupby("number")["score"].nunique() == 1
        return {"equal_scores": float(equal.mean())}

    def train(
        self, folder: Path, policy: Path, prompts: Records, segment: Segment, callbacks: Sequence[Callback]
    ) -> tuple[LogProbModel, Log, Cost]:
        """Train on all answers by their advantages."""
        answers = pd.read_parquet(folder / "answers.parquet")
        rows, state = answer_rows(answers, folder.name), this_process()
        sources = [policy] if self.online.reference == "moving" else sorted({policy, self.reference})
        if not (folder / FILE).is_file():
            logps = {source: self._logps(source, rows) for source in sources}
            if state.is_main_process:
                reference = logps.get(self.reference, logps[policy])
                self._write_advantages(folder / FILE, answers, logps[policy], reference)
            state.wait_for_everyone()
        table = pd.read_parquet(folder / FILE)
        by_prompt = table.drop(columns="number").groupby(table["number"])
        values = {
            f"{folder.name}-{number}": Answers(*(each[column].tolist() for column in each))
            for number, each in by_prompt
        }
        model = load_model(policy, **self.engine.loading, frozen="base" if self.dpo.lora else False)
        history = train_rloo(
            model, rows, values, self.dpo, self.trial, clip=self.online.clip, store=self.store, segment=segment,
            max_tokens_per_microbatch=self.engine.max_tokens_per_microbatch, callbacks=callbacks,
        )  # fmt: skip
        scored = [cost_of(rows, model.model.config, "scored") for _ in sources]
        return model, history, sum(scored, Cost())

    def _logps(self, source: Path, rows: list[TokenRow]) -> NDArray[np.float64]:
        """Return the log-probs [answers] of all answers."""
        model = load_model(source, **self.engine.loading, frozen=True).to(this_process().device)
        budget = self.engine.max_tokens_per_microbatch
        table = share(
            len(rows),
            lambda mine: sequence_logps(model, [rows[i] for i in mine], budget).tolist(),
            together(model),
        )
        return np.array(table, float).flatten()

    def _write_advantages(
        self, file: Path, answers: pd.DataFrame, policy: NDArray[np.float64], reference: NDArray[np.float64]
    ) -> None:
        rewards = rewarded(answers) - self.trial.beta * (policy - reference)
        by_prompt = advantages(rewards.reshape(-1, self.online.answers), self.online.advantage)
        columns = {
            "number": answers["number"],
            "scores": rewarded(answers),
            "policy_logps": policy,
            "reference_logps": reference,
            "advantages": by_prompt.flatten(),
        }
        with atomic_write(file) as tmp:
            pd.DataFrame(columns).to_parquet(tmp, index=False)


def rewarded(answers: pd.DataFrame) -> NDArray[np.float64]:
    """Return the scores of answers. A truncated answer has the lowest score of the round."""
    scores = answers["score"].to_numpy(float)
    return np.where(answers["finished"], scores, scores.min())


def advantages(rewards: ArrayLike, kind: Literal["leave_one_out", "group"]) -> NDArray[np.float64]:
    """Return the advantages [prompts, answers] of rewards of the same shape.

    `leave_one_out` is the reward minus the mean of the other answers to the prompt. `group` is that of GRPO: the
    reward minus the mean of all answers, divided by their standard deviation plus 1e-4 (Shao et al. 2024,
    "DeepSeekMath", section 4.1).
    """
    values = np.asarray(rewards, float)
    centred, answers = values - values.mean(1, keepdims=True), values.shape[1]
    if kind == "group":
        return centred / (values.std(1, ddof=1, keepdims=True) + 1e-4)
    return centred * answers / (answers - 1)
