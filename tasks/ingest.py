"""Stage `ingest`: every row of the source as a candidate pair, in one table."""

from dpo.config import load_params
from dpo.data.ingest import collect
from dpo.data.readers import read_source
from tasks.common.paths import RAW_PAIRS
from tasks.common.runner import run


def main() -> None:
    """Read, convert, write."""
    params = load_params()
    data = params.data
    origin = data.source if isinstance(data.source, str) else ", ".join(data.source)
    collect(read_source(data, params.seed), RAW_PAIRS, origin, data)


if __name__ == "__main__":
    run(main)
