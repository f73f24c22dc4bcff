"""The ``convoy`` command.

Each function only parses its arguments and calls the module that does the work. That module is
imported on demand.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.exceptions import TyperException

from pipelines.cli import cluster, recipe
from pipelines.cli.output import Json, print_json
from trainer.dependencies.process_patches import pillow_warnings_ignored
from trainer.errors import EXIT_USER, UserError, report, shortened
from trainer.faults.hardware_errors import classify_fault, describe_place
from trainer.process.launch_environment import check_working_directory
from trainer.process.proxies import bypass_proxies_for_local_services
from trainer.process.standard_streams import secure_standard_streams
from trainer.secrets.credentials import take_credentials
from trainer.secrets.redaction import redact

app = typer.Typer(
    name="convoy",
    help="Trains the landmark convolutional networks at scale: pack images, train, evaluate, "
    "register, promote.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
local_app = typer.Typer(
    help="An S3 server and an MLflow server on this machine's loopback.", no_args_is_help=True
)
app.add_typer(local_app, name="local")
weights_app = typer.Typer(
    help="Weights from and for torchvision, timm and ONNX.", no_args_is_help=True
)
app.add_typer(weights_app, name="weights")

LocalDir = Annotated[
    Path,
    typer.Option(
        "--dir", help="Where data, logs and credentials are kept.", envvar="CONVOY_LOCAL_DIR"
    ),
]
_LOCAL_DIR = Path("runs/local")


def main() -> None:
    """Run the console command: print one line per error and exit with the documented exit code."""
    secure_standard_streams()
    bypass_proxies_for_local_services(os.environ)
    try:
        check_working_directory()
        take_credentials()
        with pillow_warnings_ignored():
            code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except TyperException as error:
        print(
            redact(f"convoy: {error.format_message().rstrip('.')}; see convoy --help"),
            file=sys.stderr,
        )
        sys.exit(EXIT_USER)
    except Exception as error:
        sys.exit(report(classify_fault(error, describe_place()), "convoy"))


@app.command()
def pack(
    source: Annotated[
        str, typer.Argument(help="Folder with class folders, ImageNet's tars, or idx files.")
    ],
    destination: Annotated[
        str, typer.Argument(help="Folder or URL; train/ and val/ are created in it.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of the sample order over the shards.", min=0)] = 0,
    shards: Annotated[
        int | None,
        typer.Option(help="Number of shards per split; default: from --shard-mb.", min=1),
    ] = None,
    shard_mb: Annotated[int, typer.Option(help="Target size of a shard, MiB.", min=1)] = 128,
    workers: Annotated[int, typer.Option(help="Number of processes.", min=1)] = os.cpu_count() or 1,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip files that cannot be packed, and print each.")
    ] = False,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode", help="Decode every image first: detects corrupt data, takes longer."
        ),
    ] = False,
    layout: Annotated[
        Literal["auto", "splits", "classes"],
        typer.Option(
            help="Whether the folders in SOURCE are splits or classes; auto: depends on their "
            "names and content."
        ),
    ] = "auto",
    nested: Annotated[
        bool,
        typer.Option(
            "--nested", help="Images at any depth below a class folder belong to its class."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing dataset.")
    ] = False,
    class_names: Annotated[
        str | None,
        typer.Option(
            help="File with lines ID NAME (separated by a space, a tab or a comma), or JSON; "
            "default: SOURCE's synset_words.txt."
        ),
    ] = None,
    part: Annotated[
        int,
        typer.Option(
            help="Write only this part of the shards, out of --parts; counted from 0.", min=0
        ),
    ] = 0,
    parts: Annotated[
        int,
        typer.Option(
            help="Number of runs that pack SOURCE concurrently; the last one writes the index.",
            min=1,
        ),
    ] = 1,
) -> None:
    """Pack images into WebDataset shards and write an index.

    Running the command again resumes an interrupted pack.
    """
    from pipelines.datasets.pack import PackOptions, summary
    from pipelines.datasets.pack import pack as run

    options = PackOptions(
        seed,
        shards,
        shard_mb * 2**20,
        workers,
        skip_bad,
        overwrite,
        class_names,
        part,
        parts,
        decode,
        layout,
        nested,
    )
    for line in summary(run(source, destination, options)):
        print(line)


@app.command()
def verify(
    url: str,
    workers: Annotated[int, typer.Option(help="Number of processes.", min=1)] = os.cpu_count() or 1,
    as_json: Json = False,
) -> None:
    """Verify the counts, sizes, SHA-256 digests and images of a dataset.

    Every byte is read, and every image must decode.
    """
    from pipelines.datasets.verify import verify as run

    verdicts = run(url, workers)
    faults = [fault for verdict in verdicts for fault in verdict.faults]
    if as_json:
        print_json({"ok": not faults, "splits": [vars(verdict) for verdict in verdicts]})
    elif not faults:
        for v in verdicts:
            print(
                f"{v.url}: {v.samples:,} images in {v.shards} shards, {v.bytes / 2**20:,.1f} "
                f"MiB: no errors, {v.digest[:19]}"
            )
    if faults:
        raise UserError(*shortened(faults, "errors; --json lists all"))


@app.command()
def index(
    url: str,
    split: Annotated[
        str | None,
        typer.Option(
            help="Name of the split; default: the last part of the URL or, with --shards, from "
            "the names of the shards."
        ),
    ] = None,
    shards: Annotated[
        str | None,
        typer.Option(
            help="Pattern of the shards of one split, if several splits share a folder; the index "
            "is written to URL/SPLIT/index.json."
        ),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(
            help="File with the names of the labels: one per line, starting with label 0; or lines "
            "NUMBER NAME; or JSON."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of processes.", min=1)] = os.cpu_count() or 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index with different contents.")
    ] = False,
) -> None:
    """Index existing WebDataset shards in place.

    The shards are .tar files of images and labels (.cls).
    """
    from pipelines.datasets.index_shards import IndexOptions, index_shards
    from pipelines.datasets.pack import summary

    for line in summary(
        [index_shards(url, IndexOptions(split, class_names, shards, workers, overwrite))]
    ):
        print(line)


@app.command()
def order(
    url: str,
    epoch: Annotated[int, typer.Option(min=0)],
    world_size: Annotated[int, typer.Option(min=1)],
    rank: Annotated[int, typer.Option(min=0)],
    batch_size: Annotated[int, typer.Option(help="Global batch size, samples.", min=1)],
    start_step: Annotated[int, typer.Option(min=0)] = 0,
    limit: Annotated[int | None, typer.Option(help="Number of steps to print.", min=1)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    window: Annotated[int, typer.Option(help="data.shuffle_window, samples.", min=1)] = 16384,
    tail: Annotated[str, typer.Option(help="data.tail: pad or drop.")] = "pad",
    as_json: Json = False,
) -> None:
    """Print the sample keys that a rank reads, step by step."""
    from trainer.data.index import open_index
    from trainer.data.sampler import epoch_order, micro_batch_slots

    if rank >= world_size:
        raise UserError(f"--rank: {rank} must be less than --world-size {world_size}")
    if batch_size % world_size:
        raise UserError(f"--batch-size: {batch_size} is not divisible by --world-size {world_size}")
    if tail not in ("pad", "drop"):
        raise UserError(f"--tail: {tail!r} is neither pad nor drop")
    index, _ = open_index(url)
    plan = epoch_order(index.sizes, seed, epoch, batch_size, window, tail)
    slots = micro_batch_slots(batch_size, world_size, rank, 1)[0]
    for step in range(
        start_step, plan.steps if limit is None else min(plan.steps, start_step + limit)
    ):
        seen = slots[plan.weights[step, slots] > 0]
        keys = [index.key(int(sample)) for sample in plan.samples[step, seen]]
        print(
            json.dumps({"step": step, "keys": keys})
            if as_json
            else f"step {step}: {' '.join(keys)}"
        )


@app.command()
def models(
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Image size, pixels; default: 224, or 32 for the networks made for CIFAR-10.",
            min=1,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models with their size, cost and published accuracy."""
    from pipelines.cli.model_table import table
    from trainer.models import list_models
    from trainer.models.model_info import model_info

    entries = [model_info(spec.name, image_size) for spec in list_models()]
    if as_json:
        print_json([vars(entry) for entry in entries])
    else:
        Console().print(table(entries))


