"""Inject all faults, as often as `FAULTS` says: `make faults`.

Writes `benchmarks/results/faults.json` and the table of `docs/operations/faults.md`.
"""

import argparse
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks.page import put_table
from dpo.common.files import write_json
from tests.support import nightly
from tests.support.faults.catalogue import FAULTS
from tests.support.faults.projects import NotSupported, make_complete
from tests.support.project import ROOT

RESULTS, PAGE = ROOT / "benchmarks/results/faults.json", ROOT / "docs/operations/faults.md"


def table(results: list[dict[str, object]]) -> str:
    """Return the results as a Markdown table."""
    lines = ["| fault | injected | survived | lost |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {row['fault']} | {row['tried']} | {row['survived']} | {row['lost']} |" for row in results]
    return "\n".join(lines)


def main() -> None:
    """Inject all faults. Exit with 1 if the project did not recover from one."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of functions; results are not written")
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    draw, results = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as name:
        projects = make_complete(Path(name))
        for fault in FAULTS:
            if arguments.only and fault.once.__name__ not in arguments.only:
                continue
            tried = survived = 0
            lost = fault.lost
            for _ in range(fault.times):
                folder = Path(name) / "trial"
                folder.mkdir()
                tried += fault.tries
                try:
                    fault.once(projects, folder, draw)
                    survived += fault.tries
                except NotSupported as error:
                    tried, lost = 0, f"**not run**: {error}"
                    break
                except Exception:  # noqa: BLE001  # any error is a result
                    traceback.print_exc()
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
            results.append({"fault": fault.name, "tried": tried, "survived": survived, "lost": lost})
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print(table(results))
    if not arguments.only:
        results += nightly.run(arguments.seed)
        print(table(results[-2:]))
        write_json(RESULTS, results)
        put_table(PAGE, "faults", table(results))
    sys.exit(any(row["survived"] != row["tried"] for row in results))


if __name__ == "__main__":
    main()
