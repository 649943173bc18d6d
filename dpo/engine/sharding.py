"""Weights that are sharded over the processes of a launch (FSDP2), so that no process holds a whole model.

A model is created without weights. Each process reads only its shard of every weight from the safetensors files.
A pass gathers the weights of one layer at a time, so all processes run the same passes at the same time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, init_empty_weights
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from dpo.common.distributed import this_process
from dpo.common.errors import InputError
from dpo.common.files import write_json
from dpo.engine.packing import pack
from dpo.engine.pretrained import (
    ADAPTER_CONFIG,
    adapter_base,
    has_adapter,
    load_adapter,
    load_causal_lm,
    load_config,
)
from dpo.engine.tokenization import TokenRow

if TYPE_CHECKING:
    from dpo.engine.logprobs import LogProbModel

FILE_BYTES = 5 * 10**9
"""Maximum size of a saved file with weights. A larger weight has a file of its own."""

log = logging.getLogger(__name__)


def empty_model(folder: Path) -> PreTrainedModel:
    """Create the fp32 model of a folder like `load_causal_lm`, but without its weights. An adapter is loaded.

    Raises:
        InputError: the configuration or the adapter is missing, unreadable, or do not fit each other.
    """
    config = load_config(folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    settings = _files(folder) / "generation_config.json"
    if settings.is_file():
        model.generation_config = GenerationConfig.from_dict(json.loads(settings.read_text()))
    if (folder / ADAPTER_CONFIG).is_file():
        load_adapter(model, folder)
        model.requires_grad_(False)
    return model


def read_shards(model: PreTrainedModel, folder: Path) -> None:
    """Shard a model of `empty_model`, which may have got an adapter, and read its weights, in place.

    Weights are cast to their data type in the model. If a weight has another name in the files, the main process
    loads the whole model and sends each process its shards.

    Raises:
        InputError: the launch configuration or the architecture is not supported.
    """
    state, plugin = this_process(), FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2 or not hasattr(FSDPModule, "reset_iter_state"):
        raise InputError(
            "run.launch: sharded weights need fsdp_version: 2 in the fsdp_config of this file, and torch 2.13 or "
            f"later (installed: {torch.__version__})"
        )
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    apply_fsdp(model, mesh, plugin.reshard_after_forward, plugin.cpu_offload)
    on_host = type(plugin.cpu_offload) is not OffloadPolicy
    weights = _allocate(model, torch.device("cpu") if on_host else state.device)
    reader = HuggingFaceStorageReader(str(_files(folder)))
    known = reader.read_metadata().state_dict_metadata
    found = {names: next((name for name in names if name in known), None) for names in weights}
    unknown = [names[0] for names, name in found.items() if name is None]
    if not unknown:
        values: dict[str, Any] = {name: weights[names] for names, name in found.items() if name}
        values |= {name: buffer for name, buffer in model.named_buffers() if name in known}
        load(values, storage_reader=reader, no_dist=True)
        return
    log.warning(
        "%s: %d weights, such as %s, have another name in its files; the main process loads the whole model",
        *(folder, len(unknown), unknown[0]),
    )
    _send(weights, folder, mesh)


def apply_fsdp(model: PreTrainedModel, mesh: DeviceMesh, reshard: bool, offload: OffloadPolicy) -> None:
    """Apply FSDP2 to a causal language model: a unit per layer, the embedding, and the last norm with the head.

    The decoder is the root, because the engine calls it and uses the weights of the head directly. The head stays
    gathered after a pass. It shares its unit with the embedding if they share a matrix.

    Raises:
        InputError: the decoder has no last norm, or the model has weights outside of decoder and head.
    """
    options: dict[str, Any] = {"mesh": mesh, "offload_policy": offload}
    decoder, table, head = model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()
    for layer in list(decoder.modules()):
        if type(layer).__name__ in (model._no_split_modules or ()):
            fully_shard(layer, reshard_after_forward=reshard, **options)
    norms = [module for module in decoder.children() if "norm" in type(module).__name__.lower()]
    if not norms:
        raise InputError(f"run.launch: {type(model).__name__} cannot be sharded: it has no norm before its head")
    if table.weight is head.weight:
        fully_shard([table, norms[-1], head], reshard_after_forward=False, **options)
    else:
        fully_shard(table, reshard_after_forward=reshard, **options)
        fully_shard([norms[-1], head], reshard_after_forward=False, **options)
    fully_shard(decoder, **options)
    outside = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if outside:
        name = type(model).__name__
        raise InputError(f"run.launch: {name} cannot be sharded: {outside[0]} is not in its decoder")


def release(model: PreTrainedModel) -> None:
    """Free the gathered weights of a sharded model after a pass without gradients."""
    model.get_decoder().reset_iter_state()


@torch.no_grad()
def save_weights(model: PreTrainedModel, folder: Path | None, *, sharded: bool) -> None:
    """Save the configuration and the weights of a model to a folder, with an adapter only those of the adapter.

    All processes of a launch call this. Only the main process has a `folder`. It gathers sharded weights one by
    one and holds those of one file, except adapters and weights that have another name in files, such as experts.
    """
    if not sharded:
        if folder:
            model.save_pretrained(folder, max_shard_size=FILE_BYTES)
        return
    adapter = has_adapter(model)
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # tied weights only once
    shards: dict[str, Any] = get_model_state_dict(model)
    weights: dict[str, Tensor] = {name: value for name, value in shards.items() if name in names}
    shapes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in weights.items()}
    in_files: dict[str, Tensor] = {} if adapter else revert_weight_conversion(model, shapes)
    if in_files.keys() != weights.keys():
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
        whole = get_model_state_dict(model, options=options)
        if folder:
            state = {name: value for name, value in whole.items() if name in names}
            model.save_pretrained(folder, state_dict=state, max_shard_size=FILE_BYTES)
        return
    if folder:
        model.save_pretrained(folder, state_dict={})  # the configuration
    in_order = {name: in_files[name] for name in sorted(in_files, key=dot_natural_key)}  # as in save_pretrained
    pattern = "model{suffix}.safetensors"
    parts = split_torch_state_dict_into_shards(in_order, filename_pattern=pattern, max_shard_size=FILE_BYTES)
    for file, own in parts.filename_to_tensors.items():
        _save_gathered({name: weights[name] for name in own}, folder and folder / file)
    if folder and parts.is_sharded:
        facts = {"total_parameters": model.num_parameters(), **parts.metadata}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": facts, "weight_map": parts.tensor_to_filename})


def _save_gathered(weights: dict[str, Tensor], path: Path | None) -> None:
    """Gather weights one by one, and write them to a file in the process that has its `path`."""
    whole: dict[str, Tensor] = {}
    for name, weight in weights.items():
        value = _gathered(weight)
        if path:
            whole[name] = value.cpu().contiguous()
    if path:
        save_file(whole, path, {"format": "pt"})


def _gathered(weight: Tensor) -> Tensor:
    """Return a weight with the shards of all processes, which must all call this."""
    if not isinstance(weight, DTensor):
        return weight
    moved: Any = weight.to(weight.device_mesh.device_type)  # from the host, if FSDP offloads weights
    whole: Tensor = moved.full_tensor()
    return whole


@contextmanager
def together(*models: LogProbModel) -> Iterator[None]:
    """Let the processes run different numbers of passes of their sharded models inside the block.

    A process that has left the block takes part in the passes of the others, because a pass gathers weights from
    all processes. Models must be the same, in the same order, on all processes. If they are not sharded, nothing
    happens.
    """
    sharded = [model for model in models if model.sharded]
    if not sharded:
        yield
        return

    def announce(number: int) -> int:
        """Return the largest number that a process announces: the model of the next pass, or 0."""
        value = torch.tensor(number, device=this_process().device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    with ExitStack() as hooks:
        for number, model in enumerate(sharded, 1):

            def before_pass(*_: object, number: int = number) -> None:
                announce(number)

            handle = model.model.get_decoder().register_forward_pre_hook(before_pass, prepend=True)
            hooks.callback(handle.remove)
        yield
    placeholder = pack([TokenRow("", (0,), ((0,),))])
    with torch.no_grad():
        while number := announce(0):
            model = sharded[number - 1]
            model(placeholder.to(model.device))
    for model in sharded:
        release(model.model)


def _files(folder: Path) -> Path:
    """Return the folder with the weights of a model folder, or of the base model of an adapter."""
    if (folder / "config.json").is_file():
        return folder
    base, revision = adapter_base(folder)
    if isinstance(base, Path):
        return base
    return Path(snapshot_download(base, revision=revision, allow_patterns=["*.json", "*.safetensors"]))


def _allocate(model: PreTrainedModel, device: torch.device) -> dict[tuple[str, ...], DTensor]:
    """Replace weights without data by uninitialised shards. Return these by all names of the weight in files."""
    made: dict[Tensor, nn.Parameter] = {}
    names: dict[Tensor, list[str]] = {}
    for path, module in model.named_modules():
        for name, weight in list(module._parameters.items()):
            if not isinstance(weight, DTensor) or not weight.to_local().is_meta:
                continue
            if weight not in made:
                local = torch.empty_like(weight.to_local(), device=device)
                shard = DTensor.from_local(
                    local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape,
                    stride=weight.stride(),
                )  # fmt: skip
                made[weight], names[weight] = nn.Parameter(shard, weight.requires_grad), []
            names[weight].append(_in_files(f"{path}.{name}"))
            module._parameters[name] = made[weight]
    return {tuple(names[weight]): shard.data for weight, shard in made.items()}  # type: ignore[misc]


def _send(weights: dict[tuple[str, ...], DTensor], folder: Path, mesh: DeviceMesh) -> None:
    """Load a model in the main process and send every process its shards of `weights`."""
    full: dict[str, Tensor] = {}
    if this_process().is_main_process:
        model = load_causal_lm(folder)
        full = {_in_files(name): weight.data for name, weight in model.named_parameters()}
    for names, shard in weights.items():
        whole = torch.empty(shard.shape, dtype=shard.dtype)
        if this_process().is_main_process:
            whole = next(full[name] for name in names if name in full).to(shard.dtype)
        sent = distribute_tensor(whole.to(mesh.device_type), mesh, shard.placements)
        shard.to_local().copy_(sent.to_local())


def _in_files(name: str) -> str:
    """Return the name of a weight in its files: without the wrappers of peft, which are nested for experts."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