@weights_app.command("import")
def weights_import(
    file: Annotated[
        str, typer.Argument(help="Path or URL: .safetensors, or .pth that holds only tensors.")
    ],
    model: Annotated[str, typer.Option(help="Name of a model; `convoy models` lists them.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the model; default: runs/MODEL.")
    ] = None,
    image_size: Annotated[
        int, typer.Option(help="Image size that the model is used with, pixels.", min=1)
    ] = 224,
    data: Annotated[
        str | None,
        typer.Option(help="URL of a split; the model gets its classes, matched by name."),
    ] = None,
    half_range: Annotated[
        bool | None,
        typer.Option(
            help="Whether the model takes pixels from -1 to 1, instead of pixels normalized with "
            "ImageNet's mean and standard deviation.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            help="Set of weights to import, such as state_dict, if a checkpoint holds several."
        ),
    ] = None,
) -> None:
    """Convert torchvision or timm weights to a Convoy model.

    The model can be used with convoy evaluate, convoy predict and model.init.
    """
    from pipelines.registry.weights import import_weights

    for line in import_weights(
        file, model, output or Path("runs") / model, image_size, data, half_range, key
    ):
        print(line)


@weights_app.command("export")
def weights_export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="Output folder of a run, or a model in MLflow."
        ),
    ],
    file: Annotated[Path, typer.Argument(help="File to write.")],
    form: Annotated[
        str, typer.Option("--format", help="torchvision, timm (.pth or .safetensors) or onnx.")
    ],
) -> None:
    """Export a trained model as torchvision or timm weights, or as ONNX."""
    from pipelines.registry.weights import export_weights

    print(export_weights(model, file, form))


