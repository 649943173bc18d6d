"""Stage `preferences`: any source of preference pairs as one canonical table."""

from dpo.config import load_params
from dpo.files import written_whole
from dpo.preferences.sources import load_pairs
from tasks.stage import PREFERENCES, run


def main() -> None:
    """Load and save."""
    params = load_params()
    table = load_pairs(params.data, params.seed)
    with written_whole(PREFERENCES) as aside:
        table.to_parquet(aside, index=False)


if __name__ == "__main__":
    run(main)
