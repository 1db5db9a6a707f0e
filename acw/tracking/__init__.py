"""MLflow: the store, a run in it, the registry."""
