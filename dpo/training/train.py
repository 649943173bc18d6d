"""Supervised fine-tuning and preference training of a model in memory, and saving the result."""

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from transformers import PreTrainedModel

from dpo.common.distributed import share, this_process
from dpo.common.errors import InputError
from dpo.common.files import PROVENANCE, atomic_write, link_tree, sha256, write_json
from dpo.engine.base_model import load_checkpoint
from dpo.engine.experts import adapted_by_default, expert_weights, log_layers_left_out
from dpo.engine.frozen import is_quantised, round_linear_layers
from dpo.engine.logprobs import LogProbModel, packed_batches
from dpo.engine.pretrained import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapters_in_fp32,
    has_adapter,
    load_tokenizer,
    read_adapter_config,
    weights_digest,
)
from dpo.engine.reference_cache import ReferenceLogps
from dpo.engine.sharding import save_weights, together
from dpo.engine.token_table import TokenTable
from dpo.engine.tokenization import TokenRow
from dpo.training.callbacks import Callback, DivergenceAlarm
from dpo.training.checkpoints import CheckpointStore, training_key
from dpo.training.loop import Segment, TrainingLoop
from dpo.training.losses import check_agreement, check_rows
from dpo.training.objectives import (
    Answers,
    DpoObjective,
    Objective,
    RlooObjective,
    SftObjective,
    Weights,
    cached_reference,
)
from dpo.training.sampler import StepSampler
from dpo.training.settings import DpoSettings, LoraSettings, SftSettings, Trial


def add_lora(model: PreTrainedModel, params: LoraSettings) -> None:
    """Freeze the weights of a model and add trainable low-rank updates in fp32, in place.

    Raises:
        InputError: a name in `params.target_modules` is not that of a linear layer, or is the vocabulary.
    """
    from peft import LoraConfig

    modules = params.target_modules if isinstance(params.target_modules, str) else list(params.target_modules)
    matrices = None
    if modules == "all-linear" and expert_weights(model):  # peft would adapt the routers too
        modules, matrices = adapted_by_default(model)
    config = LoraConfig(
        r=params.rank, lora_alpha=params.alpha, target_modules=modules, target_parameters=matrices,
        task_type="CAUSAL_LM", base_model_name_or_path=model.name_or_path, use_rslora=params.rslora,
        use_dora=params.dora,
    )  # fmt: skip
    vocabulary = [model.get_input_embeddings(), model.get_output_embeddings()]
    fix = "name linear layers of the model, as [q_proj, v_proj], or set all-linear"
    try:
        with adapters_in_fp32(model):
            model.add_adapter(config)
    except ValueError as error:
        raise InputError(f"params.yaml: lora.target_modules: {error}; {fix}") from error
    if [model.get_input_embeddings(), model.get_output_embeddings()] != vocabulary:  # they are replaced
        raise InputError(f"params.yaml: lora.target_modules: the vocabulary cannot have an adapter; {fix}")
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if matrices:
        log_layers_left_out(model)
    _sort_targets(config)


def _sort_targets(config: Any) -> None:
    """Sort the names of the adapted layers, because the order of a set varies."""
    config.target_modules = sorted(config.target_modules or ())
    config.target_parameters = sorted(config.target_parameters or ()) or None


def start_lora(model: LogProbModel, params: LoraSettings, seed: int) -> None:
    """Add adapters to a model, in place. They start from random weights and change no log-prob.

    Raises:
        InputError: DoRA, which needs the norms of whole weights, is set for a model whose weights are sharded.
    """
    if params.dora and model.is_empty:
        raise InputError("params.yaml: lora.dora does not work with sharded weights (FSDP); set it to false")
    set_seed(seed)
    if params.dora and not is_quantised(model.model):
        model.model.requires_grad_(False)
        model.hold_frozen_weights()
        for weight in model.parameters():  # peft computes norms in fp32, from the rounded weights
            weight.data = weight.data.float()
    add_lora(model.model, params)


