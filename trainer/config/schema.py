"""RunConfig: the typed schema of a recipe, with units.

Unknown keys are errors, and all errors are reported at once.
"""

import difflib
import itertools
import reprlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from trainer.config.field_types import (
    Count,
    Decay,
    Deviation,
    Epochs,
    ExperimentName,
    Folder,
    Mean,
    Minutes,
    NonNegative,
    Pixels,
    Positive,
    RegisteredName,
    Seed,
    Threads,
    Url,
    description_of,
)
from trainer.config.load import apply_overrides, find_recipe, read_recipe
from trainer.config.model_options import model_options
from trainer.data.transforms.augmentation import AUGMENTATIONS
from trainer.data.transforms.crop import PaddedCrop
from trainer.errors import UserError
from trainer.secrets.credentials import take_from_values
from trainer.training.optimizers.registry import OPTIMIZERS, optimizer_options

PLACEHOLDER = "{name}"


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="after")
    @classmethod
    def _is_printable(cls, value: Any) -> Any:
        """Rejects control characters: file systems, HTTP headers and MLflow each refuse them
        differently.
        """
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
                raise ValueError("contains a control character")
        return value


class _ModelKeys(_Section):
    """The network architecture and its initial weights."""

    name: str
    """Name of the model, as listed by `convoy models`."""
    num_classes: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Number of output classes; default: the number of classes in the data set."""
    init: Url | None = None
    """URL of a weights file to start from, with the parameter names of Convoy, torchvision or timm;
    or the output folder of a run.
    """


def _with_options(keys: type[BaseModel], name: str, options: dict[str, Any]) -> type[BaseModel]:
    """Returns a section with further keys, each given as pydantic's pair of type and field."""
    repeated = options.keys() & keys.model_fields.keys()
    assert not repeated, f"{name}: an option has the name of a key: {', '.join(repeated)}"
    return create_model(name, __base__=keys, __doc__=keys.__doc__, __module__=__name__, **options)


if TYPE_CHECKING:
    ModelConfig = _ModelKeys
else:
    ModelConfig = _with_options(
        _ModelKeys,
        "ModelConfig",
        {
            name: (kind | None, Field(default=None, description=description_of(kind)))
            for name, kind in model_options().items()
        },
    )


