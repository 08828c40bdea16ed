"""Frozen dataclasses: the only home of defaults, units and rules. Nothing heavy is imported here, so `--help` is instant.

A field's docstring is its help text. A rule that needs no knowledge of the machine is checked in `__post_init__`. Rules
about ranks and devices are in `device.py`, `run.py` and `world.py`. A wrong value is a `UserError`: one line, exit code 2.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from train import yamlfile
from train.errors import UserError


def read_steps(name: str, text: str) -> tuple[int, int]:
    """Read `A:B`, the steps after A until B, or raise UserError."""
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"{name} is {text}. Use A:B with A < B, such as 0:10 for the first ten steps.")
    return int(match[1]), int(match[2])


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


LARGEST = 10_000_000  # of any count: far above what anyone needs, and a product of two fits 64 bits


def _check_counts(section: str, config: Any) -> None:
    """Refuse a whole number that nobody can mean, before it is multiplied, looped over or allocated."""
    for name, value in vars(config).items():
        _check(
            not isinstance(value, int) or value <= LARGEST,
            f"{section}.{name} is {value!s:.40}. Use {LARGEST:,} or less.",
        )


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it starts."""

    dir: str = "runs"
    """Directory that holds all runs."""
    name: str | None = None
    """Directory of this run inside run.dir. Default: the recipe's file name and the time."""
    resume: str = "auto"
    """auto: continue the run directory's latest good checkpoint; never: refuse a used directory; or a checkpoint's path."""
    time_limit: float = 0.0
    """Minutes after which the run saves and leaves with exit code 75, as on a signal; 0: off. The next start goes on."""

    def __post_init__(self) -> None:
        _check(bool(self.dir), "run.dir is empty. Give a directory, such as runs.")
        if self.name is not None:
            bad = not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,199}", self.name)
            _check(
                not bad,
                f"run.name is {self.name[:220]!r}. Use 1 to 200 letters, digits and . _ = + -: it names a directory.",
            )
        _check(bool(self.resume), "run.resume is empty. Use auto, never, or the path of a checkpoint.")
        _check(0 <= self.time_limit <= 1e6, f"run.time_limit is {self.time_limit} minutes. Use 0 (off) to 1e6.")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and where they come from."""

    name: Literal["mnist", "fashion_mnist", "kmnist", "digits", "random"] = "mnist"
    """Data set. digits: 1,797 real digits that scikit-learn carries; random: noise, for measuring throughput."""
    root: str | None = None
    """Directory with torchvision's layout (ROOT/MNIST/raw/*.gz). Default: $MNIST_ROOT, else a cache directory."""
    download: bool = True
    """Download the files if root does not hold them."""
    fallback: bool = False
    """Train on digits, loudly, if the data set cannot be had."""
    validation: int = 0
    """Hold out the last N training examples and evaluate on them instead of on the test split (to choose recipes)."""
    random_examples: int = 60000
    """Training examples of the random data set (its test split has a sixth of it)."""

    def __post_init__(self) -> None:
        _check_counts("data", self)
        _check(self.validation >= 0, f"data.validation is {self.validation} examples. Use 0 (off) or more.")
        _check(self.random_examples >= 6, f"data.random_examples is {self.random_examples}. Use 6 or more.")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: Literal["cnn", "vgg", "vgg_wide", "tiny", "tiny_bn"] = "cnn"
    """cnn: the classic MNIST CNN; vgg, vgg_wide: accurate ones, with BatchNorm; tiny, tiny_bn: small ones for tests."""
    dropout: float = 0.0
    """Probability with which a feature in front of the last layer is dropped in training."""

    def __post_init__(self) -> None:
        _check(0 <= self.dropout < 1, f"model.dropout is {self.dropout}. Use 0 (off) or more, and less than 1.")


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the training images; each is off at 0 and a function of (seed, step, row of the global batch)."""

    shift: int = 0
    """Largest shift in x and in y, in pixels."""
    rotate: float = 0.0
    """Largest rotation, in degrees."""
    scale: float = 0.0
    """Largest relative change of size: 0.1 scales by 0.9 to 1.1."""
    shear: float = 0.0
    """Largest shear, in degrees."""
    erase: float = 0.0
    """Probability that a square of the image is blanked."""
    erase_size: int = 8
    """Largest side of the blanked square, in pixels."""

    def __post_init__(self) -> None:
        _check(0 <= self.shift <= 14, f"augment.shift is {self.shift} pixels. Use 0 (off) to 14.")
        _check(0 <= self.rotate <= 180, f"augment.rotate is {self.rotate} degrees. Use 0 (off) to 180.")
        _check(0 <= self.scale < 1, f"augment.scale is {self.scale}. Use 0 (off) or more, and less than 1.")
        _check(0 <= self.shear < 90, f"augment.shear is {self.shear} degrees. Use 0 (off) or more, and less than 90.")
        _check(0 <= self.erase <= 1, f"augment.erase is {self.erase}. It is a probability: 0 (off) to 1.")
        _check(1 <= self.erase_size <= 28, f"augment.erase_size is {self.erase_size} pixels. Use 1 to 28.")

    @property
    def is_on(self) -> bool:
        """Whether anything changes the images."""
        return any((self.shift, self.rotate, self.scale, self.shear, self.erase))


@dataclass(frozen=True)
class OptimConfig:
    """The update. The learning rate is never scaled by the world size: the global batch is the same on all of them."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd: Nesterov momentum; adamw: decoupled weight decay."""
    lr: float = 0.1
    """Highest learning rate of the schedule."""
    momentum: float = 0.9
    """Momentum of sgd; first beta of adamw."""
    beta2: float = 0.999
    """Second beta of adamw."""
    weight_decay: float = 0.0
    """Weight decay of kernels and matrices; biases and norms have none."""
    schedule: Literal["one_cycle", "cosine", "linear", "constant"] = "one_cycle"
    """Shape of lr(step) after the warm-up; one_cycle warms up along a cosine too."""
    warmup: float = 0.2
    """Share of all steps in which the learning rate rises."""
    final_lr: float = 0.0
    """Learning rate after the last step, as a share of optim.lr."""
    clip_norm: float = 0.0
    """Largest gradient norm (L2, over all parameters); 0: off."""
    label_smoothing: float = 0.0
    """Share of the target's mass that is spread over all classes."""
    ema: float = 0.0
    """Decay per step of the moving average of the weights, which is evaluated beside them; 0: off."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient norm of NaN or infinity does: stop the run, or skip that update. Never reaches the weights."""
    max_skips: int = 10
    """Updates that optim.nonfinite skip may leave out in the whole run; one more stops it."""

    def __post_init__(self) -> None:
        _check(0 < self.lr < 1000, f"optim.lr is {self.lr}. Use a positive number below 1000, such as 0.1.")
        for name in ("momentum", "beta2", "weight_decay", "label_smoothing", "ema"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"optim.{name} is {value}. Use 0 or more, and less than 1.")
        for name in ("warmup", "final_lr"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"optim.{name} is {value}. It is a share: 0 to 1.")
        _check(
            self.max_skips >= 1, f"optim.max_skips is {self.max_skips} updates. Use 1 or more, or optim.nonfinite stop."
        )
        _check(
            0 <= self.clip_norm < 1e9, f"optim.clip_norm is {self.clip_norm}. Use 0 (off) or a positive norm below 1e9."
        )


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, in which arithmetic, on what."""

    epochs: int = 1
    """Passes over the training split."""
    max_steps: int = 0
    """Train this many steps instead of train.epochs; 0: off. The schedule ends there too."""
    global_batch_size: int = 512
    """Examples per step over all ranks: the same set, in the same order, on any world size."""
    micro_batches: int = 0
    """Portions of the global batch, each one forward and backward pass; 0: as few as the ranks and the limit allow. Exact
    mode and BatchNorm need it fixed: it is part of the mathematics there, and the largest possible world size."""
    micro_batch_limit: int = 0
    """Examples whose activations fit in memory in one pass; 0: no limit. Decides the portions where micro_batches is 0."""
    exact: bool = False
    """Sum gradients in one fixed order, so that every world size gives the same bits."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; weights and the update stay fp32. tf32 and fp16 need a GPU."""
    compile: bool = False
    """Compile the model by torch.compile."""
    cuda_graphs: Literal["auto", "on", "off", True, False] = "auto"  # in YAML on and off are booleans
    """Replay the step as one CUDA graph: the same bits, sooner. On one GPU, not in fp16. auto: on where possible."""
    channels_last: bool = True
    """Lay images out with the channel innermost, which convolutions prefer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs if there are any."""
    num_threads: int = 0
    """CPU threads of each process; 0: an equal share of the cores (in exact mode 1, since the bits depend on it)."""
    timeout: int = 120
    """Seconds without progress after which a rank ends with an error that says who is to blame (at least 600 in the warm-up)."""
    profile_steps: str | None = None
    """A:B: write what rank 0 does in the steps after A until B to RUN/trace.json.gz, which ui.perfetto.dev opens."""

    def __post_init__(self) -> None:
        _check_counts("train", self)
        object.__setattr__(self, "cuda_graphs", {True: "on", False: "off"}.get(self.cuda_graphs, self.cuda_graphs))  # type: ignore
        for name, unit in (("epochs", "epochs"), ("global_batch_size", "examples"), ("timeout", "seconds")):
            value = getattr(self, name)
            _check(value >= 1, f"train.{name} is {value} {unit}. Use 1 or more.")
        for name in ("max_steps", "micro_batches", "micro_batch_limit", "num_threads"):
            value = getattr(self, name)
            _check(value >= 0, f"train.{name} is {value}. Use 0 (automatic) or more.")
        if self.profile_steps is not None:
            read_steps("train.profile_steps", self.profile_steps)
        _check(self.num_threads <= 4096, f"train.num_threads is {self.num_threads}. Use 0 (automatic) to 4096.")
        size, parts, limit = self.global_batch_size, self.micro_batches, self.micro_batch_limit
        _check(parts > 0 or not self.exact, "train.exact needs train.micro_batches: the largest world size, such as 8.")
        _check(
            parts <= size, f"train.micro_batches is {parts}, more than the {size} examples of train.global_batch_size."
        )
        if parts and size % parts:
            near = f"{size // parts * parts} or {(size // parts + 1) * parts}"
            down = next(d for d in range(parts, 0, -1) if size % d == 0)
            raise UserError(
                f"train.global_batch_size is {size}, which {parts} micro-batches do not divide. "
                f"Use {near}, or train.micro_batches {down}."
            )
        if parts and limit and size // parts > limit:
            raise UserError(
                f"train.micro_batches {parts} makes portions of {size // parts} examples, more than "
                f"train.micro_batch_limit {limit}. Use train.micro_batches {-(-size // limit)} or more."
            )


