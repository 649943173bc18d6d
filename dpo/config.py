"""Read `params.yaml` into typed settings. Unknown keys and values of another type are errors."""

import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent

from dpo.common import functions
from dpo.common.errors import InputError
from dpo.common.settings import Seed, Settings
from dpo.data.reasoning import reasoning_problems
from dpo.data.settings import DataSettings, ValidateSettings
from dpo.engine.settings import EngineSettings, ModelSettings
from dpo.evaluation.settings import (
    TRAINED_REWARD_MODELS,
    CapabilitiesSettings,
    CompareSettings,
    EvaluateSettings,
    FeedbackSettings,
    JudgeSettings,
    PromoteSettings,
    RewardModelSettings,
    ScorerSettings,
    VerifierSettings,
)
from dpo.online.settings import OnlineSettings, RewardTrainingSettings
from dpo.training.losses import LOSSES, Custom, Loss, Sigmoid
from dpo.training.settings import DpoSettings, Method, SftSettings, SweepSettings, Trial

FORMER_KEYS = {
    "engine.tokens_per_batch": "renamed; use engine.max_tokens_per_microbatch",
    "sft.warmup_steps": "renamed; use sft.warmup_ratio, a share of the steps",
    "dpo.warmup_steps": "renamed; use dpo.warmup_ratio, a share of the steps",
    "evaluate.judge": "renamed; use evaluate.judges, a list",
    "compare.signs": "renamed; use compare.guardrails",
    "dpo.reference": "removed: reference log-probs always come from the cache; delete the key",
    "evaluate.temperature": "removed: responses are always sampled at temperature 1, which the KL estimate needs; "
    "delete the key",
}
"""Keys of earlier versions, with the fix."""

PROXIES = ("scorer", "reward_model", "llm")
"""Kinds of judges that estimate the preference of people. A verifier knows the right answer."""


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """How stages run. Results do not depend on these settings."""

    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5
    """Minutes between two training checkpoints; 0 saves one after every step."""
    check_memory: bool = True
    """Stop a stage before it loads a model if its planned memory exceeds the available memory."""
    launch: str | None = None
    """Configuration file of `accelerate launch` for the stages that run the model; null runs one process."""
    landed_mib: Annotated[float, Field(gt=0)] = 4096
    """Maximum size of a new file of a retraining, also unpacked, in MiB; a larger file is refused."""
    landed_minutes: Annotated[float, Field(gt=0)] = 30
    """Maximum minutes to copy, and to read, a new file of a retraining; a slower file is refused."""
    flow_hours: Annotated[float, Field(gt=0)] = 72
    """Maximum hours of a flow run of the worker; a longer one is stopped and frees its slot."""


