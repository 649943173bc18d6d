"""The stages of `dvc.yaml`, one module each, run as `python -m tasks.NAME`.

Importing this package keeps every dependency from reporting usage to its makers; set a variable yourself to
choose otherwise. It also has Python search for garbage less often: torch and transformers make millions of objects
that stay, and a third of a stage's start went into looking at them.
"""

import gc
import os

QUIET = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

gc.set_threshold(100_000, 50, 50)
