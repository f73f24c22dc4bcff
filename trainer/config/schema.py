"""RunConfig: everything that a recipe may say, typed, with its unit; unknown keys are refused and
every fault is told at once.
"""

import difflib
import itertools
import reprlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from trainer.config.field_types import (
    Alpha,
    Count,
    Decay,
    Deviation,
    Epochs,
    ExperimentName,
    Folder,
    Fraction,
    Mean,
    Minutes,
    NonNegative,
    Pixels,
    Positive,
    RegisteredName,
    Seed,
    Threads,
    Url,
)
from trainer.config.load import apply_overrides, find_recipe, read_recipe
from trainer.errors import UserError
from trainer.secrets.credentials import take_from_values

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
        """File systems, HTTP headers and MLflow refuse control characters, each in its own way."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
                raise ValueError("contains a control character")
        return value


class ModelConfig(_Section):
    """Which network."""

    name: str
    """A name that `convoy models` lists."""
    num_classes: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Classes of the head; the data set's own number when not given."""
    width: Annotated[int, Field(ge=1, le=2**16)] | None = None
    """Channels of the first stage; the network's own when not given, as with every option below."""
    stem: Literal["imagenet", "small"] | None = None
    """How the image is taken in: large strides for photographs, none for small images."""
    activation: Literal["relu", "tanh"] | None = None
    """The non-linearity."""
    batch_norm: bool | None = None
    """Whether batch norm follows each convolution."""
    dropout: Decay | None = None
    """Probability that an input of a fully connected layer is dropped."""
    head: Literal["tower", "average"] | None = None
    """What follows the convolutions: three fully connected layers, or one behind an average over
    the image as in GoogLeNet.
    """
    filters: Literal["stacked", "single"] | None = None
    """A stage's convolutions: 3x3 ones in a row, or one large one that sees as much."""
    reduction: bool | None = None
    """Whether 1x1 convolutions reduce the channels before an inception module's large filters."""
    stride_in: Literal["1x1", "3x3"] | None = None
    """The convolution that strides in a bottleneck block: 1x1 as in the paper, 3x3 as in "v1.5"."""
    zero_init_gamma: bool | None = None
    """Every residual block starts as its shortcut (Goyal et al. 2017, 5.1)."""
    init: Url | None = None
    """URL of a weights file to start from, in our, torchvision's or timm's names; or an output
    folder of a run.
    """


class DataConfig(_Section):
    """What is read, and how."""

    train: Url
    """URL of the split that is trained on."""
    val: Url | None = None
    """URL of the split that top1 and top5 are measured on."""
    image_size: Pixels = 224
    """Side of the square that the network sees, pixels."""
    initial_size: Pixels | None = None
    """Side in the first epochs, pixels, where training begins with smaller images (Howard et al.
    2018); needs grow_until.
    """
    grow_from: Epochs = 0.0
    """Epochs after which the side begins to grow from initial_size."""
    grow_until: Epochs | None = None
    """Epochs after which it is image_size."""
    size_step: Pixels = 32
    """It is a multiple of this on the way, pixels."""
    workers: Threads = 2
    """Threads a rank that decode and augment; 0: in the training thread."""
    prefetch_batches: Annotated[int, Field(ge=1, le=65536)] = 4
    """Micro-batches a rank that are made ahead of the training step."""
    prefetch_mb: Annotated[int, Field(ge=1, le=2**24)] = 512
    """Encoded bytes that a rank holds or reads ahead, MiB; more only where one step needs more."""
    requests: Annotated[int, Field(ge=1, le=1024)] = 8
    """Ranges that a rank reads at a time."""
    wait_minutes: Minutes = 0.0
    """Minutes that the launcher waits for an index that is not there yet, because something else is
    packing the data.
    """
    check: Literal["size", "sha256"] = "size"
    """What of every shard is compared with the index before training: its size, or its bytes too,
    which reads them all.
    """
    cache_dir: Folder | None = None
    """Folder on a node's own disk where bytes that were read are kept for the next epoch; its ranks
    share it.
    """
    cache_gb: Annotated[float, Field(gt=0, le=1e9)] = 50.0
    """Most that stands in it, GiB; what was not used for longest goes first."""
    bad_samples: Literal["stop", "skip"] = "stop"
    """What a sample that cannot be decoded does: stop the run, or count for nothing in its batch
    and be told.
    """
    max_bad_samples: Count = 10
    """With `skip`, how many may be met, over all ranks and epochs, before the run stops all the
    same.
    """
    log_keys: bool = False
    """Write the keys of the samples that each rank took to `samples` in train.output_dir, a line a
    step.
    """
    shuffle_window: Count = 16384
    """Samples, over all ranks, within which the order is shuffled."""
    seed: Seed = 0
    """Of the sample order and of the augmentation."""
    tail: Literal["pad", "drop"] = "pad"
    """An epoch's last samples that fill no global batch: a smaller batch, padded with samples of
    weight zero, or dropped.
    """
    mean: Mean = [0.485, 0.456, 0.406]
    """Of each channel, subtracted after scaling to 0..1."""
    std: Deviation = [0.229, 0.224, 0.225]
    """Of each channel, divided by after scaling to 0..1."""

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
        """Side of the training images of an epoch, pixels: from initial_size to image_size,
        linearly, in steps of size_step.
        """
        if self.initial_size is None or self.grow_until is None or epoch >= self.grow_until:
            return self.image_size
        grown = max(0.0, (epoch - self.grow_from) / (self.grow_until - self.grow_from))
        side = self.initial_size + grown * (self.image_size - self.initial_size)
        return max(
            self.initial_size, min(self.image_size, round(side / self.size_step) * self.size_step)
        )


