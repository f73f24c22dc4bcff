"""MLflow tracking: entries stay in a spool until the server has accepted them."""

from trainer.tracking.server import configure_mlflow as configure_mlflow
from trainer.tracking.system_metrics import SystemMetrics as SystemMetrics
from trainer.tracking.tracker import MlflowTracker as MlflowTracker
from trainer.tracking.tracker import NullTracker as NullTracker
from trainer.tracking.tracker import Tracker as Tracker
