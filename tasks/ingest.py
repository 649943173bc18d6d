"""Stage `ingest`: read the sources and write every row to the raw tables of pairs and demonstrations."""

from dpo.config import load_params
from dpo.data.ingest import write_raw_pairs
from dpo.data.schema import RAW_PAIRS_SCHEMA, write_empty
from dpo.data.sources import read_source
from tasks.common.paths import RAW_DEMONSTRATIONS, RAW_PAIRS, check_copied
from tasks.common.runner import run


def main() -> None:
    """Run the stage."""
    params = load_params()
    data = params.data
    check_copied(*(source.path for each in (data, params.demonstrations) if each for source in each.sources))
    write_raw_pairs(read_source(data, params.seed), RAW_PAIRS, data.origin, data)
    if demonstrations := params.demonstrations:
        rows, origin = read_source(demonstrations, params.seed, "sft"), demonstrations.origin
        write_raw_pairs(rows, RAW_DEMONSTRATIONS, origin, demonstrations, single=True)
    else:
        write_empty(RAW_DEMONSTRATIONS, RAW_PAIRS_SCHEMA)


if __name__ == "__main__":
    run(main)