class BatchConfig(_Section):
    """Sizes of batches, samples."""

    global_size: Count = 256
    """Samples in an optimizer step, over all ranks and accumulation steps."""
    micro_size: Count | None = None
    """Samples in one forward and backward of one rank; global_size / ranks when not given."""
    eval_size: Count = 256
    """Samples in one forward of one rank during evaluation."""


class OptimizerConfig(_Section):
    """The update rule and its learning rate."""

    name: Literal["sgd", "adamw", "lars", "lamb"] = "sgd"
    """The update rule: SGD with momentum, AdamW, LARS or LAMB."""
    base_lr: Positive = 0.1
    """Learning rate at a global batch of base_batch; scaled linearly with the global batch (Goyal
    et al. 2017, 2.1).
    """
    base_batch: Count = 256
    """Samples for which base_lr is meant."""
    momentum: Decay = 0.9
    """Of sgd and lars."""
    nesterov: bool = False
    """Whether the momentum of sgd and lars is Nesterov's."""
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of the first and second moment of adamw and lamb."""
    weight_decay: NonNegative = 1e-4
    """Coefficient of weight decay; decoupled from the gradient in adamw."""
    decay_norm_and_bias: bool = True
    """Whether weight decay also pulls on biases and on the gains of norms; by the kind of layer,
    not by name.
    """
    clip_grad_norm: Positive | None = None
    """Largest norm of the gradient over all weights; a longer one is scaled to it."""

    @model_validator(mode="after")
    def _has_momentum(self) -> "OptimizerConfig":
        if self.nesterov and not self.momentum and self.name in ("sgd", "lars"):
            raise ValueError("nesterov: true needs a momentum above 0")
        return self


class ScheduleConfig(_Section):
    """The learning rate over time."""

    name: Literal["cosine", "step", "polynomial", "constant"] = "cosine"
    """Learning rate after warmup: cosine or polynomial decay to 0, step decay at milestones, or
    constant.
    """
    warmup_epochs: Epochs = 0.0
    """Epochs of warmup (Goyal et al. 2017, 2.2)."""
    warmup: Literal["gradual", "constant"] = "gradual"
    """gradual: climbs linearly to the peak; constant: stays at warmup_lr, then jumps to the peak.
    """
    warmup_lr: NonNegative | None = None
    """Where gradual warmup begins (0 when not given), or what constant warmup holds (base_lr when
    not given).
    """
    milestones: list[Epochs] = [30.0, 60.0, 80.0]
    """Epochs at which `step` multiplies the learning rate by gamma."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of `step`."""
    power: Annotated[float, Field(gt=0, le=1000)] = 2.0
    """Exponent of `polynomial`."""

    @model_validator(mode="after")
    def _milestones_ascend(self) -> "ScheduleConfig":
        if any(after <= before for before, after in itertools.pairwise(self.milestones)):
            raise ValueError(f"milestones: {self.milestones} must ascend")
        return self


