"""Frozen dataclasses: the only home of defaults, units, ranges and rules. Nothing heavy is imported.

A field's docstring is its help text. Its range is declared with its default and checked by `Section`. Rules about
ranks and devices are in `state.py` and `world/`. A wrong value is a UserError.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train.errors import UserError, did_you_mean

LARGEST = 10_000_000  # of any count: far above what anyone needs, and a product of two fits 64 bits
INK_NAMES = ("mnist", "fashion_mnist", "kmnist", "digits")  # light ink on black
DATA_NAMES = (*INK_NAMES, "cifar10", "cifar100", "random")
MODEL_NAMES = ("cnn", "vgg", "vgg_wide", "tiny", "tiny_bn")
SECONDS, STEPS, EXAMPLES, PIXELS, DEGREES = "seconds", "steps", "examples", "pixels", "degrees"


@dataclass(frozen=True)
class Range:
    """The values that a number may have."""

    low: float
    high: float = LARGEST
    unit: str = ""
    zero: str = ""  # what 0 means, if it is special
    is_open: bool = False  # whether `high` itself is excluded

    def holds(self, value: float) -> bool:
        """Return whether a value is inside; NaN is not."""
        if self.zero and value == 0:
            return True
        return self.low <= value < self.high if self.is_open else self.low <= value <= self.high

    def __str__(self) -> str:
        """Say the range as an advice."""
        low, high = f"{self.low:,g}", f"{self.high:,.0f}" if self.high >= 1000 else f"{self.high:g}"
        start = f"0 ({self.zero})" + ("" if self.low == 0 else f" or {low}") if self.zero else low
        if self.high == math.inf:
            return f"{start} or more"
        return f"{start} or more, and less than {high}" if self.is_open else f"{start} to {high}"


def number(default: Any, low: float, high: float = LARGEST, unit: str = "", **options: Any) -> Any:
    """Declare a numeric field: its default and its Range."""
    return field(default=default, metadata={"range": Range(low, high, unit, **options)})


@dataclass(frozen=True)
class Section:
    """A part of the config. It refuses null and a number that is outside of its range, with UserError."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for declared in dataclasses.fields(self):
            path, value = f"{section}.{declared.name}".removeprefix("."), getattr(self, declared.name)
            if value is None and declared.default is not None:
                expected = declared.type.__name__ if isinstance(declared.type, type) else "a value"
                raise UserError(f"{path} is null. Expected {expected}.")
            allowed = declared.metadata.get("range")
            if allowed is not None and not allowed.holds(value):
                raise UserError(f"{path} is {value!s:.40}{' ' + allowed.unit if allowed.unit else ''}. Use {allowed}.")


def read_steps(name: str, text: str) -> tuple[int, int]:
    """Read `A:B`, the steps after A up to B. Raises UserError."""
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"{name} is {text}. Use A:B with A < B, such as 0:10 for the first ten steps.")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class RunConfig(Section):
    """Where a run lives and how it starts."""

    dir: str = "runs"
    """Directory that holds all runs."""
    name: str | None = None
    """Directory of this run inside run.dir. Default: the recipe's file name and the time."""
    resume: str = "auto"
    """auto: continue from the newest good checkpoint; never: refuse a used directory; or the path of a checkpoint."""
    time_limit: float = number(0.0, 0, 1e6, "minutes", zero="off")
    """Minutes, or a time such as 12:00:00 or 1-12:00:00, after which the run saves and exits with code 75, as on a
    signal; 0: off. The next start continues it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dir:
            raise UserError("run.dir is empty. Give a directory, such as runs.")
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}", self.name):
            raise UserError(f"run.name is {self.name[:220]!r}. Use 1 to 200 letters, digits and . _ = + - in it.")
        if not self.resume:
            raise UserError("run.resume is empty. Use auto, never, or the path of a checkpoint.")


@dataclass(frozen=True)
class DataConfig(Section):
    """Which images, and where they come from."""

    name: str = "mnist"
    """Built-in data set (mnist, fashion_mnist, kmnist, cifar10, cifar100, digits: 1,797 real digits of scikit-learn,
    random: noise, for measuring throughput), or the path of a .npz or .safetensors file (docs/your-own.md)."""
    root: str | None = None
    """Directory of a built-in data set, in torchvision's layout or flat. Default: $MNIST_ROOT, else a cache."""
    download: bool = True
    """Download the files if root does not hold them."""
    fallback: bool = False
    """Fall back to digits, with a warning, if the data set is unavailable."""
    validation: int = number(0, 0, unit=EXAMPLES, zero="off")
    """Hold out the last N training examples as a validation split (to choose recipes)."""
    eval_split: Literal["auto", "test", "validation"] = "auto"
    """Split that is evaluated. auto: the validation split, if examples are held out or the file has one; else test."""
    random_examples: int = number(60000, 6, unit=EXAMPLES)
    """Training examples of the random data set (its test split has a sixth of it)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None and self.name not in DATA_NAMES:
            names = f"Use {', '.join(DATA_NAMES)}, or a .npz or .safetensors file (`python -m launch data --from DIR`)."
            raise UserError(f"data.name is {self.name[:80]!r}. {did_you_mean(self.name, DATA_NAMES, names)}")

    @property
    def path(self) -> Path | None:
        """The file that holds the data; None if they are built in."""
        return Path(self.name) if self.name.endswith((".npz", ".safetensors")) else None


@dataclass(frozen=True)
class ModelConfig(Section):
    """The network."""

    name: str = "cnn"
    """cnn: the classic MNIST CNN; vgg, vgg_wide: accurate, with BatchNorm; tiny, tiny_bn: small ones for tests;
    FILE.py:FUNCTION: your own, a torch module that FUNCTION(shape, num_classes) returns (docs/your-own.md)."""
    dropout: float = number(0.0, 0, 1, zero="off", is_open=True)
    """Probability of dropping a feature before the last layer of a built-in network, in training."""
    weights: str | None = None
    """Start from the weights in this .safetensors file: of a checkpoint, an export, or any with the same names."""
    weights_skip: str | None = None
    """Leave out the tensors of model.weights whose names start with this, such as `fc.`: they start as without it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is None and self.name not in MODEL_NAMES:
            hint = did_you_mean(self.name, MODEL_NAMES, f"Use {', '.join(MODEL_NAMES)}, or FILE.py:FUNCTION.")
            raise UserError(f"model.name is {self.name[:80]!r}. {hint}")

    @property
    def source(self) -> tuple[Path, str] | None:
        """The file and the function of the user's own network; None if it is built in."""
        file, _, function = self.name.rpartition(":")
        return (Path(file), function) if file.endswith(".py") and function.isidentifier() else None