class DataConfig(_Section):
    """Data sets, reading, caching, sample order and normalization."""

    train: Url
    """URL of the training split."""
    val: Url | None = None
    """URL of the validation split, on which top1 and top5 are measured."""
    image_size: Pixels = 224
    """Side length of the square network input, in pixels."""
    initial_size: Pixels | None = None
    """Image side length of the first epochs, in pixels, for training that starts with smaller
    images (Howard et al. 2018); requires grow_until.
    """
    grow_from: Epochs = 0.0
    """Epoch after which the image size starts to grow from initial_size."""
    grow_until: Epochs | None = None
    """Epoch after which the image size is image_size."""
    size_step: Pixels = 32
    """The image size is a multiple of this while it grows, in pixels."""
    workers: Threads = 2
    """Decoding and augmentation threads per rank; 0: decode in the training thread."""
    prefetch_batches: Annotated[int, Field(ge=1, le=65536)] = 4
    """Micro-batches per rank that are prepared ahead of the training step."""
    prefetch_mb: Annotated[int, Field(ge=1, le=2**24)] = 512
    """Encoded bytes that a rank holds or reads ahead, in MiB; exceeded only if one step needs more.
    """
    requests: Annotated[int, Field(ge=1, le=1024)] = 8
    """Number of ranges that a rank reads concurrently."""
    wait_minutes: Minutes = 0.0
    """Time that the launcher waits for a missing index while another process packs the data, in
    minutes.
    """
    check: Literal["size", "sha256"] = "size"
    """Comparison of every shard with the index before training: `size` compares its size, `sha256`
    also its content, which reads all shards.
    """
    cache_dir: Folder | None = None
    """Folder on the node's local disk that caches the bytes read for the next epochs; shared by the
    ranks of the node.
    """
    cache_gb: Annotated[float, Field(gt=0, le=1e9)] = 50.0
    """Maximum size of cache_dir, in GiB; the least recently used blocks are evicted first."""
    bad_samples: Literal["stop", "skip"] = "stop"
    """Handling of samples that cannot be decoded: `stop` ends the run; `skip` gives the sample zero
    weight in its batch and reports it.
    """
    max_bad_samples: Count = 10
    """With `skip`, maximum number of bad samples over all ranks and epochs before the run stops
    anyway.
    """
    log_keys: bool = False
    """Write the sample keys that each rank consumed to `samples` in train.output_dir, one line per
    step.
    """
    shuffle_window: Count = 16384
    """Shuffle window, in samples over all ranks."""
    seed: Seed = 0
    """Random seed of the sample order and of the augmentation."""
    tail: Literal["pad", "drop"] = "pad"
    """Last samples of an epoch that do not fill a global batch: `pad` makes a smaller batch, padded
    with samples of zero weight; `drop` drops them.
    """
    mean: Mean = [0.485, 0.456, 0.406]
    """Mean per channel, subtracted after scaling to 0..1."""
    std: Deviation = [0.229, 0.224, 0.225]
    """Standard deviation per channel, by which values are divided after scaling to 0..1."""

    @model_validator(mode="after")
    def _grows(self) -> "DataConfig":
        if self.initial_size is not None:
            if self.initial_size > self.image_size:
                raise ValueError(
                    f"initial_size: {self.initial_size} is more than image_size {self.image_size}"
                )
            if self.grow_until is None or self.grow_until <= self.grow_from:
                raise ValueError(
                    f"initial_size: needs grow_until, in epochs, above grow_from {self.grow_from:g}"
                )
        return self

    def size_in(self, epoch: int) -> int:
        """Returns the side length of the training images of an epoch, in pixels.

        Grows linearly from initial_size to image_size, in steps of size_step.
        """
        if self.initial_size is None or self.grow_until is None or epoch >= self.grow_until:
            return self.image_size
        grown = max(0.0, (epoch - self.grow_from) / (self.grow_until - self.grow_from))
        side = self.initial_size + grown * (self.image_size - self.initial_size)
        return max(
            self.initial_size, min(self.image_size, round(side / self.size_step) * self.size_step)
        )


class BatchConfig(_Section):
    """Batch sizes, in samples."""

    global_size: Count = 256
    """Samples per optimizer step, over all ranks and accumulation steps."""
    micro_size: Count | None = None
    """Samples per forward and backward pass of one rank; default: global_size / ranks."""
    eval_size: Count = 256
    """Samples per forward pass of one rank during evaluation."""


if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


class _OptimizerKeys(_Section):
    """The optimizer and its base learning rate."""

    name: OptimizerName = "sgd"
    """Name of the optimizer."""
    base_lr: Positive = 0.1
    """Learning rate at a global batch of base_batch samples; scaled linearly with the global batch
    (Goyal et al. 2017, 2.1).
    """
    base_batch: Count = 256
    """Global batch size to which base_lr applies, in samples."""
    weight_decay: NonNegative = 1e-4
    """Weight decay coefficient; decoupled from the gradient in adamw."""
    decay_norm_and_bias: bool = True
    """Whether weight decay also applies to biases and to the gains of normalization layers;
    selected by layer type, not by name.
    """
    clip_grad_norm: Positive | None = None
    """Maximum gradient norm over all weights; larger gradients are scaled down to it."""

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        OPTIMIZERS[self.name].validate(self.model_dump())
        return self


if TYPE_CHECKING:
    OptimizerConfig = _OptimizerKeys
else:
    OptimizerConfig = _with_options(
        _OptimizerKeys,
        "OptimizerConfig",
        {
            name: (
                option.annotation,
                Field(
                    default=option.default,
                    description=f"{description_of(option.annotation)} Used by: {', '.join(users)}.",
                ),
            )
            for name, (option, users) in optimizer_options().items()
        },
    )


