"""Train rounds of RLOO on tiny data, for a test that starts several processes: `launched_rounds.py MODEL OUT`."""

import sys
from pathlib import Path

from tests.unit.online.test_rloo import train

if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
