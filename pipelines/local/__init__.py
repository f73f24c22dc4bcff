"""Everything on this machine: an object store, MLflow, the demo."""
