"""MLflow runs, models and the model registry; provenance of checkpoints."""
