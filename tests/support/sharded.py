"""Score, sample and compare with a launched model: `sharded.py MODEL REFERENCE OUT SETTINGS`."""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

from dpo.common.distributed import share, this_process
from dpo.engine.logprobs import load_model
from dpo.engine.reference_cache import cache_key, compute_reference, load_reference
from dpo.engine.settings import EngineSettings
from dpo.engine.sharding import together
from dpo.evaluation.kl import divergence
from dpo.evaluation.sampling import response_table
from tests.support.training import make_rows

PROMPTS = [f"Say something about film {number}." for number in (1, 22, 3)]


def main(model_folder, reference_folder, out, settings):
    engine = EngineSettings(max_length=200, max_tokens_per_microbatch=150, **settings)
    tokenizer, state = AutoTokenizer.from_pretrained(model_folder), this_process()
    rows = make_rows(model_folder, 300)[:270]  # the first process has more to score
    policy = load_model(model_folder, **engine.loading, frozen=True)
    held = sum(weight.to_local().numel() if policy.sharded else weight.numel() for weight in policy.parameters())
    key = cache_key(reference_folder, tokenizer, rows, engine)
    reference = load_model(reference_folder, **engine.loading, frozen=True)
    compute_reference(out / "cache", key, rows, reference, engine, out / "progress", state)
    responses = response_table(policy, tokenizer, PROMPTS, max_new_tokens=12, seed=3)["ids"].tolist()

    def compare(mine):
        prompts = [tokenizer(PROMPTS[i])["input_ids"] for i in mine]
        other = None if policy.share_base(reference_folder) else reference
        return divergence(policy, other, prompts, [responses[i] for i in mine], 150).to_dict("records")

    kl = share(len(responses), compare, together(policy, reference))
    if state.is_main_process:
        logps = load_reference(out / "cache", key)
        result = {
            "processes": state.num_processes, "held": held, "in_stream": policy.in_stream, "responses": responses,
            "logps": {name: logps[name] for name in logps}, "kl": kl,
        }  # fmt: skip
        (out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), json.loads(sys.argv[4]))