@app.command(context_settings={"ignore_unknown_options": False})
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to override.")
    ] = None,
    procs: Annotated[int, typer.Option(help="Number of ranks on this machine.", min=1)] = 1,
) -> int:
    """Train a model on this machine."""
    from trainer.launch import launch
    from trainer.process.supervisor import python_command

    kept = take_credentials(overrides or [])
    if kept != (
        overrides or []
    ):  # every user of the machine can read the command line of a running process
        sys.stdout.flush()
        os.execv(
            sys.executable,
            [*python_command("trainer.launch"), "--procs", str(procs), "--", recipe, *kept],
        )
    return launch(recipe, kept, procs)


@app.command()
def evaluate(model_uri: str, data_url: str, as_json: Json = False) -> None:
    """Measure the top-1 and top-5 accuracy of a registered model on a dataset split.

    Every sample of the split is evaluated.
    """
    from pipelines.registry.evaluate import evaluate as run

    result = run(model_uri, data_url)
    if as_json:
        print_json(vars(result))
    else:
        print(
            f"{result.model} on {result.samples:,} images of {result.data}: top1 "
            f"{result.top1:.4f}, top5 {result.top5:.4f}"
        )


@app.command()
def predict(model_uri: str, images: list[str], as_json: Json = False) -> None:
    """Print the five most likely classes of each image file."""
    from pipelines.registry.evaluate import predict_files

    answers = predict_files(model_uri, images)
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        likely = ", ".join(
            f"{guess['class']} {guess['probability']:.1%}" for guess in answer["top5"]
        )
        print(f"{answer['file']}: {likely}")


@app.command()
def promote(
    name: str,
    version: str,
    alias: Annotated[str, typer.Option(help="Alias to assign.")] = "champion",
) -> None:
    """Assign an alias to a registered model version."""
    from pipelines.registry.register import promote as run

    run(name, version, alias)
    print(f"{name} version {version} is now {alias}")


@app.command()
def register(
    folder: Annotated[str, typer.Argument(help="Output folder of a finished run.")],
    name: Annotated[str, typer.Argument(help="Name of the registered model.")],
) -> None:
    """Register the model of a finished run.

    Use this command if the MLflow server was unreachable when the run ended.
    """
    from pipelines.registry.register import register_output
    from trainer.locks.run_lock import exclusive

    with (
        exclusive(folder, "convoy register", "register the model after that process has ended")
        if Path(folder).is_dir()
        else nullcontext()
    ):
        registered = register_output(folder, name)
    print(
        f"registered {registered.name} version {registered.version} as {registered.alias}: "
        f"{registered.why}"
    )