def continue_lora(model: PreTrainedModel) -> None:
    """Freeze a model and make the adapter that it was loaded with trainable, in place."""
    model.requires_grad_(False)
    model.set_adapter(ADAPTER)
    _sort_targets(model.peft_config[ADAPTER])


def train_sft(
    model: LogProbModel,
    rows: Sequence[TokenRow],
    params: SftSettings,
    *,
    max_tokens_per_microbatch: int,
    seed: int,
    store: CheckpointStore | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, float]]:
    """Fine-tune `model` in place on the completions of `rows`, and return one log entry per step.

    The loss is the mean over the completion tokens of each step, without prompts. See `train_dpo` for the rest.
    """
    if params.lora is not None:
        start_lora(model, params.lora, seed)
    _prepare(model, params)
    return _train(
        model, TokenTable.of(rows), SftObjective(), params, params.learning_rate, seed,
        max_tokens_per_microbatch, store, callbacks, key={},
    )  # fmt: skip


def train_dpo(
    model: LogProbModel,
    rows: Sequence[TokenRow],
    reference: Mapping[str, tuple[float, float]],
    params: DpoSettings,
    trial: Trial,
    *,
    max_tokens_per_microbatch: int,
    weights: Weights | None = None,
    agreement: Weights | None = None,
    store: CheckpointStore | None = None,
    callbacks: Sequence[Callback] = (),
    segment: Segment | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place on preference pairs, and return one log entry per step.

    Under `torch.distributed` all processes call this with the same arguments and share the work of each step.
    `reference` has the (chosen, rejected) reference log-probs of every row id. If the model has an adapter, it is
    trained further. If `params.lora` is set, the model gets a new one. `weights` multiply the losses of rows by
    their id, `agreement` is the probability that a person prefers chosen; both are 1 for other rows. If training
    with a `store` is interrupted, the next call resumes from its last checkpoint and reaches the same weights and
    log, on a CPU bit for bit. With a `segment`, the call has the steps of one part of a longer training, and
    passes over the rows as often as these steps need, in place of `params.epochs`.

    Raises:
        KeyError: a row has no reference log-probs.
        InputError: the optimizer is not available, the memory is too small, or early stopping leaves no rows,
            the loss needs other agreements, or it needs labelled rows, or pairs, and the rows are not.
        FloatingPointError: loss or gradient is not finite, and `params.non_finite` is `stop`.
        Stopped: SIGTERM was received. A checkpoint has been written.
    """
    needs, tokens, table, logps = trial.loss.needs, None, TokenTable.of(rows), ReferenceLogps.of(reference)
    labels = table.labels
    check_rows([trial.loss], labelled=bool(labels))
    compared = table.ids if "reference" in needs else []
    check_agreement([trial.loss], agreement or {})
    _start_adapter(model, params, trial.seed)
    _prepare(model, params)
    if "reference_token_logps" in needs:
        tokens = _token_logps(model, table, max_tokens_per_microbatch)
    objective = DpoObjective(
        trial.loss, trial.beta, cached_reference(logps, compared), weights=weights, agreement=agreement,
        labels=labels, reference_tokens=tokens,
    )  # fmt: skip
    key: dict[str, object] = {"trial": trial.settings, "reference": logps.digest if compared else None}
    key["source"] = trial.loss.source
    key |= {"pair_weights": weights or {}, "agreement": agreement if "agreement" in needs else {}}
    return _train(
        model, table, objective, params, trial.learning_rate, trial.seed, max_tokens_per_microbatch, store,
        [DivergenceAlarm(), *callbacks], key=key, segment=segment,
    )  # fmt: skip


def train_rloo(
    model: LogProbModel,
    rows: Sequence[TokenRow],
    answers: Mapping[str, Answers],
    params: DpoSettings,
    trial: Trial,
    *,
    clip: float,
    max_tokens_per_microbatch: int,
    store: CheckpointStore | None = None,
    callbacks: Sequence[Callback] = (),
    segment: Segment | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place on sampled answers by their advantages, and return one log entry per step.

    `answers` has the values of each row by its id. A step has the answers to `params.pairs_per_step` prompts. See
    `train_dpo` for the rest.
    """
    key = {"trial": trial.settings, "answers": {row.id: answers[row.id] for row in rows}, "clip": clip}
    _start_adapter(model, params, trial.seed)
    _prepare(model, params)
    return _train(
        model, TokenTable.of(rows), RlooObjective(answers, clip), params, trial.learning_rate, trial.seed,
        max_tokens_per_microbatch, store, [DivergenceAlarm(), *callbacks], key=key, segment=segment,
    )  # fmt: skip


def _start_adapter(model: LogProbModel, params: DpoSettings, seed: int) -> None:
    """Continue the adapter of a model, or add a new one if `params` has settings of it."""
    if has_adapter(model.model):
        continue_lora(model.model)
    elif params.lora is not None:
        start_lora(model, params.lora, seed)


def _prepare(model: LogProbModel, params: SftSettings | DpoSettings) -> None:
    """Set the data types of a model that has its adapters, and shard it if the launch configuration says so.

    Raises:
        InputError: bf16 weights are set for a model whose weights are sharded.
    """
    if params.weights == "bf16":
        if model.is_empty:
            raise InputError(
                "params.yaml: weights: bf16 does not work with sharded weights (FSDP), which have one data type; "
                "set it to fp32"
            )
        round_linear_layers(model.model, trained=True)
    model.hold_frozen_weights()
    if params.gradient_checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.shard()


@torch.no_grad()
def _token_logps(
    model: LogProbModel, rows: Sequence[TokenRow], max_tokens_per_microbatch: int
) -> dict[str, torch.Tensor]:
    """Return the log-probs of each row's completion tokens, by id. Processes divide the rows among themselves."""
    device = model.device
    if not model.sharded:
        model.to(this_process().device)

    def compute(mine: list[int]) -> list[torch.Tensor]:
        own = [rows[i] for i in mine]
        batches = packed_batches(own, max_tokens_per_microbatch, model.device)
        logps = torch.cat([model(batch, per_token=True).cpu() for batch in batches])
        return list(logps.split([row.completion_tokens for row in own]))

    table = share(len(rows), compute, together(model))
    if not model.sharded:
        model.to(device)
    return {row.id: logps for row, logps in zip(rows, table, strict=True)}


def _train(
    model: LogProbModel,
    rows: TokenTable,
    objective: Objective,
    params: SftSettings | DpoSettings,
    learning_rate: float,
    seed: int,
    max_tokens_per_microbatch: int,
    store: CheckpointStore | None,
    callbacks: Sequence[Callback],
    key: Mapping[str, object],
    segment: Segment | None = None,
) -> list[dict[str, float]]:
    set_seed(seed)
    key = {**key, "params": params, "learning_rate": learning_rate, "seed": seed, "precision": model.precision}
    key["max_tokens_per_microbatch"] = max_tokens_per_microbatch
    epochs = params.epochs
    if segment:
        epochs = -(-segment.steps // -(-len(rows) // params.pairs_per_step))
        state_before = sha256(segment.before) if segment.before else None
        key["segment"] = [segment.start, segment.steps, segment.total, state_before]
    validation = rows.select([])
    early_stop = params.early_stop if isinstance(params, DpoSettings) else None
    if early_stop is not None:
        rows, validation = _hold_out(rows, early_stop.validation_share)
    state = this_process()
    sampler = StepSampler(
        rows.tokens, rows_per_step=params.pairs_per_step, epochs=epochs, seed=seed,
        max_tokens_per_microbatch=max_tokens_per_microbatch, processes=state.num_processes,
        process=state.process_index,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        store = store or CheckpointStore(Path(scratch), math.inf)
        folders = [store.folder(_key(model, rows, key)) if state.is_main_process else None]
        (folder,) = broadcast_object_list(folders)
        history = TrainingLoop(
            model, objective, rows, sampler, params, learning_rate, folder, checkpoint_minutes=store.minutes,
            early_stop_settings=early_stop, validation=validation, callbacks=callbacks,
            segment=segment,
        ).run()  # fmt: skip
    model.eval()
    return history


def _key(model: LogProbModel, rows: TokenTable, settings: Mapping[str, object]) -> str:
    """Return the key of a training that starts from the files that a model was loaded from."""
    assert model.folder is not None
    settings = {**settings, "quantised": is_quantised(model.model), "vocabulary": model.vocabulary}
    return training_key(weights_digest(model.folder), rows, settings)


def _hold_out(rows: TokenTable, share: float) -> tuple[TokenTable, TokenTable]:
    """Split rows into training and validation rows by a hash of the prompt, so that both share no prompt."""
    sides: tuple[list[int], list[int]] = ([], [])
    for place, row in enumerate(rows):
        digest = hashlib.sha256(repr(tuple(map(int, row.prompt))).encode()).digest()
        sides[int.from_bytes(digest[:4]) < share * 2**32].append(place)
    if not all(sides):
        raise InputError(
            f"params.yaml: dpo.early_stop.validation_share {share} of {len(rows)} pairs leaves no pairs to "
            f"{'validate' if sides[0] else 'train'} on; change it or add more prompts"
        )
    return rows.select(sides[0]), rows.select(sides[1])


def save_checkpoint(
    policy: LogProbModel,
    tokenizer: Any,
    folder: Path,
    facts: Mapping[str, object],
    base: tuple[str, str] | None = None,
) -> None:
    """Write weights as safetensors (with LoRA, only the adapter) and the tokenizer to `folder`, atomically.

    Under `torch.distributed` all processes call this, and the main process writes the files.
    `facts` about the origin of the checkpoint go into its `provenance.json`, with the SHA-256 of the weights and,
    for an adapter, the folder of its base model. If that model is on the hub, `base` is its id and revision;
    `adapter_config.json` then names it, so that other libraries load the adapter from any folder.
    """
    model = policy.model
    if this_process().is_main_process:
        if has_adapter(model):
            facts = {**facts, "adapter_of": model.name_or_path}
        with atomic_write(folder) as tmp:
            save_weights(model, tmp, sharded=policy.sharded)
            if has_adapter(model) and base:
                _name_base(tmp, base)
            _finish(tmp, tokenizer, facts)
    else:
        save_weights(model, None, sharded=policy.sharded)
    this_process().wait_for_everyone()


def copy_checkpoint(
    source: Path, folder: Path, facts: Mapping[str, object], base: tuple[str, str] | None = None
) -> None:
    """Write a checkpoint of `save_checkpoint` to `folder`, atomically, and add `facts` to its provenance.

    `base` is that of `save_checkpoint`. Files are hard links if the file system has them.
    """
    with atomic_write(folder) as tmp:
        link_tree(source, tmp)
        if base and (tmp / ADAPTER_CONFIG).is_file():
            _name_base(tmp, base)
        write_json(tmp / PROVENANCE, json.loads((tmp / PROVENANCE).read_text()) | {**facts})


def save_merged(adapter: Path, folder: Path, facts: Mapping[str, object]) -> None:
    """Merge the adapter of a checkpoint into its base model in fp32, and write the result to `folder`, atomically.

    `facts` go into its `provenance.json`, with the SHA-256 of the weights.
    """
    with atomic_write(folder) as tmp:
        load_checkpoint(adapter).save_pretrained(tmp)
        _finish(tmp, load_tokenizer(adapter), facts)


def _name_base(folder: Path, base: tuple[str, str]) -> None:
    """Write the hub id and the revision of the base model into the configuration of an adapter."""
    named = dict(zip(("base_model_name_or_path", "revision"), base, strict=True))
    write_json(folder / ADAPTER_CONFIG, read_adapter_config(folder) | named)


def _finish(folder: Path, tokenizer: Any, facts: Mapping[str, object]) -> None:
    """Add tokenizer and provenance to a checkpoint."""
    tokenizer.save_pretrained(folder)
    write_json(folder / PROVENANCE, {**facts, "weights": sha256(*sorted(folder.glob("*.safetensors")))})
