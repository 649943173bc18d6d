"""Cases of the comparison with TRL: settings, targets and pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.engine.settings import Precision
from dpo.engine.tokenization import TokenRow, encode_pairs

TRAIN = Path("data/train.parquet")
PAIRS_PER_STEP, SEED, BETA = 8, 17, 0.1
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TRAINING = {"optim": "adamw_torch_fused", "learning_rate": 2e-5, "lr_scheduler_type": "constant",
            "weight_decay": 0.0, "max_grad_norm": 1.0, "num_train_epochs": 1, "seed": SEED}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One comparison. `speed` is the minimum speed ratio, `memory` the maximum memory ratio; both are targets."""

    name: str
    speed: float | None
    memory: float | None
    long: bool = False
    micro_batch: int = PAIRS_PER_STEP
    by_length: bool = False
    checkpointing: bool = False
    """Gradient checkpointing of TRL, which is its default."""
    ours_checkpointing: bool = False
    dtype: Precision = "fp32"
    lora: bool = False
    train: bool = True
    pairs_per_step: int = PAIRS_PER_STEP
    gpu: bool = False
    """Run on a GPU: our side compiled, TRL with Liger's kernels."""
    quantization: Literal["nf4"] | None = None
    vocabulary: Precision = "fp32"
    """`engine.vocabulary` of our side."""

    def warm_up(self, rows: Sequence[TokenRow]) -> int:
        """Return how many of a run's first pairs are not timed: those of one step."""
        return self.pairs_per_step

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `dpo.engine.logprobs.load_model`."""
        return {
            "precision": self.dtype,
            "compiled": self.gpu,
            "quantization": self.quantization,
            "vocabulary": self.vocabulary,
        }


CASES = [
    Case("short_default", 1.8, 0.6, checkpointing=True),
    Case("short_tuned", 1.5, 0.6, micro_batch=2, by_length=True),
    Case("long_default", 2.2, 0.5, long=True, checkpointing=True, ours_checkpointing=True),
    Case("long_tuned", 2.5, 0.4, long=True, micro_batch=1, by_length=True),
    Case("reference_short", 2.0, 0.6, train=False),
    Case("reference_long", 2.5, 0.6, long=True, train=False),
    Case("lora_short", 1.8, 0.7, micro_batch=2, by_length=True, lora=True),
    Case("short_bf16", None, None, micro_batch=2, by_length=True, dtype="bf16"),
]


def arguments(case: Case) -> dict[str, Any]:
    """Return the trainer arguments that both sides share."""
    return {
        "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": case.pairs_per_step // case.micro_batch,
        "use_cpu": not case.gpu,
        "bf16": case.dtype == "bf16",
        **TRAINING,
    }


def _pairs() -> Any:
    import pandas as pd  # not at the top: it would add to the memory of the measured processes

    return pd.read_parquet(TRAIN)


def short_rows(tokenizer: PreTrainedTokenizerBase, count: int) -> list[TokenRow]:
    """Return random film-review pairs of the default data, about 134 tokens each when TRL pads them."""
    table = _pairs()
    films = table[table["source"] == "film review"].sample(count, random_state=SEED)
    return encode_pairs(films.to_dict("records"), tokenizer, 1024)


def long_rows(tokenizer: PreTrainedTokenizerBase, count: int) -> list[TokenRow]:
    """Return pairs of about 300 prompt and two times 60 completion tokens, joined from sentences of the data."""
    table = _pairs()
    sentences = [*table["chosen"], *table["rejected"]]
    draw = np.random.default_rng(SEED)

    def text(least_tokens: int) -> str:
        words = ""
        while len(tokenizer.encode(words)) < least_tokens:
            words += " " * bool(words) + sentences[draw.integers(len(sentences))]
        return words

    fields = {"prompt": 265, "chosen": 48, "rejected": 48}
    pairs = [{"id": f"long {i}", **{k: text(n) for k, n in fields.items()}} for i in range(count)]
    return encode_pairs(pairs, tokenizer, 1024)


def case_rows(case: Case, tokenizer: PreTrainedTokenizerBase, steps: int) -> list[TokenRow]:
    """Return a warm-up step of short pairs, then `steps` steps of the case's pairs.

    `by_length` sorts the pairs from longest to shortest, the best order that TRL's `group_by_length` can reach.
    """
    timed = steps * PAIRS_PER_STEP
    rows = short_rows(tokenizer, PAIRS_PER_STEP + (0 if case.long else timed))
    warm_up, rows = rows[:PAIRS_PER_STEP], long_rows(tokenizer, timed) if case.long else rows[PAIRS_PER_STEP:]
    return warm_up + (sorted(rows, key=padded_length, reverse=True) if case.by_length else rows)


def padded_length(row: TokenRow) -> int:
    """Return the tokens of the prompt and the longer completion."""
    return len(row.prompt) + max(map(len, row.completions))


def padded_batches(case: Case, rows: Sequence[TokenRow]) -> list[tuple[int, int]]:
    """Return (sequences, length) of TRL's batches: two per pair, padded to the longest of the micro-batch."""
    batches = [rows[i : i + case.micro_batch] for i in range(0, len(rows), case.micro_batch)]
    return [(2 * len(batch), max(map(padded_length, batch))) for batch in batches]
