"""Paths of the inputs and outputs of all stages, relative to the project folder."""

from pathlib import Path

from dpo.common.errors import InputError
from dpo.evaluation.settings import SHARED_REPLIES, TRAINED_REWARD_MODELS
from dpo.training.settings import Trial


def checkout(folder: Path) -> Path:
    """Return the checkout that owns a folder in which DVC runs an experiment, else an empty path.

    `dvc exp run --temp` and `--queue` copy what git tracks to a folder below `.dvc/tmp/exps`.
    """
    before, experiment, _ = folder.as_posix().partition("/.dvc/tmp/exps/")
    return Path(before) if experiment else Path()


BASE = Path("models/base")
REFERENCE = Path("models/reference")
REWARDS = Path(TRAINED_REWARD_MODELS)
"""Reward models, by their seed."""
BENCHMARKS = Path("data/benchmarks")
"""Texts that no pair may contain."""
RAW_PAIRS = Path("data/raw_pairs.parquet")
RAW_DEMONSTRATIONS = Path("data/raw_demonstrations.parquet")
QUARANTINE = Path("data/quarantine.parquet")
QUARANTINED_DEMONSTRATIONS = Path("data/quarantined_demonstrations.parquet")
TRAIN = Path("data/train.parquet")
EVAL = Path("data/eval.parquet")
DEMONSTRATIONS = Path("data/demonstrations.parquet")
"""Rows of `sft.source`; empty without it, as the two tables of demonstrations above."""
TOKENS_TRAIN = Path("tokens/train")
TOKENS_EVAL = Path("tokens/eval")
TOKENS_DEMONSTRATIONS = Path("tokens/demonstrations")
REFERENCE_TRAIN = Path("reference/train")
REFERENCE_EVAL = Path("reference/eval")
REFERENCE_PROGRESS = Path(".reference-progress")
TRAINING_PROGRESS = Path(".training-progress")
REFERENCE_SAMPLES = Path("samples/reference.parquet")
METRICS = Path("metrics")
CAPABILITIES = METRICS / "capabilities"
REWARD_MODELS = METRICS / "reward_model"
COMPARISON = METRICS / "comparison.json"
SUMMARY = METRICS / "summary.json"
"""The only file that DVC shows as metrics: the choice, and the main figures of the selected policy."""
JUDGE_REPLIES = Path(SHARED_REPLIES)
REPLIES = "replies"
"""Attribute of a table of samples: the replies of paid judges, by key."""
REFERENCE_COST = METRICS / "cost/reference.json"
"""Cost of supervised fine-tuning, which all trials share."""
CHECKOUT = checkout(Path.cwd())
"""The folder with MLflow's stores."""
MLFLOW_STORE = f"sqlite:///{CHECKOUT / 'mlflow.db'}"
PROFILE = METRICS / "profile.json"
REPORTS = Path("reports")
REPORT = REPORTS / "index.html"
SELECTION = REPORTS / "compare.md"
FRONTIER_LINK = "Reward against KL in MLflow"
"""Text of the link that `SELECTION` ends with."""


def check_copied(*names: str | None) -> None:
    """Raise InputError if an experiment has no copy of a file or folder that its checkout has."""
    for name in filter(None, names):
        if (CHECKOUT / name).exists() and not Path(name).exists():
            raise InputError(
                f"{name}: neither git nor DVC tracks it, so an experiment with --temp or --queue has no copy; run "
                f"`dvc add {name}` and `git add {name}.dvc`"
            )


def policy_folder(trial: Trial) -> Path:
    """Return the folder of a trial's checkpoint."""
    return Path("models") / trial.name


def model_card(trial: Trial) -> Path:
    """Return the path of a trial's model card."""
    return Path("models") / f"{trial.name}.md"


def train_log(trial: Trial) -> Path:
    """Return the path of a trial's training log, one row per step."""
    return METRICS / "train" / f"{trial.name}.csv"


def rounds_folder(trial: Trial) -> Path:
    """Return the folder of a trial's rounds: responses with scores, pairs, quarantine and reference log-probs."""
    return Path("rounds") / trial.name


def rounds_summary(trial: Trial) -> Path:
    """Return the path of the counts of a trial's rounds."""
    return METRICS / "online" / f"{trial.name}.json"


def cost(trial: Trial) -> Path:
    """Return the path of the tokens, FLOPs, minutes and peak memory of a trial's training."""
    return METRICS / "cost" / f"{trial.name}.json"


def reward_metrics(seed: int) -> Path:
    """Return the path of the held-out accuracy and the cost of a reward model."""
    return REWARD_MODELS / f"{seed}.json"


def evaluation(trial: Trial) -> Path:
    """Return the path of a trial's held-out metrics."""
    return METRICS / "evaluate" / f"{trial.name}.json"


def capability(task: str) -> Path:
    """Return the path of the results of a benchmark task."""
    return CAPABILITIES / f"{task}.json"


def capability_script(task: str) -> Path:
    """Return the path of the script that adds the results of a benchmark task to the report."""
    return REPORTS / "capabilities" / f"{task}.js"


def policy_samples(trial: Trial) -> Path:
    """Return the path of the responses of a trial's policy."""
    return Path("samples") / f"{trial.name}.parquet"


def policy_margins(trial: Trial) -> Path:
    """Return the path of the rewards and the margin of every held-out pair under a trial's policy."""
    return Path("margins") / f"{trial.name}.parquet"