class ScheduleConfig(_Section):
    """The learning-rate schedule."""

    name: Literal["cosine", "step", "polynomial", "constant"] = "cosine"
    """Schedule after warmup: cosine or polynomial decay to 0, step decay at milestones, or
    constant.
    """
    warmup_epochs: Epochs = 0.0
    """Length of the warmup, in epochs (Goyal et al. 2017, 2.2)."""
    warmup: Literal["gradual", "constant"] = "gradual"
    """`gradual` increases linearly to the peak; `constant` stays at warmup_lr, then jumps to the
    peak.
    """
    warmup_lr: NonNegative | None = None
    """Start of gradual warmup (default: 0), or the learning rate of constant warmup (default:
    base_lr, at most the peak).
    """
    milestones: list[Epochs] = [30.0, 60.0, 80.0]
    """Epochs at which `step` multiplies the learning rate by gamma."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Learning-rate factor of `step`."""
    power: Annotated[float, Field(gt=0, le=1000)] = 2.0
    """Exponent of `polynomial`."""

    @model_validator(mode="after")
    def _milestones_ascend(self) -> "ScheduleConfig":
        if any(after <= before for before, after in itertools.pairwise(self.milestones)):
            raise ValueError(f"milestones: {self.milestones} must ascend")
        return self


class _AugmentKeys(_Section):
    """Augmentation and cropping of images to the network input."""

    eval_crop: Annotated[float, Field(ge=0.1, le=1)] = 0.875
    """Fraction of the resized short side that the center crop of evaluation keeps (224 of 256)."""


if TYPE_CHECKING:
    AugmentConfig = _AugmentKeys
else:
    # Read the options with `from_config` of their augmentation, which gives them their types.
    AugmentConfig = _with_options(
        _AugmentKeys,
        "AugmentConfig",
        {
            name: (field.annotation, field)
            for augmentation in AUGMENTATIONS
            for name, field in augmentation.model_fields.items()
        },
    )


class ParallelConfig(_Section):
    """Distribution of the model and its optimizer over the ranks."""

    pipeline_stages: Count = 1
    """Number of ranks over which the layers of one model replica are split."""
    split: list[str] | None = None
    """Names of the layers that start a new pipeline stage; default: balanced by multiply-adds."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage: 1 partitions the optimizer state over the ranks, 2 also the gradients, 3 also the
    weights (Rajbhandari et al. 2020).
    """


