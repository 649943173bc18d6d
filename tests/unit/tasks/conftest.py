"""A registry with models."""

import shutil
from pathlib import Path

import mlflow
import pytest

from tasks.tracking import offline


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """Return a new database of MLflow. To create it takes seconds, to copy it does not."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture
def models(tmp_path, monkeypatch, empty_store) -> list[str]:
    """Return the ids of three logged models in a new database."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment(offline.EXPERIMENT)
    made = [mlflow.initialize_logged_model(name="policy") for _ in range(3)]
    for model in made:
        mlflow.finalize_logged_model(model.model_id, "READY")
    return [model.model_id for model in made]
