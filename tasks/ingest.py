"""Stage `ingest`: read the source and write every row to the raw table."""

from dpo.config import load_params
from dpo.data.ingest import write_raw_pairs
from dpo.data.sources import read_source
from tasks.common.paths import RAW_PAIRS
from tasks.common.runner import run


def main() -> None:
    """Run the stage."""
    params = load_params()
    data = params.data
    write_raw_pairs(read_source(data, params.seed), RAW_PAIRS, data.origin, data)


if __name__ == "__main__":
    run(main)
