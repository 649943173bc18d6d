"""Stage `reference_logprobs`: compute the reference log-probs of every pair."""

from dpo.common.distributed import this_process
from dpo.config import load_params
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.reference_cache import compute_reference, policy_key
from tasks.common.paths import EVAL, REFERENCE, REFERENCE_EVAL, REFERENCE_PROGRESS, REFERENCE_TRAIN, TRAIN
from tasks.common.runner import run_launched


def main() -> None:
    """Write the reference log-probs of the training and the held-out pairs."""
    engine = load_params().engine
    state = this_process()
    tokenizer = load_tokenizer(REFERENCE)
    model = load_model(REFERENCE, **engine.loading, frozen=True).to(state.device)
    key = policy_key(REFERENCE, tokenizer, engine)
    for pairs, folder in ((TRAIN, REFERENCE_TRAIN), (EVAL, REFERENCE_EVAL)):
        compute_reference(folder, key, pairs, model, tokenizer, engine, REFERENCE_PROGRESS, state)
    state.destroy_process_group()


if __name__ == "__main__":
    run_launched(main)
