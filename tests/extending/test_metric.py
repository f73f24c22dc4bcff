"""The metric of docs/how-to/add-a-metric.md is logged, and counts the images that were trained."""

import json
from pathlib import Path

from guide import ROOT, follow_guide, run_python

TRAIN = """
import copy, json, sys
from trainer.__main__ import build_engine, build_network
from trainer.config.run_plan import build_run_plan
from trainer.data.random_streams import LATEST_VERSION
from trainer.distributed import process_group
from trainer.distributed.env import DistEnv
from trainer.process.console import TrainingProgress
from trainer.progress.progress_publisher import ProgressPublisher
from trainer.tracking.tracker import NullTracker
from trainer.training.metrics.meter import TrainState
from trainer.training.preemption import PreemptionSignal
from trainer.training.trainer import Trainer

keys, logged = [], {}


class Logged(NullTracker):
    def log_metrics(self, values, step):
        if "images_seen" in values:
            logged[step] = [values["images_seen"], len(keys)]


run = build_run_plan("digits-resnet8", sys.argv[1:], 1, check_storage=False)
built, env = build_network(run), DistEnv(0, 1, 0)
device = process_group.init_distributed(env)
engine = build_engine(run, built, device)
Trainer(
    run, env, device, engine, copy.deepcopy(built.model), TrainState(), Logged(),
    TrainingProgress(run.stop_step, quiet=True),
    ProgressPublisher(run.config.name, run.stop_step, quiet=True), PreemptionSignal(),
    save=lambda state, metrics: None, heartbeat=lambda: None, streams_version=LATEST_VERSION,
    on_samples_consumed=lambda step, used: keys.extend(used),
).fit()
process_group.cleanup()
print(json.dumps(logged))
"""


def test_the_metric_counts_the_images_of_every_step(tmp_path: Path) -> None:
    """120 images in batches of 50, of which the last one of an epoch holds 20."""
    assert follow_guide("add-a-metric", tmp_path) == "trainer/training/metrics/images.py"
    settings = [
        *("train.epochs=2", "batch.global_size=50", "batch.micro_size=null", "data.workers=0"),
        "train.log_every_steps=1",
        *(f"data.train={ROOT}/tests/compatibility/fixture/data/train", "data.val=null"),
        f"train.output_dir={tmp_path}/out",
    ]
    logged = json.loads(run_python(tmp_path, "-c", TRAIN, *settings).splitlines()[-1])
    assert logged == {
        "1": [50, 50],
        "2": [100, 100],
        "3": [120, 120],
        "4": [170, 170],
        "5": [220, 220],
        "6": [240, 240],
    }