@dataclass(frozen=True)
class AugmentConfig(Section):
    """Random changes of training images, each off at 0 and a function of (seed, step, row of the global batch)."""

    flip: float = number(0.0, 0, 1, zero="off")
    """Probability of mirroring an image left to right: 0.5 for photographs, 0 where sides matter, as in digits."""
    shift: int = number(0, 0, unit=PIXELS, zero="off")
    """Largest shift in x and in y, in pixels."""
    rotate: float = number(0.0, 0, 180, DEGREES, zero="off")
    """Largest rotation, in degrees."""
    scale: float = number(0.0, 0, 1, zero="off", is_open=True)
    """Largest relative change of size: 0.1 scales by 0.9 to 1.1."""
    shear: float = number(0.0, 0, 90, DEGREES, zero="off", is_open=True)
    """Largest shear, in degrees."""
    erase: float = number(0.0, 0, 1, zero="off")
    """Probability of blanking a square of the image."""
    erase_size: int = number(8, 1, unit=PIXELS)
    """Largest side of the blanked square, in pixels."""

    @property
    def is_on(self) -> bool:
        """Whether anything changes the images."""
        return any((self.flip, self.shift, self.rotate, self.scale, self.shear, self.erase))


@dataclass(frozen=True)
class OptimConfig(Section):
    """The update. The learning rate is never scaled by the world size: the global batch does not depend on it."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd: Nesterov momentum; adamw: decoupled weight decay."""
    lr: float = number(0.1, 1e-100, 1000, is_open=True)
    """Highest learning rate of the schedule."""
    momentum: float = number(0.9, 0, 1, is_open=True)
    """Momentum of sgd; first beta of adamw."""
    beta2: float = number(0.999, 0, 1, is_open=True)
    """Second beta of adamw."""
    weight_decay: float = number(0.0, 0, 1, is_open=True)
    """Weight decay of kernels and matrices. Biases and BatchNorm have none."""
    schedule: Literal["one_cycle", "cosine", "linear", "constant"] = "one_cycle"
    """Shape of lr(step) after the warm-up; one_cycle also warms up along a cosine."""
    warmup: float = number(0.2, 0, 1)
    """Share of all steps in which the learning rate rises."""
    final_lr: float = number(0.0, 0, 1)
    """Learning rate after the last step, as a share of optim.lr."""
    clip_norm: float = number(0.0, 0, 1e9, zero="off", is_open=True)
    """Largest gradient norm (L2, over all parameters); 0: off."""
    label_smoothing: float = number(0.0, 0, 1, is_open=True)
    """Share of the target's mass that is spread over all classes."""
    ema: float = number(0.0, 0, 1, zero="off", is_open=True)
    """Decay per step of the moving average of the weights, which is evaluated too; 0: off."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient norm is NaN or infinite: stop the run, or skip the update. It never reaches the weights."""
    max_skips: int = number(10, 1, unit=STEPS)
    """Updates that optim.nonfinite skip may leave out in the whole run; one more stops it."""


