"""Tiny random models and tokenizers, so that tests need no network; free ports."""

import socket
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "Say something about film 12.",
    "Film 3 is a joy and a delight.",
    "Film 27 is a bore.",
    "A short review of a long film that was neither good nor bad.",
    "The camera loves her; the script, alas, does not.",
    "Crème brûlée naïveté — 日本語 and 🎬 in one line.",
]


CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful critic.<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_bpe(special_tokens: list[str], vocab_size: int = 320) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return a ChatML tokenizer with a default system message. The end token is also the pad token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(["<|im_start|>", "<|im_end|>"]),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with an end token, without start token and chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(["<|end|>"]), eos_token="<|end|>", pad_token="<|end|>"
    )


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with neither start nor end token."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe([]))


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer whose `encode` adds a start token."""
    tokenizer = byte_level_bpe(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like that of Llama 2: words include spaces, and texts start with a space."""
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2}


ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 8}),
    "mistral": ("mistral", {**GROUPED, "sliding_window": None}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma3": ("gemma3_text", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 20, "sliding_window": 4096}),
    "gemma2": ("gemma2", {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}),
    "gpt2": ("gpt2", {}),
    "bloom": ("bloom", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {**GROUPED, "sliding_window": None}),
    "gpt_neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", GROUPED),
    "qwen3_moe": (
        "qwen3_moe",
        {**GROUPED, **EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
    ),
    "mixtral": ("mixtral", {**GROUPED, **EXPERTS, "num_local_experts": 4, "sliding_window": None}),
}


def free_ports(count: int) -> list[int]:
    """Return different free ports. All sockets are open during the search."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def make_model(architecture: str, folder: Path, seed: int = 0, **changes: object) -> Path:
    """Save a random model of two layers to `folder`."""
    kind, extra = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**TINY, **extra, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
