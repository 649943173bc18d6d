"""The stages of `dvc.yaml`, one module each, run as `python -m tasks.STAGE`.

Importing this package disables telemetry in every dependency, unless the variables are set already. It also makes
garbage collection rarer: torch and transformers create millions of permanent objects, and examining them took a
third of a stage's start-up time.
"""

import gc
import os

from tasks.common.allocator import use_allocator_settings

TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}

for _name, _value in TELEMETRY_OFF.items():
    os.environ.setdefault(_name, _value)

use_allocator_settings()
gc.set_threshold(100_000, 50, 50)