class AugmentConfig(_Section):
    """From stored images to the network's square."""

    crop: Literal["resized", "padded", "none"] = "resized"
    """resized: random area and aspect; padded: random shift in a zero border; none: as in
    evaluation.
    """
    padding: Annotated[int, Field(ge=0, le=16384)] = 4
    """Border of `padded`, pixels."""
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Least part of the image's area that `resized` keeps."""
    flip: bool = True
    """Mirror left and right with probability 1/2."""
    auto: Literal["none", "rand", "trivial"] = "none"
    """Random changes of colour and shape: RandAugment (Cubuk et al. 2019), TrivialAugment (Mueller
    and Hutter 2021).
    """
    rand_layers: Annotated[int, Field(ge=1, le=4)] = 2
    """Changes that `rand` makes to an image."""
    rand_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Their strength, of 30."""
    erase: Fraction = 0.0
    """Probability that a rectangle of an image is painted over with data.mean (random erasing,
    Zhong et al. 2017).
    """
    eval_crop: Annotated[float, Field(ge=0.1, le=1)] = 0.875
    """Part of the resized short side that the centre crop of evaluation keeps (224 of 256)."""
    mixup: Alpha = 0.0
    """alpha of the Beta distribution by which two images and their targets are blended (Zhang et
    al. 2018); 0: off.
    """
    cutmix: Alpha = 0.0
    """alpha of the Beta distribution of the area that another image's pixels take (Yun et al.
    2019); 0: off. With mixup on too, each micro-batch gets one of them by a coin's toss.
    """


class ParallelConfig(_Section):
    """How a model and its optimizer are spread over the ranks."""

    pipeline_stages: Count = 1
    """Ranks over which the layers of one copy of the model are spread."""
    split: list[str] | None = None
    """Names of the layers at which a new stage begins; by multiply-adds when not given."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """Partitioned over the ranks: 1 the optimizer's state, 2 the gradients too, 3 the weights too
    (Rajbhandari et al. 2020).
    """


class CheckpointConfig(_Section):
    """What a run needs to go on after a stop: written while it trains, after each epoch and when it
    is told to stop.
    """

    url: Url | None = None
    """Folder or object store; `checkpoints` in train.output_dir when not given."""
    every_steps: Count | None = None
    """Optimizer steps between two, beside those at each epoch's end."""
    keep: Count = 3
    """How many of the newest stay; the one of the best top1 stays too."""
    max_starts: Count = 10
    """In pods, starts in a row without a new checkpoint between them, after which the job fails
    instead of trying again.
    """
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest good one; never: begin anew, and remove those that stand at the
    URL.
    """


class TrackingConfig(_Section):
    """MLflow."""

    uri: str | None = None
    """MLflow server; MLFLOW_TRACKING_URI when not given; no tracking where neither is."""
    experiment: ExperimentName = "convoy"
    """Name of the MLflow experiment; created if it does not exist."""
    register_as: RegisteredName | None = None
    """Name in the MLflow model registry under which the trained model gets a new version."""


class TrainConfig(_Section):
    """Length and manner of the run."""

    epochs: Count | None = None
    """Passes over the training split."""
    max_steps: Count | None = None
    """Optimizer steps after which to stop; the schedule spans `epochs` where that is given too."""
    seed: Seed = 0
    """Of the initial weights."""
    log_every_steps: Count = 20
    """Optimizer steps between two reads of the losses from the device (all of them are logged)."""
    max_skipped_steps: Annotated[int, Field(ge=1, le=16)] = 16
    """Steps in a row whose fp16 gradients overflow, after which the run stops."""
    label_smoothing: Decay = 0.0
    """Part of each training target that is spread evenly over all classes (Szegedy et al. 2016, 7).
    """
    sync_batch_norm: bool = False
    """Batch norm's statistics are those of the micro-batches of all data-parallel ranks at an
    accumulation step, not of one.
    """
    channels_last: bool = True
    """Memory layout of activations."""
    activation_checkpointing: bool = False
    """Keep the activations of a few layers only and compute the others again in the backward pass
    (Chen et al. 2016).
    """
    compile: bool = False
    """Compile each layer with torch.compile; needs a C++ compiler where it runs, with a GPU too."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """auto: on a GPU, layers are replayed as CUDA graphs where they can be captured."""
    hang_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = 15.0
    """Minutes without a step or a batch of evaluation, after which a rank writes the stacks of all
    its threads and ends as one that lost a peer does; null: never.
    """
    output_dir: Folder = "runs/{name}"
    """Folder for the weights, the result and whatever MLflow could not be told."""


class RunConfig(_Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """Of the run: letters, digits, dots, dashes."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augment: AugmentConfig = AugmentConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights and activations in training; master weights and batch norm are fp32 in each."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay a step of a moving average of the weights, which is then what is evaluated and
    exported; none when not given.
    """
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _has_a_length(self) -> "RunConfig":
        if self.train.epochs is None and self.train.max_steps is None:
            raise ValueError("train.epochs or train.max_steps must be given")
        return self

    @model_validator(mode="after")
    def _padding_keeps_a_part(self) -> "RunConfig":
        side, padding = self.data.size_in(0), self.augment.padding
        if self.augment.crop == "padded" and padding >= side:
            raise ValueError(
                f"augment.padding: {padding} can shift all of an image of {side} pixels away; "
                "use less"
            )
        return self

    @model_validator(mode="after")
    def _placeholders_are_known(self) -> "RunConfig":
        url, output = self.checkpoint.url or "", self.train.output_dir
        if PLACEHOLDER in url:
            raise ValueError(
                f"checkpoint.url: {url} holds {PLACEHOLDER}, which only train.output_dir "
                "replaces; write the name"
            )
        if "{" in output.replace(PLACEHOLDER, ""):
            raise ValueError(
                f"train.output_dir: {output} holds a placeholder that does not exist; the only "
                f"one is {PLACEHOLDER}"
            )
        return self

    @property
    def output_dir(self) -> Path:
        return Path(self.train.output_dir.replace(PLACEHOLDER, self.name))

    @property
    def checkpoint_url(self) -> str:
        """Where the run keeps its checkpoints: ``checkpoint.url``, or a folder in ``output_dir``."""
        return self.checkpoint.url or str(self.output_dir / "checkpoints")

    def flat(self) -> dict[str, Any]:
        """Every key as ``section.key``."""
        return dict(_flatten(self.model_dump()))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``recipe`` (a file, or the name of a shipped one), apply ``key=value`` overrides, check
    all of it.

    Raises UserError with a line for each fault. It never holds credentials: those of
    ``tracking.uri`` are in the environment.
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


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every key of a recipe as ``section.key``."""
    keys = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += known_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield f"{key}: unknown key; {_nearest(key)}"
        elif fault["type"] == "missing":
            yield f"{key}: must be given"
        elif fault["type"] == "value_error" and isinstance(fault["input"], dict):  # of a section
            yield ".".join([*([key] if key else []), fault["msg"].removeprefix("Value error, ")])
        else:
            message = fault["msg"].removeprefix("Value error, ")
            hint = "; put it in quotes" if fault["type"] == "string_type" else ""
            shown = _REPR.repr(fault["input"])
            message = message.replace("Input ", "input ").replace("String ", "string ")
            yield f"{key}: {shown} is wrong: {message}{hint}"


def _nearest(key: str) -> str:
    known = known_keys() + list(RunConfig.model_fields)
    by_leaf = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = by_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"did you mean {nearest[0]}?"