class CheckpointConfig(_Section):
    """Checkpoints: written during training, after each epoch and on a stop signal; used to resume a
    run.
    """

    url: Url | None = None
    """Folder or object store URL; default: `checkpoints` in train.output_dir."""
    every_steps: Count | None = None
    """Optimizer steps between checkpoints, in addition to the one at the end of each epoch."""
    keep: Count = 3
    """Number of newest checkpoints to keep; the one with the best top1 is kept in addition."""
    max_starts: Count = 10
    """In pods, number of consecutive starts without a new checkpoint after which the job fails
    instead of retrying.
    """
    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest valid checkpoint; `never` starts over and deletes the existing
    checkpoints at the URL.
    """


class TrackingConfig(_Section):
    """MLflow tracking and model registration."""

    uri: str | None = None
    """URI of the MLflow server; default: MLFLOW_TRACKING_URI. Without either, nothing is tracked.
    """
    experiment: ExperimentName = "convoy"
    """Name of the MLflow experiment; created if it does not exist."""
    register_as: RegisteredName | None = None
    """Name in the MLflow model registry under which the trained model is registered as a new
    version.
    """


class TrainConfig(_Section):
    """Length and execution options of the training."""

    epochs: Count | None = None
    """Number of passes over the training split."""
    max_steps: Count | None = None
    """Optimizer steps after which training stops; the schedule spans `epochs` if that is given as
    well.
    """
    seed: Seed = 0
    """Random seed of the initial weights."""
    log_every_steps: Count = 20
    """Optimizer steps between two reads of the losses from the device; all losses are logged."""
    max_skipped_steps: Annotated[int, Field(ge=1, le=16)] = 16
    """Number of consecutive steps with overflowing fp16 gradients after which the run stops."""
    label_smoothing: Decay = 0.0
    """Fraction of each training target that is spread evenly over all classes (Szegedy et al. 2016,
    7).
    """
    sync_batch_norm: bool = False
    """Compute batch-norm statistics over the micro-batches of all data-parallel ranks at an
    accumulation step, instead of one rank's.
    """
    channels_last: bool = True
    """Whether activations use the channels-last memory layout."""
    activation_checkpointing: bool = False
    """Keep the activations of a few layers only and recompute the others in the backward pass (Chen
    et al. 2016).
    """
    compile: bool = False
    """Compile each layer with torch.compile; requires a C++ compiler on the training machine, also
    with a GPU.
    """
    cuda_graphs: Literal["auto", "off"] = "auto"
    """`auto` replays layers as CUDA graphs on a GPU if they can be captured."""
    hang_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = 15.0
    """Minutes without a training step or evaluation batch after which a rank dumps the stacks of
    all its threads and exits like a rank that lost a peer; null: never.
    """
    output_dir: Folder = "runs/{name}"
    """Folder for the weights, the result and the tracking data that MLflow did not receive."""


class RunConfig(_Section):
    """A complete recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """Name of the run: letters, digits, dots, underscores and dashes."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augment: AugmentConfig = AugmentConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of weights and activations in training; master weights and batch norm are always
    fp32.
    """
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of the exponential moving average of the weights, which is then evaluated and
    exported; default: no average.
    """
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _has_length(self) -> "RunConfig":
        if self.train.epochs is None and self.train.max_steps is None:
            raise ValueError("train.epochs or train.max_steps must be given")
        return self

    @model_validator(mode="after")
    def _padding_is_less_than_image(self) -> "RunConfig":
        side, crop = self.data.size_in(0), PaddedCrop.from_config(self.augment)
        if crop.enabled and crop.padding >= side:
            raise ValueError(
                f"augment.padding: {crop.padding} must be less than the image size of {side} pixels"
            )
        return self

    @model_validator(mode="after")
    def _placeholders_are_known(self) -> "RunConfig":
        url, output = self.checkpoint.url or "", self.train.output_dir
        if PLACEHOLDER in url:
            raise ValueError(
                f"checkpoint.url: {url} contains {PLACEHOLDER}, which is replaced only in "
                "train.output_dir; write the name"
            )
        if "{" in output.replace(PLACEHOLDER, ""):
            raise ValueError(
                f"train.output_dir: {output} contains an unknown placeholder; the only one is "
                f"{PLACEHOLDER}"
            )
        return self

    @property
    def output_dir(self) -> Path:
        return Path(self.train.output_dir.replace(PLACEHOLDER, self.name))

    @property
    def checkpoint_url(self) -> str:
        """URL of the checkpoints: ``checkpoint.url``, or a folder in ``output_dir``."""
        return self.checkpoint.url or str(self.output_dir / "checkpoints")

    def flat(self) -> dict[str, Any]:
        """Returns the values of all keys, named ``section.key``."""
        return dict(_flatten(self.model_dump()))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads ``recipe``, applies ``key=value`` overrides and validates the result.

    ``recipe``: a file, or the name of a shipped recipe. Raises UserError with one line per error.
    The result never contains credentials: those of ``tracking.uri`` are moved to the environment.
    """
    path = find_recipe(recipe)
    values = read_recipe(path)
    faults = apply_overrides(values, overrides)
    take_from_values(values)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(*faults, *(f"{path.name}: {line}" for line in _explain(error))) from None
    if faults:
        raise UserError(*faults)
    return config


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def known_keys() -> list[str]:
    """Returns every key of a recipe as ``section.key``."""
    return [key for key, _ in _fields(RunConfig)]


def default_values() -> dict[str, Any]:
    """Returns the default of every key that may be omitted, by ``section.key``."""
    return {
        key: field.get_default(call_default_factory=True)
        for key, field in _fields(RunConfig)
        if not field.is_required()
    }


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield f"{key}: unknown key; {_nearest(key)}"
        elif fault["type"] == "missing":
            yield f"{key}: must be given"
        # A section's validator raises this.
        elif fault["type"] == "value_error" and isinstance(fault["input"], dict):
            yield ".".join([*([key] if key else []), fault["msg"].removeprefix("Value error, ")])
        else:
            message = fault["msg"].removeprefix("Value error, ")
            hint = "; put it in quotes" if fault["type"] == "string_type" else ""
            shown = _REPR.repr(fault["input"])
            message = message.replace("Input ", "input ").replace("String ", "string ")
            yield f"{key}: {shown} is invalid: {message}{hint}"


def _nearest(key: str) -> str:
    known = known_keys() + list(RunConfig.model_fields)
    by_leaf = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"did you mean {nearest[0]}?"
