"""The worker of this checkout, which `make up` starts: Prefect's process worker, and a thread that frees slots.

The thread also cancels missed runs, except the latest one of each deployment.
"""

import asyncio
import logging
import sys
import threading
import time

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, PREFECT_WORKER_QUERY_SECONDS
from prefect.workers.process import ProcessWorker

from dpo.common.errors import InputError
from dpo.config import load_params
from flows.slots import release_slots, skip_missed

log = logging.getLogger("prefect.worker")


def watch(pool: str) -> None:
    """At every poll, free the slots of ended and endless runs, and cancel missed runs except the latest."""
    hours = 72.0
    with SyncPrefectClient(PREFECT_API_URL.value()) as client:
        while True:
            time.sleep(PREFECT_WORKER_QUERY_SECONDS.value())
            try:
                hours = load_params().run.flow_hours
            except InputError as error:
                log.warning("run.flow_hours stays %g: %s", hours, error)
            try:
                for line in (*release_slots(client, pool, hours), *skip_missed(client, pool)):
                    log.warning(line)
            except httpx.HTTPError as error:
                log.warning("Prefect's server does not answer, start it with `make up`: %s", error)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(sys.argv[1],), daemon=True).start()
    asyncio.run(ProcessWorker(work_pool_name=sys.argv[1], name=sys.argv[1]).start())
