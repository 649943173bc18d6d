"""Settings of the model and of the log-prob engine."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from dpo.common.settings import Positive, Settings

Precision = Literal["fp32", "bf16"]
Quantization = Literal["nf4"] | None

HEAD_CHUNK, GPU_HEAD_CHUNK = 256, 1024
"""Positions per projection to the vocabulary: 50 MB of fp32 logits for a vocabulary of 49,152. GPUs use larger
chunks, 0.5 GB for a vocabulary of 128,256: every chunk reads and writes the gradient of the weight matrix."""

VOCABULARY_PART = 16_384
"""Rows of a bf16 vocabulary that are cast to fp32 at a time: 0.25 GiB for a width of 4,096."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The model to align."""

    base: str
    """`default` (SmolLM2-135M-Instruct), a folder under `models/own/`, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id. Required for a hub id."""
    template_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Variables of the chat template, as `{enable_thinking: false}`. They become part of the saved template."""
    adapter: Literal["merge", "continue"] | None = None
    """Required if `base` is a LoRA adapter. `merge` merges it into its base model. `continue` trains it further;
    the reference is the base model with the adapter as loaded."""
    adapter_base_revision: str | None = None
    """Commit, tag or branch of the adapter's base model, if that is a hub id without a revision in
    `adapter_config.json`."""
    system_in_user_turn: bool = False
    """Move a system text into the first user turn, for chat templates that refuse system turns."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None
    """The day that a chat template writes, if it writes today's date, as 2026-11-26."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """How text becomes log-probs. Every stage that runs the model uses these settings."""

    max_length: Positive
    """Maximum tokens of a prompt with one completion. Prompts are cut from the left, completions never."""
    max_tokens_per_microbatch: Positive
    """Maximum number of tokens in one forward pass. It bounds memory and does not change results."""
    precision: Precision = "fp32"
    """`fp32` is exact. `bf16` multiplies the matrices of the layers in bfloat16, and holds those that are not
    trained in bfloat16. The projection to the vocabulary stays fp32; a GPU computes it in TF32."""
    compile: bool = False
    """Fuse the operations between matrix products with `torch.compile`. Needs a CUDA GPU and `bf16`."""
    quantization: Quantization = None
    """`nf4` holds the matrices of the layers in 4 bits (Dettmers et al. 2023, "QLoRA"), in the reference and in
    the policy. Training needs `dpo.lora`."""
    vocabulary: Precision = "fp32"
    """Data type of the embedding and of the projection to the vocabulary. `bf16` halves their memory; weights are
    cast to fp32 in parts for each product. Needs `precision: bf16` and `dpo.lora`."""

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of `dpo.engine.logprobs.load_model`."""
        return {
            "precision": self.precision,
            "compiled": self.compile,
            "quantization": self.quantization,
            "vocabulary": self.vocabulary,
        }
