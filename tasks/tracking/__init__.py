"""MLflow runs, models and the registry, and what made a result."""
