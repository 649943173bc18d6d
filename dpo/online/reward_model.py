"""Training of a reward model on preference pairs with TRL (extra `rl`)."""

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.utils import set_seed
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from dpo.common.errors import InputError
from dpo.engine.chat import prompt_of
from dpo.engine.pretrained import ADAPTER_CONFIG, load_weights
from dpo.engine.settings import Precision
from dpo.engine.tokenization import TokenRow
from dpo.evaluation.judges.reward_model import context_length, encoded
from dpo.online.settings import RewardTrainingSettings

ROWS_AT_ONCE = 4
"""Maximum number of pairs in one forward pass."""


@dataclass(frozen=True)
class RewardTraining:
    """A trained reward model."""

    model: PreTrainedModel
    log: list[dict[str, float]]
    """One entry per step."""
    rows: list[TokenRow]
    """The sequences that were trained in each epoch: two per pair."""


def train_reward_model(
    reference: Path,
    tokenizer: PreTrainedTokenizerBase,
    pairs: pd.DataFrame,
    params: RewardTrainingSettings,
    *,
    precision: Precision,
    seed: int,
) -> RewardTraining:
    """Train a classifier with one output from a checkpoint on -log sigmoid(r_chosen - r_rejected) (Bradley-Terry).

    It reads a pair as the judge `reward_model` does: prompt and completion, rendered with the chat template. The
    output layer is new and starts at random weights.

    Raises:
        InputError: TRL is not installed, the checkpoint is an adapter, or there are no pairs.
    """
    try:
        from trl import RewardConfig, RewardTrainer
    except ImportError as error:
        raise InputError(
            f"params.yaml: sweep.reward_models: a reward model needs TRL ({error}); run "
            "`pip install 'trl>=1.16,<2'`, or set it to []"
        ) from error
    if (reference / ADAPTER_CONFIG).is_file():
        raise InputError(f"{reference}: a reward model cannot start from an adapter; merge it with `dpo merge`")
    pairs = pairs[pairs["chosen"].notna() & pairs["rejected"].notna()]
    if pairs.empty:
        raise InputError("data/train.parquet: a reward model needs pairs, but all rows are labelled completions")
    set_seed(seed)
    model = load_weights(AutoModelForSequenceClassification, reference, num_labels=1)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    longest = context_length(model, tokenizer)
    ids: dict[str, list[Any]] = {"chosen_ids": [], "rejected_ids": []}
    for pair in pairs.to_dict("records"):
        prompt = prompt_of(pair, tokenizer)
        for side in ("chosen", "rejected"):
            ids[f"{side}_ids"].append(encoded(tokenizer, prompt, pair[side], longest)["input_ids"])
    from datasets import Dataset

    size = params.pairs_per_step
    at_once = next(number for number in range(min(ROWS_AT_ONCE, size), 0, -1) if size % number == 0)
    steps = params.epochs * math.ceil(len(pairs) / size)
    with tempfile.TemporaryDirectory() as scratch:
        config = RewardConfig(
            output_dir=scratch, num_train_epochs=params.epochs, per_device_train_batch_size=at_once,
            gradient_accumulation_steps=size // at_once, learning_rate=params.learning_rate,
            lr_scheduler_type="cosine", warmup_steps=steps // 10, seed=seed, bf16=precision == "bf16",
            center_rewards_coefficient=params.centre or None, max_length=None, gradient_checkpointing=False,
            save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = RewardTrainer(
            model=model, args=config, train_dataset=Dataset.from_dict(ids), processing_class=tokenizer
        )
        trainer.train()
    log = [{k: float(v) for k, v in entry.items()} for entry in trainer.state.log_history if "loss" in entry]
    sides = [row for side in ids.values() for row in side]
    return RewardTraining(model, log, [TokenRow(str(n), row, ()) for n, row in enumerate(sides)])