@dataclass(frozen=True)
class EvalConfig:
    """When and in what portions the test split is evaluated."""

    every_steps: int = 0
    """Steps between evaluations; 0: once an epoch. The last step is always evaluated."""
    batch_size: int = 500
    """Examples per pass. Portions are the same on every world size."""

    def __post_init__(self) -> None:
        _check_counts("eval", self)
        _check(self.every_steps >= 0, f"eval.every_steps is {self.every_steps}. Use 0 (once an epoch) or more.")
        _check(self.batch_size >= 1, f"eval.batch_size is {self.batch_size} examples. Use 1 or more.")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_steps: int = 0
    """Steps between checkpoints; 0: once an epoch. The last step, the best one and a preemption always save."""
    keep: int = 2
    """Newest checkpoints that stay, beside the best."""

    def __post_init__(self) -> None:
        _check_counts("checkpoint", self)
        _check(self.every_steps >= 0, f"checkpoint.every_steps is {self.every_steps}. Use 0 (once an epoch) or more.")
        _check(
            self.keep >= 1, f"checkpoint.keep is {self.keep}. Use 1 or more: without one there is nothing to resume."
        )


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training."""

    every_steps: int = 10
    """Steps between rows of metrics.jsonl."""
    progress: bool = True
    """Show progress: a bar on a terminal, plain lines elsewhere."""
    spike: float = 3.0
    """Warn of a logged loss this many times the largest of the 20 rows before it; 0: off."""
    slow_rank: float = 2.0
    """Name a rank whose own work takes this many times as long as the median rank's; 0: off."""
    report: bool = True
    """Write report.html at the end of the run."""

    def __post_init__(self) -> None:
        _check_counts("log", self)
        _check(self.every_steps >= 1, f"log.every_steps is {self.every_steps}. Use 1 or more.")
        for name in ("spike", "slow_rank"):
            value = getattr(self, name)
            _check(value == 0 or value > 1, f"log.{name} is {value}. Use 0 (off) or more than 1.")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases: a mirror of metrics.jsonl, never in the way of training."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: what $WANDB_MODE says, else online with a key and a server that answers soon, else offline; online: give the server
    10 seconds. What could not be sent, `python -m launch sync` sends later."""
    project: str = "lockstep"
    """Project that the run appears in."""
    entity: str | None = None
    """User or team. Default: the key's own."""
    group: str | None = None
    """Runs with the same group are shown together."""
    tags: list[str] = field(default_factory=list)
    """Labels of the run."""
    notes: str | None = None
    """A sentence about the run."""
    start_seconds: int = 2
    """Seconds within which the server must answer in mode auto. Training does not wait meanwhile."""
    finish_seconds: int = 5
    """Longest wait at the end for what was not sent yet, in seconds."""
    histograms: bool = True
    """Show the distribution of each parameter tensor, at each evaluation."""
    confusion: bool = True
    """Show the confusion matrix at the end."""
    mistakes: bool = True
    """Show the most confident mistakes, as a table and as images, and the first layer's filters at the end."""
    checkpoints: bool = True
    """Keep the best and the last checkpoint as artifacts."""
    code: bool = True
    """Keep the source code as an artifact (git's state is always noted)."""
    system: bool = True
    """Show the load of CPU, GPU, memory, disk and network."""
    alerts: bool = True
    """Send an alert when the run is preempted, fails or finishes."""

    def __post_init__(self) -> None:
        for name in ("start_seconds", "finish_seconds"):
            value = getattr(self, name)
            _check(
                value >= 1, f"wandb.{name} is {value}. Use 1 or more seconds; wandb.mode offline waits for no server."
            )


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    seed: int = 0
    """Source of everything random: initial weights, order, augmentation, dropout."""
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

    def __post_init__(self) -> None:
        _check(self.seed >= 0, f"seed is {self.seed}. Use 0 or more.")

    def to_yaml(self) -> str:
        """The resolved config as YAML that `--config` reads back to an equal Config."""
        return yamlfile.dump(dataclasses.asdict(self))
