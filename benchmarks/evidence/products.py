"""What all policies of a seed share: data, reference, reward model, and the reference's responses.

Each product is built when it is first needed, in a folder whose name has the hash of its settings.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from benchmarks.evidence.plan import SECTIONS, Case, packages, used
from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.common.files import atomic_write, write_json
from dpo.config import Params
from dpo.data.ingest import write_raw_pairs
from dpo.data.prompts import COLUMNS
from dpo.data.sources import read_source
from dpo.data.validate import validate
from dpo.engine.base_model import load_base, save_base
from dpo.engine.chat import Prompt, prompt_of
from dpo.engine.flops import Cost, cost_of
from dpo.engine.logprobs import ENGINE_VERSION, load_model
from dpo.engine.pretrained import load_tokenizer, load_weights
from dpo.engine.reference_cache import cache_key, compute_reference, load_reference, policy_key
from dpo.engine.tokenization import TokenRow, encode_pairs
from dpo.evaluation.judges import Judge, load_judge, load_judges
from dpo.evaluation.judges.accuracy import judge_accuracy
from dpo.evaluation.judges.reward_model import reward_scores
from dpo.evaluation.judges.scorer import Scorer
from dpo.evaluation.sampling import proportional_first, response_limit, response_table
from dpo.evaluation.settings import TRAINED_REWARD_MODELS, RewardModelSettings
from dpo.online.reward_model import train_reward_model
from dpo.training.settings import Trial
from dpo.training.train import save_checkpoint, train_sft

BENCHMARKS = Path("data/benchmarks")
POLICY_SECTIONS = {"dpo", "online", "feedback"}
"""Sections that only the training of policies uses."""


@dataclass(frozen=True)
class Products:
    """Products of the seed of `params`, in `cache`."""

    params: Params
    cache: Path

    @cached_property
    def folder(self) -> Path:
        """Folder of the seed."""
        facts = {name: used(getattr(self.params, name)) for name in SECTIONS if name not in POLICY_SECTIONS}
        return self.cache / f"seed-{self.params.seed}-{_digest(facts | {'seed': self.params.seed})}"

    @property
    def lock(self) -> FileLock:
        """Lock of products that several processes may build at once."""
        self.cache.mkdir(parents=True, exist_ok=True)
        return FileLock(self.cache / "products.lock")

    @cached_property
    def base(self) -> Path:
        """Folder of the base model, which all seeds share."""
        folder = self.cache / f"base-{_digest({'model': used(self.params.model)})}"
        with self.lock:
            if not folder.is_dir():
                model, tokenizer = load_base(self.params.model)
                with atomic_write(folder) as tmp:
                    save_base(model, tokenizer, tmp)
        return folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the base model."""
        return load_tokenizer(self.base)

    @cached_property
    def train(self) -> pd.DataFrame:
        """Training pairs."""
        return self._pairs("train")

    @cached_property
    def held_out(self) -> pd.DataFrame:
        """Held-out pairs."""
        return self._pairs("eval")

    def _pairs(self, split: str) -> pd.DataFrame:
        params, folder = self.params, self.folder / "data"
        if not folder.is_dir():
            with atomic_write(folder) as tmp:
                tmp.mkdir()
                data, raw = params.data, tmp / "raw.parquet"
                write_raw_pairs(read_source(data, params.seed), raw, data.origin, data)
                checked = validate(
                    raw, params.validate, tokenizer=self.base, max_length=params.engine.max_length,
                    benchmarks=BENCHMARKS, caps={"train": data.max_train_pairs, "eval": data.max_eval_pairs},
                    seed=params.seed, origin=data.origin, previous=None,
                    outputs={name: tmp / f"{name}.parquet" for name in ("train", "eval", "quarantine")},
                )  # fmt: skip
                if checked.errors:
                    raise InputError("\n".join(error.message for error in checked.errors))
        return pd.read_parquet(folder / f"{split}.parquet")

    @cached_property
    def train_rows(self) -> list[TokenRow]:
        """Token rows of the training pairs."""
        return encode_pairs(self.train.to_dict("records"), self.tokenizer, self.params.engine.max_length)

    @cached_property
    def reference(self) -> Path:
        """The base model, or the checkpoint of supervised fine-tuning."""
        params, folder = self.params, self.folder / "reference"
        if params.sft is None:
            return self.base
        if not folder.is_dir():
            rows = pd.Series(self.train_rows, dtype=object)
            if params.sft.max_pairs is not None:
                rows = rows.sample(min(params.sft.max_pairs, len(rows)), random_state=params.seed)
            if params.sft.completions == "chosen":
                rows = rows.map(lambda row: TokenRow(row.id, row.prompt, row.completions[:1]))
            model = load_model(self.base, params.engine.precision, params.engine.compile)
            train_sft(
                model, rows.tolist(), params.sft, seed=params.seed,
                max_tokens_per_microbatch=params.engine.max_tokens_per_microbatch,
            )  # fmt: skip
            save_checkpoint(model, self.tokenizer, folder, {})
        return folder

    @cached_property
    def reference_logps(self) -> Mapping[str, tuple[float, float]]:
        """Reference log-probs of the training pairs."""
        folder, engine, state = self.folder / "logps", self.params.engine, this_process()
        if not folder.is_dir():
            model = load_model(self.reference, **engine.loading, frozen=True).to(state.device)
            key = policy_key(self.reference, self.tokenizer, engine)
            compute_reference(folder, key, self.train_rows, model, engine, self.folder / "shards", state)
        return load_reference(folder, cache_key(self.reference, self.tokenizer, self.train_rows, engine))

    @property
    def uses_reward_model(self) -> bool:
        """Whether a reward model of this seed trains the policies."""
        feedback = self.params.feedback
        return isinstance(feedback, RewardModelSettings) and feedback.model == TRAINED_REWARD_MODELS

    @cached_property
    def reward_model(self) -> Path:
        """The reward model of this seed, with `facts.json`: held-out accuracy and cost."""
        params, folder = self.params, self.folder / "reward_model"
        if not folder.is_dir():
            trained = train_reward_model(
                self.reference, self.tokenizer, self.train, params.reward_model,
                precision=params.engine.precision, seed=params.seed,
            )  # fmt: skip
            model = trained.model.eval()
            accuracy = judge_accuracy(
                [self._scorer(model)], self.held_out, self.tokenizer, len(self.held_out), params.seed
            )
            cost = sum(
                (cost_of(trained.rows, model.config, "trained") for _ in range(params.reward_model.epochs)), Cost()
            )
            with atomic_write(folder) as tmp:
                model.save_pretrained(tmp)
                self.tokenizer.save_pretrained(tmp)
                write_json(
                    tmp / "facts.json",
                    {"accuracy": accuracy, "cost": asdict(cost), "loss": trained.log[-1]["loss"]},
                )
        return folder

    @property
    def reward_cost(self) -> Cost:
        """Cost of training the reward model."""
        return Cost(**json.loads((self.reward_model / "facts.json").read_text())["cost"])

    def _scorer(self, model: Any) -> Scorer:
        def scores(prompts: Any, responses: Any) -> list[float]:
            return reward_scores(model, self.tokenizer, prompts, responses)

        return Scorer("reward_model", scores, "feedback")

    @cached_property
    def feedback(self) -> Judge:
        """The judge that trains."""
        if not self.uses_reward_model:
            assert self.params.feedback is not None
            return load_judge(self.params.feedback, "feedback")
        self.tokenizer.truncation_side = "left"
        model = load_weights(AutoModelForSequenceClassification, self.reward_model).eval()
        return self._scorer(model.to(this_process().device))

    def first_round(self, trial: Trial) -> Path:
        """Return the folder of the first round, which trials share whose prompts and answers are the same."""
        return (
            self.folder / f"round-1-{trial.method}-{trial.rounds}-{_digest({'online': used(self.params.online)})}"
        )

    @cached_property
    def limit(self) -> int:
        """Maximum number of tokens of a response."""
        setting = self.params.evaluate.max_new_tokens
        return response_limit(setting, self.held_out, self.tokenizer, self.params.engine.max_length)

    @cached_property
    def reference_samples(self) -> pd.DataFrame:
        """Held-out prompts with the reference's responses and `score/NAME` of each judge.

        KL is measured on the first `evaluate.kl_samples` rows.
        """
        params, file = self.params, self.folder / "reference_samples.parquet"
        if not file.is_file():
            pairs, count = self.held_out, params.evaluate.samples
            table = pairs[COLUMNS].sample(count, replace=len(pairs) < count, random_state=params.seed)
            order = proportional_first(table["prompt"].tolist(), params.evaluate.kl_samples or count)
            table = table.iloc[order].reset_index(drop=True)
            prompts = self.prompts(table)
            model = load_model(self.reference, **params.engine.loading, frozen=True).to(this_process().device)
            table = table.join(response_table(model, self.tokenizer, prompts, **params.sampling(self.limit)))
            for name, scores in self.judged(prompts, table["response"].tolist()).items():
                table[f"score/{name}"] = scores
            with atomic_write(file) as tmp:
                table.to_parquet(tmp, index=False)
        return pd.read_parquet(file)

    @cached_property
    def reference_feedback(self) -> list[float]:
        """Scores of the reference's responses by the judge that trains."""
        file = self.folder / "reference_feedback.json"
        if not file.is_file():
            table = self.reference_samples
            write_json(file, self.feedback.score(self.prompts(table), table["response"].tolist()))
        return list(json.loads(file.read_text()))

    def prompts(self, table: pd.DataFrame) -> list[Prompt]:
        """Return the prompts of rows with the fields of canonical pairs."""
        return [prompt_of(row, self.tokenizer) for row in table.to_dict("records")]

    def judged(self, prompts: list[Prompt], responses: list[str]) -> dict[str, list[float]]:
        """Return the scores of each judge that evaluates.

        Raises:
            InputError: a judge cannot score.
        """
        scores = {
            judge.name: judge.score(prompts, responses) for judge in load_judges(self.params.evaluate.judges)
        }
        if None in scores.values():
            raise InputError("evaluate.judges: only judges that score can be used; remove the others")
        return {name: values for name, values in scores.items() if values is not None}


def build(cases: Sequence[Case], cache: Path) -> float:
    """Build what cases of one seed need and is missing, and return the seconds that it took."""
    start, products = time.monotonic(), Products(cases[0].params, cache)
    products.reference_samples  # noqa: B018 - building it is the purpose
    if products.uses_reward_model and any(map(needs_feedback, cases)):
        products.reward_model  # noqa: B018
    if any(map(needs_reference_logps, cases)):
        products.reference_logps  # noqa: B018
    return time.monotonic() - start


def needs_reference_logps(case: Case) -> bool:
    """Return whether the policy trains on the pairs of the data with a loss that has a reference."""
    return case.trial is not None and case.trial.method is None and "reference" in case.trial.loss.needs


def needs_feedback(case: Case) -> bool:
    """Return whether the judge that trains is used."""
    return case.trial is None or case.trial.method is not None


def _digest(facts: dict[str, Any]) -> str:
    """Return the hash of settings with the versions of engine and packages."""
    facts = facts | {"engine": ENGINE_VERSION, "packages": packages()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