@dataclass(frozen=True)
class TrainConfig(Section):
    """Training length, batch sizes, precision and device."""

    epochs: int = number(1, 1)
    """Passes over the training split."""
    max_steps: int = number(0, 0, unit=STEPS, zero="off")
    """Train this many steps instead of train.epochs; 0: off. The schedule ends there too."""
    global_batch_size: int = number(512, 1, unit=EXAMPLES)
    """Examples per step over all ranks: the same set, in the same order, on any world size."""
    num_micro_batches: int = number(0, 0, zero="automatic")
    """Micro-batches per step; 0: as few as the ranks and the limit allow. BatchNorm normalizes each by itself, and
    exact mode sums their gradients in order. Both need a fixed number, which is also the largest world size."""
    max_micro_batch_size: int = number(0, 0, unit=EXAMPLES, zero="no limit")
    """Most examples that a rank computes in one pass, to save memory; 0: no limit. Exact mode: one micro-batch each."""
    exact: bool = False
    """Sum gradients in one fixed order, so that every world size gives the same bits."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Precision of forward and backward. Weights and update stay fp32. tf32 and fp16 need a GPU."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph: faster, same bits. On one GPU, not in fp16. auto: on where possible."""
    channels_last: bool = True
    """Lay images out with the channel innermost, which convolutions prefer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs if there are any."""
    num_threads: int = number(0, 0, 4096, zero="automatic")
    """CPU threads of each process; 0: an equal share of the cores (in exact mode 1, since the bits depend on it)."""
    timeout: int = number(120, 1, unit=SECONDS)
    """Seconds without progress after which a rank ends with an error naming the cause (at least 600 in the warm-up)."""
    profile_steps: str | None = None
    """A:B: trace rank 0 in the steps after A up to B, to RUN/trace.json.gz, which ui.perfetto.dev opens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile_steps is not None:
            read_steps("train.profile_steps", self.profile_steps)
        size, count, limit = self.global_batch_size, self.num_micro_batches, self.max_micro_batch_size
        if self.exact and not count:
            raise UserError("train.exact needs train.num_micro_batches: the largest world size, such as 8.")
        if count > size:
            raise UserError(f"train.num_micro_batches is {count}, more than train.global_batch_size, {size} examples.")
        if count and size % count:
            near = f"{size // count * count} or {(size // count + 1) * count}"
            divisor = next(d for d in range(count, 0, -1) if size % d == 0)
            raise UserError(
                f"train.global_batch_size is {size}, which {count} micro-batches do not divide. "
                f"Use {near}, or train.num_micro_batches {divisor}."
            )
        if count and limit and size // count > limit:
            raise UserError(
                f"train.num_micro_batches {count} makes micro-batches of {size // count} examples, more than "
                f"train.max_micro_batch_size {limit}. Use train.num_micro_batches {-(-size // limit)} or more."
            )


@dataclass(frozen=True)
class EvalConfig(Section):
    """When the test split is evaluated, and in which batches."""

    every_steps: int = number(0, 0, unit=STEPS, zero="once an epoch")
    """Steps between evaluations; 0: once an epoch. The last step is always evaluated."""
    batch_size: int = number(500, 1, unit=EXAMPLES)
    """Examples per pass: the same batches on every world size."""


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every_steps: int = number(0, 0, unit=STEPS, zero="once an epoch")
    """Steps between checkpoints; 0: once an epoch. The last step, the best one and a preemption always save."""
    keep: int = number(2, 1)
    """Newest checkpoints that stay, in addition to the best."""


@dataclass(frozen=True)
class LogConfig(Section):
    """What is recorded during training."""

    every_steps: int = number(10, 1, unit=STEPS)
    """Steps between rows of metrics.jsonl."""
    progress: bool = True
    """Show progress: a bar on a terminal, plain lines elsewhere."""
    spike: float = number(3.0, 1.001, 1e9, zero="off")
    """Warn of a logged loss this many times the largest of the 20 rows before it; 0: off."""
    slow_rank: float = number(2.0, 1.001, 1e9, zero="off")
    """Name a rank whose own work takes this many times as long as the median rank's; 0: off."""
    report: bool = True
    """Write report.html at the end of the run."""


@dataclass(frozen=True)
class WandbConfig(Section):
    """Weights & Biases. It follows metrics.jsonl from a process of its own, and never slows or stops training."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: the mode in $WANDB_MODE, else online. online: use the server, or fall back to offline without a key or an
    answer. offline: write to the run directory. `python -m launch sync RUN` sends later what is missing."""
    project: str | None = None
    """PROJECT or ENTITY/PROJECT in which the run appears. Default: $WANDB_PROJECT, else lockstep. The entity, a user or
    a team, is by default $WANDB_ENTITY, else the key's own."""
    group: str = ""
    """Runs with the same group are shown together."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run."""
    notes: str = ""
    """A sentence about the run."""
    timeout: int = number(5, 1, unit=SECONDS)
    """Seconds to wait for the server: to connect, while training runs, and at the end for what is not sent yet."""
    media: bool = True
    """Show histograms of the weights at each evaluation, and the confusion matrix and mistakes at the end."""
    artifacts: bool = True
    """Keep the source code, the best checkpoint and the last one as artifacts."""


@dataclass(frozen=True)
class Config(Section):
    """Everything that a run depends on."""

    seed: int = number(0, 0, math.inf)
    """Source of all randomness: initial weights, order, augmentation, dropout."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
