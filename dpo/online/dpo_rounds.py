"""Rounds of DPO: the best and the worst answer to each prompt are a preference pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dpo.common.distributed import this_process
from dpo.engine.flops import Cost, cost_of
from dpo.engine.logprobs import LogProbModel, load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.reference_cache import cache_key, compute_reference, load_reference, policy_key
from dpo.engine.tokenization import TokenRow
from dpo.online.pairs import check_pairs, ranked_pairs
from dpo.online.rounds import Log, Records, Rounds
from dpo.training.callbacks import Callback
from dpo.training.loop import Segment
from dpo.training.train import train_dpo

Logps = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class DpoRounds(Rounds):
    """Rounds that write `pairs.parquet`, `quarantine.parquet` and the reference log-probs of the pairs."""

    def prepare(self, folder: Path, name: str, prompts: Records, answers: pd.DataFrame) -> dict[str, Any]:
        """Write the pairs that the data contract accepts, and the others."""
        pairs, _ = ranked_pairs(prompts, answers, name)
        rules = check_pairs(
            pairs, folder, self.contract, tokenizer=self.reference, max_length=self.engine.max_length,
            benchmarks=self.benchmarks,
        )  # fmt: skip
        kept = len(pd.read_parquet(folder / "pairs.parquet"))
        return {
            "without_pair": 1 - len(pairs) / len(prompts),
            "quarantined": len(pairs) - kept,
            "pairs": kept,
            "rules": rules,
        }

    def train(
        self, folder: Path, policy: Path, prompts: Records, segment: Segment, callbacks: Sequence[Callback]
    ) -> tuple[LogProbModel, Log, Cost]:
        """Train on the pairs with the loss of the trial."""
        rows = self._rows(folder, prompts)
        reference = self._reference_logps(folder, policy, rows)
        model = load_model(policy, **self.engine.loading, frozen="base" if self.dpo.lora else False)
        history = train_dpo(
            model, rows, reference, self.dpo, self.trial, store=self.store, segment=segment, callbacks=callbacks,
            max_tokens_per_microbatch=self.engine.max_tokens_per_microbatch,
        )  # fmt: skip
        return model, history, cost_of(rows, model.model.config, "scored") if reference else Cost()

    def _rows(self, folder: Path, prompts: Records) -> list[TokenRow]:
        """Return the token rows of the pairs that the data contract accepts."""
        _, rows = ranked_pairs(prompts, pd.read_parquet(folder / "answers.parquet"), folder.name)
        accepted = set(pd.read_parquet(folder / "pairs.parquet", columns=["id"])["id"])
        return [row for row in rows if row.id in accepted]

    def _reference_logps(self, folder: Path, policy: Path, rows: list[TokenRow]) -> Logps:
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
