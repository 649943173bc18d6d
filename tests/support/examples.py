"""Number of examples of the property tests."""

import os

from hypothesis import settings

ALL = os.environ.get("ALL_EXAMPLES") == "1"
"""Set by `make test-all`. Other runs use a fifth of the examples."""


def examples(count: int) -> settings:
    """Return settings with `count` examples in `make test-all`, else with a fifth of them, at least 10."""
    return settings(max_examples=count if ALL else max(10, count // 5), deadline=None)
