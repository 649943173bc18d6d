"""Measure the memory of a step of PPO: `python -m benchmarks.evidence.ppo`.

TRL 1.12 is its last release with PPO. The command needs `trl==1.12.0` in an environment of its own, and a folder
`.evidence/seed-SEED-HASH`, which `benchmarks.evidence` builds. PPO holds four models: policy, value model,
reference and reward model.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.evidence.page import PPO

PROMPTS, ANSWERS, AT_ONCE, TOKENS = 4, 8, 8, 32
"""Prompts of a step, answers to each, answers of a micro-batch, and maximum tokens of an answer: as RLOO here."""


def measure(seed: Path) -> dict[str, Any]:
    """Return peak memory and time of one step on the models in a seed's folder, in fp32."""
    import pandas as pd
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from benchmarks.evidence.cases import device, peak_gib
    from dpo.engine.chat import prompt_of
    from dpo.engine.pretrained import load_tokenizer
    from dpo.engine.tokenization import prompt_ids

    tokenizer = load_tokenizer(seed / "reference")
    tokenizer.padding_side = "left"
    distinct = pd.read_parquet(seed / "data/train.parquet").drop_duplicates("prompt")[:PROMPTS]
    prompts = [prompt_of(row, tokenizer) for row in distinct.to_dict("records")]
    rows = [ids for ids in prompt_ids(tokenizer, prompts, None) for _ in range(ANSWERS)]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(seed / "reference", dtype=torch.float32) for _ in "12"
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(seed / "reward_model", dtype=torch.float32)
        for _ in "12"
    )
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, per_device_train_batch_size=AT_ONCE, total_episodes=len(rows), num_ppo_epochs=1,
            gradient_accumulation_steps=len(rows) // AT_ONCE, local_rollout_forward_batch_size=AT_ONCE,
            response_length=TOKENS, temperature=1.0, stop_token="eos", num_sample_generations=0, bf16=False,
            gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = PPOTrainer(
            args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
            value_model=value, train_dataset=Dataset.from_dict({"input_ids": rows}),
        )  # fmt: skip
        start = time.monotonic()
        trainer.train()
    seconds = time.monotonic() - start
    return {
        "peak_memory_gib": peak_gib(),
        "device": device(),
        "seconds": seconds,
        "answers": len(rows),
        "models": 4,
    }


def main() -> None:
    """Measure, and write the result."""
    from dpo.common.files import write_json

    line = argparse.ArgumentParser(prog="python -m benchmarks.evidence.ppo")
    line.add_argument("seed", type=Path, help="folder of a seed, as .evidence/seed-1-HASH")
    seed = line.parse_args().seed
    if (found := importlib.metadata.version("trl")) != "1.12.0":
        sys.exit(f"trl {found} has no PPO; run this with trl==1.12.0 in an environment of its own")
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")}
    result = measure(seed) | {"packages": packages}
    write_json(PPO, result)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
