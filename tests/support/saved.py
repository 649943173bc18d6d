"""Save a launched model, and count the gathered bytes: `saved.py MODEL OUT FILE_BYTES`."""

import json
import sys
import weakref
from pathlib import Path

from transformers import AutoTokenizer

from dpo.common.distributed import this_process
from dpo.engine import sharding
from dpo.engine.logprobs import load_model
from dpo.training.train import save_checkpoint


class Count:
    """Bytes of gathered weights that exist at the same time."""

    def __init__(self, gather):
        self.gather, self.now, self.peak = gather, 0, 0

    def __call__(self, weight):
        whole = self.gather(weight)
        size = whole.numel() * whole.element_size()
        self.change(size)
        weakref.finalize(whole, self.change, -size)
        return whole

    def change(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


def main(model_folder, out, file_bytes):
    sharding.FILE_BYTES, count = file_bytes, Count(sharding._gathered)
    sharding._gathered = count
    model = load_model(model_folder)
    model.shard()
    save_checkpoint(model, AutoTokenizer.from_pretrained(model_folder), out, {})
    if this_process().is_main_process:
        weights = [weight.numel() * 4 for weight in model.model.parameters()]
        facts = {"sharded": model.sharded, "peak": count.peak, "whole": sum(weights), "largest": max(weights)}
        out.with_suffix(".json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
