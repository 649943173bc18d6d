"""Stage `preferences`: every row of the source as a candidate pair, in one table."""

from dpo.config import load_params
from dpo.preferences.candidates import collect
from dpo.preferences.sources import read_source
from tasks.stage import PREFERENCES, run


def main() -> None:
    """Read, convert, write."""
    params = load_params()
    data = params.data
    origin = data.source if isinstance(data.source, str) else ", ".join(data.source)
    collect(read_source(data, params.seed), PREFERENCES, origin, data)


if __name__ == "__main__":
    run(main)
