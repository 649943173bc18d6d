"""The base model: embedded, from a local folder, or from a hub."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo.config import ModelParams
from dpo.embedded import load_embedded_model
from dpo.errors import InputError

OWN_MODELS = Path("models/own")


def load_base(params: ModelParams) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `params.base` names, in fp32, with its tokenizer.

    Raises:
        InputError: the folder or hub model is not there or cannot be read, a hub id has no revision or something
            else has one, or a folder lies where DVC does not watch it.
    """
    if params.revision is not None and (params.base == "embedded" or Path(params.base).is_dir()):
        raise InputError("params.yaml: model.revision has no effect: model.base is no hub id; set it to null")
    if params.base == "embedded":
        return load_embedded_model()
    folder = Path(params.base)
    if folder.is_dir():
        if OWN_MODELS.resolve() not in folder.absolute().parents:
            raise InputError(
                f"params.yaml: model.base: {folder} is outside {OWN_MODELS}/, the folder that DVC watches; "
                f"copy the model there and name it as {OWN_MODELS / folder.name}"
            )
    elif params.revision is None:
        raise InputError(
            f"params.yaml: model.base: '{params.base}' is neither `embedded` nor a folder, so it is taken for a "
            "hub id, which needs model.revision: without one nobody can reproduce the run"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(params.base, revision=params.revision or "main")
        model = AutoModelForCausalLM.from_pretrained(
            params.base, revision=params.revision or "main", dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"params.yaml: model.base: cannot load '{params.base}': {error}") from error
    return model.eval(), tokenizer