@app.command()
def sync(
    spool: Annotated[
        str, typer.Argument(help="tracking.jsonl of a run, or the run's output folder.")
    ],
) -> None:
    """Send the undelivered tracking entries of a run to MLflow."""
    from pipelines.registry.register import sync as run
    from trainer.locks.run_lock import exclusive

    if Path(spool).is_dir():
        spool = str(Path(spool) / "tracking.jsonl")
    advice = "a training run delivers its entries itself; run convoy sync after it has ended"
    with (
        exclusive(str(Path(spool).parent), "convoy sync", advice)
        if Path(spool).is_file()
        else nullcontext()
    ):
        report = run(spool)
    for line in report.lines():
        print(line)
    report.raise_if_incomplete()


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Output folder.")] = Path("runs/demo"),
    digits: Annotated[
        bool,
        typer.Option(
            "--digits", help="Train on scikit-learn's digits even if Fashion-MNIST is available."
        ),
    ] = False,
) -> None:
    """Run the full pipeline on this machine, from images to a registered model.

    Set KEEP=1 to leave the services running.
    """
    from pipelines.local.demo import demo as run

    run(folder, keep=os.environ.get("KEEP") == "1", digits=digits)


@app.command()
def study(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...|all", help="Studies to run; without a name, lists all studies."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Use few images: checks that a study works, but decides little."
        ),
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Number of trainings of each kind; default: 3, or 1 with --quick.",
            min=1,
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Number of concurrent ranks, one thread each.", min=1)
    ] = os.cpu_count() or 1,
    folder: Annotated[Path, typer.Option("--dir", help="Output folder.")] = Path("runs/study"),
) -> None:
    """Test common claims about the models with small experiments.

    Running the command again resumes where the previous run stopped.
    """
    from pipelines.studies.framework.command import list_studies, run_studies
    from pipelines.studies.framework.study import Scale
    from trainer.locks.run_lock import exclusive

    if not names:
        Console().print(list_studies())
        return
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # terminates the trainings too
    with exclusive(
        str(folder), "convoy study", "use another --dir, or wait until that process ends"
    ):
        run_studies(names, Scale(quick, seeds or (1 if quick else 3)), jobs, folder)


cluster.add_to(app)
recipe.add_to(app)


@local_app.command("up")
def local_up(folder: LocalDir = _LOCAL_DIR) -> None:
    """Start the S3 and MLflow servers.

    If both are running already, they are left unchanged.
    """
    from pipelines.local import servers

    services = servers.up(folder)
    print(f"S3      {services.s3_url}  (bucket {servers.BUCKET})\nMLflow  {services.mlflow_url}")
    print(f'to use them: eval "$(convoy local env --dir {folder})"')


@local_app.command("env")
def local_env(folder: LocalDir = _LOCAL_DIR) -> None:
    """Print the environment variables that make every command use these servers."""
    from pipelines.local import servers

    services = servers.load(folder.absolute())
    if services is None:
        raise UserError(
            f"{folder}: no services are running; start them with convoy local up --dir {folder}"
        )
    variables = services.environment()
    bypass_proxies_for_local_services(proxies := dict(os.environ))
    variables |= {
        name: proxies[name]
        for name in ("no_proxy", "NO_PROXY")
        if proxies.get(name) != os.environ.get(name)
    }
    for name, value in variables.items():
        print(f"export {name}={value}")


@local_app.command("status")
def local_status(folder: LocalDir = _LOCAL_DIR, as_json: Json = False) -> None:
    """Show the status of the servers.

    The exit code is 2 unless all of them are running.
    """
    from pipelines.local import servers

    services = servers.load(folder.absolute())
    alive = services.alive() if services else {}
    urls = {"s3": services.s3_url, "mlflow": services.mlflow_url} if services else {}
    if as_json:
        print_json(
            {
                name: {
                    "running": alive[name],
                    "url": urls[name],
                    "pid": services.processes[name].pid,
                }
                for name in alive
            }
            if services
            else {}
        )
    else:
        table = Table("service", "state", "URL", "pid", box=None)
        for name, running in alive.items():
            assert services is not None
            table.add_row(
                name,
                "running" if running else "stopped",
                urls[name],
                str(services.processes[name].pid),
            )
        Console().print(table)
    if not alive or not all(alive.values()):
        raise UserError(
            f"{folder}: not all services are running; start them with convoy local up --dir "
            f"{folder}"
        )


@local_app.command("down")
def local_down(folder: LocalDir = _LOCAL_DIR) -> None:
    """Stop both servers.

    Their data is kept.
    """
    from pipelines.local import servers

    stopped = servers.down(folder)
    print(f"stopped {' and '.join(stopped)}" if stopped else "no services were running")
