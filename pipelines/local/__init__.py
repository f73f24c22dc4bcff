"""Services on this machine: an object store, MLflow, and the demo."""
