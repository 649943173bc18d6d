"""Stage `reference`: the reference's log-probs of every pair; under `accelerate launch` by several processes."""

from dpo.config import load_params
from dpo.loading import load_tokenizer
from dpo.logps import load_model
from dpo.processes import this_process
from dpo.reference import compute_reference, policy_key
from tasks.stage import EVAL, REFERENCE_EVAL, REFERENCE_PROGRESS, REFERENCE_TRAIN, SFT, TRAIN, run_launched


def main() -> None:
    """Score, save."""
    engine = load_params().engine
    state = this_process()
    tokenizer = load_tokenizer(SFT)
    model = load_model(SFT, engine.precision, engine.compile).to(state.device)
    key = policy_key(SFT, tokenizer, engine)
    for pairs, folder in ((TRAIN, REFERENCE_TRAIN), (EVAL, REFERENCE_EVAL)):
        compute_reference(folder, key, pairs, model, tokenizer, engine, REFERENCE_PROGRESS, state)
    state.destroy_process_group()


if __name__ == "__main__":
    run_launched(main)
