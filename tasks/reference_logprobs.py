"""Stage `reference_logprobs`: compute the reference log-probs of every pair."""

from dpo.common.distributed import this_process
from dpo.config import load_params
from dpo.engine.logprobs import load_model
from dpo.engine.pretrained import load_tokenizer
from dpo.engine.reference_cache import compute_reference, policy_key
from dpo.engine.token_table import open_table
from tasks.common import paths
from tasks.common.memory import check_memory
from tasks.common.runner import run_launched


def main() -> None:
    """Write the reference log-probs of the training and the held-out pairs."""
    params = load_params()
    engine = params.engine
    tokenizer = load_tokenizer(paths.REFERENCE)
    train = open_table(paths.TOKENS_TRAIN, paths.TRAIN, tokenizer, engine.max_length)
    held_out = open_table(paths.TOKENS_EVAL, paths.EVAL, tokenizer, engine.max_length)
    state = this_process()
    check_memory("reference_logprobs", params, paths.REFERENCE)
    model = load_model(paths.REFERENCE, **engine.loading, frozen=True).to(state.device)
    key = policy_key(paths.REFERENCE, tokenizer, engine)
    for rows, folder in ((train, paths.REFERENCE_TRAIN), (held_out, paths.REFERENCE_EVAL)):
        compute_reference(folder, key, rows, model, engine, paths.REFERENCE_PROGRESS, state)
    state.destroy_process_group()


if __name__ == "__main__":
    run_launched(main)