def _losses_schema(_: object, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Return the schema of a mapping with one optional section for each loss."""
    fields = [(name, cls, cls()) for name, cls in LOSSES.items()]
    sections = make_dataclass("Losses", fields, bases=(Settings,), frozen=True, kw_only=True)
    return no_info_after_validator_function(vars, handler(sections))


@dataclass(frozen=True, kw_only=True)
class Params(Settings):
    """All settings."""

    seed: Seed
    """Seed of data, reference and responses. Trials have seeds of their own in `sweep`."""
    model: ModelSettings
    data: DataSettings
    validate: ValidateSettings
    engine: EngineSettings
    sft: SftSettings | None
    """Null: the base model is the reference."""
    dpo: DpoSettings
    losses: Annotated[Mapping[str, Loss], GetPydanticSchema(_losses_schema)]
    """Every loss with its settings, by name. A loss that the section omits has its defaults."""
    sweep: SweepSettings
    evaluate: EvaluateSettings
    compare: CompareSettings
    feedback: FeedbackSettings | None = None
    """Judge that scores responses for training, as in `evaluate.judges`; null if `sweep.rounds` and `sweep.rloo`
    are empty. A judge that trains may not evaluate."""
    online: OnlineSettings = field(default_factory=OnlineSettings)
    reward_model: RewardTrainingSettings = field(default_factory=RewardTrainingSettings)
    capabilities: CapabilitiesSettings = field(default_factory=CapabilitiesSettings)
    promote: PromoteSettings = field(default_factory=PromoteSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def trials(self) -> list[Trial]:
        """Return all trials of the sweep, in DVC's order: on the pairs of the data, online, RLOO."""
        sweep = self.sweep
        points = (sweep.betas, sweep.learning_rates, sweep.seeds)
        every = [self.losses[name] for name in (*sweep.losses, *sweep.reference_free_losses)]
        kinds: list[tuple[Method | None, tuple[int | None, ...], Sequence[Loss]]] = [
            (None, (None,), every),
            ("online", sweep.rounds, every),
            ("rloo", sweep.rloo, [Sigmoid()]),
        ]
        return [
            Trial(loss=loss, beta=beta, learning_rate=rate, seed=seed, method=method, rounds=rounds)
            for method, numbers, losses in kinds
            for rounds, loss, beta, rate, seed in itertools.product(numbers, losses, *points)
        ]

    def judge_of(self, trial: Trial) -> JudgeSettings:
        """Return the judge that trains a trial: of several reward models of the sweep, the one with its seed."""
        assert self.feedback is not None
        if not isinstance(self.feedback, RewardModelSettings) or self.feedback.model != TRAINED_REWARD_MODELS:
            return self.feedback
        seeds = self.sweep.reward_models
        seed = trial.seed if trial.seed in seeds else seeds[0]
        return replace(self.feedback, model=f"{TRAINED_REWARD_MODELS}/{seed}")

    def loss_lists(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return losses by the list of `sweep` that they belong to. Unknown losses are in `losses`."""
        lists: dict[str, list[str]] = {"losses": [], "reference_free_losses": []}
        for name in names:
            free = name in self.losses and "reference" not in self.losses[name].needs
            lists["reference_free_losses" if free else "losses"].append(name)
        return lists

    @property
    def imitated(self) -> Literal["both", "chosen"]:
        """Completions whose perplexity the evaluation reports: those of supervised fine-tuning, else both."""
        return self.sft.completions if self.sft and not self.sft.source else "both"

    @property
    def trains_adapter(self) -> bool:
        """Whether the policy is a LoRA adapter, a new one or a continued one."""
        return self.dpo.lora is not None or self.model.adapter == "continue"

    @property
    def demonstrations(self) -> DataSettings | None:
        """Where demonstrations come from, or None if supervised fine-tuning uses the training pairs or is off."""
        if self.sft is None or self.sft.source is None:
            return None
        names = ("source", "revision", "split", "config", "columns", "roles")
        return DataSettings(**{name: getattr(self.sft, name) for name in names})

    @property
    def hub_reference(self) -> tuple[str, str] | None:
        """Hub id and revision of the reference, if it is a model of the hub without changes."""
        model = self.model
        unchanged = self.sft is None and model.adapter is None
        return (model.base, model.revision) if unchanged and model.revision else None

    def sampling(self, max_new_tokens: int) -> dict[str, int]:
        """Return arguments of `dpo.evaluation.sampling.response_table`. Longer prompts are shortened."""
        return {
            "max_new_tokens": max_new_tokens,
            "max_prompt_tokens": self.engine.max_length - max_new_tokens,
            "max_tokens_per_batch": self.evaluate.max_tokens_per_batch,
            "seed": self.seed,
        }


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check the settings.

    Raises:
        InputError: one line for each fault, with file, key and fix.
    """
    try:
        text = path.read_text()
        if any(isinstance(event, AliasEvent) for event in YAML(typ="safe", pure=True).parse(text)):
            raise YAMLError("YAML aliases such as `*name` are not supported; write the value out")
        values = YAML(typ="safe", pure=True).load(text)
        as_json = json.dumps(values, default=str)
    except (YAMLError, OSError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    _refuse_credentials(path, values)
    try:
        params: Params = TypeAdapter(Params).validate_json(as_json)
    except ValidationError as error:
        raise InputError("\n".join(f"{path}: {_explain(fault)}" for fault in error.errors())) from error
    params = _with_problems(params)
    _check_losses(path, params, values["losses"])
    if not params.evaluate.judges and "win_rate" in params.compare.select:
        raise InputError(
            f"{path}: compare.select: {params.compare.select} needs a judge; add one to evaluate.judges, or "
            "select reward_accuracy or margin"
        )
    _check_continued_adapter(path, params)
    _check_demonstrations(path, params)
    _check_feedback(path, params)
    _check_functions(path, params)
    _check_frozen_weights(path, params)
    _check_bf16_weights(path, params)
    for key, name in (("model.base", params.model.base), ("data.source", params.data.source)):
        if name == "embedded":
            raise InputError(f"{path}: {key}: the value embedded is renamed; use default")
    longest = params.evaluate.max_new_tokens
    if longest != "auto" and longest >= params.engine.max_length:
        raise InputError(
            f"{path}: evaluate.max_new_tokens: {longest} leaves no room for a prompt in "
            f"engine.max_length, {params.engine.max_length}; lower the former or raise the latter"
        )
    return params


def _check_losses(path: Path, params: Params, listed: Collection[str]) -> None:
    """Raise InputError if the sweep has no loss, one without settings, or one in the wrong list."""
    lists = {"losses": params.sweep.losses, "reference_free_losses": params.sweep.reference_free_losses}
    if not any(lists.values()):
        raise InputError(
            f"{path}: sweep.losses: the sweep has no loss; name one here, or one that needs no reference "
            "log-probs in sweep.reference_free_losses"
        )
    for key, other, need in (
        ("losses", "reference_free_losses", "needs no reference log-probs"),
        ("reference_free_losses", "losses", "needs reference log-probs"),
    ):
        for name in lists[key]:
            if name not in listed:
                raise InputError(
                    f"{path}: losses.{name}: missing, but sweep.{key} uses it, and DVC tracks its settings; add "
                    f"`{name}: {{}}` to losses, or run `dvc exp run -S '+losses.{name}={{}}'`"
                )
            if ("reference" in params.losses[name].needs) != (key == "losses"):
                raise InputError(f"{path}: sweep.{key}: {name} {need}; move it to sweep.{other}")


def _with_problems(params: Params) -> Params:
    """Return the settings with the problems of reasoning-gym, if the data has them, in its verifiers."""
    problems = reasoning_problems(params.data, params.seed)
    if problems is None:
        return params

    def complete(judge: Any) -> Any:
        own = isinstance(judge, VerifierSettings) and judge.answers is None and judge.problems is None
        return replace(judge, problems=problems) if own else judge

    judges = tuple(map(complete, params.evaluate.judges))
    evaluate = replace(params.evaluate, judges=judges)
    return replace(params, evaluate=evaluate, feedback=complete(params.feedback))


def _check_feedback(path: Path, params: Params) -> None:
    """Raise InputError if rounds have no judge or too few prompts, or if the judge that trains also evaluates."""
    feedback, prompts = params.feedback, params.online.prompts
    for key, rounds in (("sweep.rounds", params.sweep.rounds), ("sweep.rloo", params.sweep.rloo)):
        if not rounds:
            continue
        if feedback is None:
            raise InputError(
                f"{path}: feedback: null, but {key} needs a judge that ranks responses; set it to a judge as "
                f"in evaluate.judges, or set {key}: []"
            )
        if prompts is not None and prompts < max(rounds):
            raise InputError(
                f"{path}: online.prompts: {prompts} leaves a round without a prompt, because {key} has "
                f"{max(rounds)}; raise the former or lower the latter"
            )
        if params.dpo.early_stop is not None:
            raise InputError(f"{path}: dpo.early_stop: not supported with {key}; set one of them to null or []")
    if feedback is None or not params.sweep.rounds + params.sweep.rloo:
        return
    for loss in (trial.loss for trial in params.trials() if trial.method == "online"):
        if missing := loss.needs & {"labels", "agreement"}:
            raise InputError(
                f"{path}: sweep.rounds: {loss.name} needs {' and '.join(sorted(missing))}, which pairs of ranked "
                "responses do not have; use another loss or setting, or set sweep.rounds: []"
            )
    if isinstance(feedback, RewardModelSettings) and feedback.model.startswith(TRAINED_REWARD_MODELS):
        seeds = params.sweep.reward_models
        if feedback.model != TRAINED_REWARD_MODELS:
            raise InputError(
                f"{path}: feedback.model: {feedback.model}: {TRAINED_REWARD_MODELS}/ belongs to the stage "
                "reward_model; write `feedback: reward_model`, or copy the model to models/own/"
            )
        if len(seeds) != 1 and not set(params.sweep.seeds) <= set(seeds):
            raise InputError(
                f"{path}: feedback: reward_model, but sweep.reward_models is {list(seeds)}; list one seed, or "
                "every seed of sweep.seeds"
            )
    if feedback.kind in PROXIES and _judging(feedback) in map(_judging, params.evaluate.judges):
        raise InputError(
            f"{path}: feedback: {feedback.name} is also in evaluate.judges; a policy exploits the faults of the "
            "judge that trains it, so that judge cannot measure the gain. Evaluate with another judge"
        )


def _check_functions(path: Path, params: Params) -> None:
    """Raise InputError if the function of a loss or a judge cannot be called, or DVC does not track its code."""
    for loss in {trial.loss for trial in params.trials() if isinstance(trial.loss, Custom)}:
        functions.LOSS.check(loss.function, f"{path}: losses.custom.function")
    judges = {f"evaluate.judges.{number}": judge for number, judge in enumerate(params.evaluate.judges)}
    for key, judge in (judges | {"feedback": params.feedback}).items():
        if isinstance(judge, ScorerSettings):
            functions.JUDGE.check(judge.function, f"{path}: {key}.function")


def _judging(judge: JudgeSettings) -> tuple[str, str]:
    """Return kind and function or model of a judge."""
    source = getattr(judge, "function", None) or getattr(judge, "model", "")
    return judge.kind, str(source).rstrip("/")


def _check_continued_adapter(path: Path, params: Params) -> None:
    """Raise InputError if another setting would replace the adapter that is trained further."""
    if params.model.adapter != "continue":
        return
    for key, value, reason in (
        ("sft", params.sft, "the reference is the base model with the adapter as loaded"),
        ("dpo.lora", params.dpo.lora, "rank and alpha are those of the adapter"),
    ):
        if value is not None:
            raise InputError(f"{path}: {key}: must be null with model.adapter: continue; {reason}")


def _check_demonstrations(path: Path, params: Params) -> None:
    """Raise InputError if a setting about demonstrations has no effect."""
    sft = params.sft
    if sft is None:
        return
    if sft.source is None:
        names = ("revision", "split", "config", "columns", "roles")
        for name in (name for name in names if getattr(sft, name)):
            raise InputError(f"{path}: sft.{name} has no effect without sft.source; set sft.source, or remove it")
    elif sft.source == "default":
        raise InputError(f"{path}: sft.source: default has no demonstrations; name files, or set it to null")
    elif sft.source == "arithmetic":
        raise InputError(
            f"{path}: sft.source: arithmetic: its demonstrations are the chosen completions of data.source: "
            "arithmetic; set sft.source to null and sft.completions to chosen"
        )
    elif sft.completions == "chosen":
        raise InputError(f"{path}: sft.completions: chosen has no effect with sft.source; set it to both")


def _check_frozen_weights(path: Path, params: Params) -> None:
    """Raise InputError if settings for weights that are not trained meet a training of all weights."""
    engine = params.engine
    if engine.vocabulary == "bf16" and engine.precision != "bf16":
        raise InputError(f"{path}: engine.vocabulary: bf16 needs engine.precision: bf16; set one of them")
    for key, value in (("quantization", engine.quantization), ("vocabulary", engine.vocabulary)):
        if value not in (None, "fp32") and not params.trains_adapter:
            raise InputError(
                f"{path}: engine.{key}: {value}: these weights cannot be trained; set dpo.lora, as "
                f"{{rank: 16, alpha: 32}}, or remove engine.{key}"
            )


def _check_bf16_weights(path: Path, params: Params) -> None:
    """Raise InputError if trained weights cannot be in bf16 with the other settings."""
    adapter = params.model.adapter == "continue"
    for section, training in (("sft", params.sft), ("dpo", params.dpo)):
        if training is None or training.weights == "fp32":
            continue
        key = f"{path}: {section}.weights: bf16"
        if training.lora is not None or adapter:
            raise InputError(f"{key} has no effect with an adapter, whose weights are fp32; set it to fp32")
        if training.optimizer != "adamw":
            raise InputError(f"{key} needs the optimizer adamw; set {section}.optimizer to adamw, or it to fp32")
        if params.engine.precision != "bf16":
            raise InputError(f"{key} needs engine.precision: bf16; set one of them")


def _refuse_credentials(path: Path, value: object, key: str = "") -> None:
    """Raise InputError if a value holds credentials: settings are stored in git, MLflow and every checkpoint."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_credentials(path, inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            _refuse_credentials(path, inner, key)
    elif isinstance(value, str) and re.search(r"//[^/\s]*@", value):
        raise InputError(
            f"{path}: {key}: the address contains a user or a password; remove them and set them in the "
            "environment, as OPENAI_API_KEY, SAMPLER_API_KEY or HF_TOKEN"
        )


def _explain(fault: ErrorDetails) -> str:
    """Return key, problem and fix of one of pydantic's errors."""
    parts = [str(part) for part in fault["loc"]]
    key = ".".join(part for part in parts if not part.startswith("<")) or "top level"  # <list> is a kind of value
    kind, message, value = fault["type"], fault["msg"], fault["input"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: {FORMER_KEYS.get(key, 'unknown key; remove it or correct its name')}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key}: missing; add it"
    return f"{key}: {message[0].lower()}{message[1:]}, got {value!r}"
