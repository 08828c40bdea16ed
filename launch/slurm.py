"""`python -m launch slurm`: check a training, submit it to Slurm, follow it.

No job is queued that would fail on a typo: the config is parsed, the ranks must be able to share the batch, and the
request passes `sbatch --test-only`. Arguments are passed as a list, never through a shell's parser. The job itself is
slurm/train.sbatch.
"""

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from train.cli import Parser, parse, run_name, split_arguments
from train.config import Config
from train.errors import CRASHED, FINISHED, UserError

ROOT = Path(__file__).parent.parent
# The SBATCH_* of site.env reach sbatch. Its options end with it, and it may have Windows line ends.
SITE = """
if [ -f slurm/site.env ]; then set -a; . <(tr -d '\\r' <slurm/site.env) >&2 || :; set +aeu +o pipefail; fi
exec "$@"
"""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # any other SLURM_* is of the job that this is called from
RANKS = ("gpus", "gpus_per_node", "gres", "ntasks", "ntasks_per_node")  # options that ask for ranks
TOTALS = ("gpus", "ntasks")  # on all nodes together
UNCOUNTED = ("--ntasks-per-", "--gpus-per-", "--tres-per-")  # but for those in RANKS
SILENT = ("-Q", "--quiet", "-V", "--version", "--usage", "--test-only")
POLL_SECONDS, PATIENCE_SECONDS = 1.0, 120.0
LOST, INTERRUPTED = 3, 130  # exit codes: the job was submitted and can no longer be followed; Ctrl-C
# Slurm's states of a job that has ended. Of the others there are many, and new versions add some.
ENDED = re.compile("BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|REVOKED|TIMEOUT")
SHORT_MINUTES = 10  # of such a job, the 300 s between slurm/train.sbatch's signal and the end would be half or all


def make_parser() -> Parser:
    """Build the command line."""
    parser = Parser(
        prog="python -m launch slurm",
        usage="%(prog)s [OPTIONS] [SBATCH OPTIONS] -- TRAIN ARGUMENTS",
        description="Check a training and submit it. Options that are not listed go to sbatch: --time, --partition, "
        "--signal=USR2@600, --requeue, --no-requeue, --mem=0, ... Write those with a value as --name=value.",
    )
    nodes = "nodes (default 1, or what --gpus or --ntasks needs); MIN-MAX: it continues while MIN are left"
    parser.add_argument("--nodes", "-N", help=nodes)
    gpus = "GPUs and ranks per node, as [TYPE:]NUMBER; --gres=gpu:NUMBER is the same"
    parser.add_argument("--gpus-per-node", help=gpus)
    parser.add_argument("--gres", help=argparse.SUPPRESS)
    parser.add_argument("--gpus", "-G", help="GPUs and ranks in all, as [TYPE:]NUMBER")
    parser.add_argument("--ntasks-per-node", type=int, help="CPU ranks per node (default 1)")
    parser.add_argument("--ntasks", "-n", type=int, help="CPU ranks in all")
    array = "the tasks of a sweep: its seeds, or lines of its file, which count from 1"
    parser.add_argument("--array", "-a", help=array)
    sweep = "'seeds', or a file with one line of flags per run; needs --array, such as --array=1-5%%2"
    parser.add_argument("--sweep", help=sweep)
    parser.add_argument("--dry-run", action="store_true", help="print the command and do not submit")
    parser.add_argument("--follow", action="store_true", help="show the log and the job's states until it ends")
    for_the_job = "check the arguments, print the run's directory (for the job)"
    parser.add_argument("--print-run", action="store_true", help=for_the_job)
    return parser


def check_options(options: argparse.Namespace, extra: list[str]) -> None:
    """Raise UserError if an option has a value that makes no job."""
    for name in ("ntasks_per_node", "ntasks"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}. Use 1 or more.")
    for word in extra:
        if word.startswith(SILENT):
            raise UserError(f"{word} keeps sbatch from printing the job's id. Leave it out.")
        if word.startswith(UNCOUNTED) and not re.fullmatch("--gpus-per-task=(.*:)?1", word):
            raise UserError(f"{word} does not give the number of ranks. Use --gpus, --gpus-per-node or --ntasks.")
    if options.sweep and not options.array:
        raise UserError("--sweep needs --array=FIRST-LAST, such as --array=1-5%2.")
    if options.array and not options.sweep:
        raise UserError(
            f"--array={options.array} needs --sweep, such as --sweep seeds: one run would start many times."
        )
    if options.sweep and options.follow:
        raise UserError("--sweep cannot be followed: each of its tasks has its own log. Drop --follow.")


def count_gpus(name: str, value: str) -> int:
    """Return the number of GPUs in 8, h100:8, h100:4,a100:4 or, for --gres, gpu:8. Raises UserError."""
    parts = [part.removeprefix("gres:") for part in value.split(",")]
    if name == "gres":
        parts = [part for part in parts if re.match("gpu(:|$)", part)]
    numbers = [re.fullmatch(r"(?:[^:]+:){0,2}(\d+)", part) for part in parts]
    if None in numbers:
        expected = "gpu:NUMBER or gpu:TYPE:NUMBER" if name == "gres" else "NUMBER or TYPE:NUMBER"
        raise UserError(f"--{name.replace('_', '-')} is {value}. Use {expected}.")
    return sum(int(number[1]) for number in numbers if number)


def count_ranks(options: argparse.Namespace) -> int:
    """Return the world size that the options ask for: GPUs, or else tasks. Raises UserError if they disagree."""
    nodes, sizes = node_range(options.nodes)[1], {}
    for name in RANKS:
        if (value := getattr(options, name)) is not None:
            number = value if name.startswith("ntasks") else count_gpus(name, value)
            sizes[name] = number * (nodes if name not in TOTALS else 1)
    sizes = {name: size for name, size in sizes.items() if size}
    if sizes.keys() - {"ntasks", "ntasks_per_node"}:  # one task per node asks for nothing: each GPU gets a rank
        sizes = {name: size for name, size in sizes.items() if not (name.startswith("ntasks") and size == nodes)}
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"--{name.replace('_', '-')} gives {size}" for name, size in sizes.items())
        raise UserError(
            f"The options ask for different world sizes on {nodes} node(s): {found}. Each GPU gets one rank."
        )
    return max(sizes.values(), default=nodes)


def check_array(path: Path, num_lines: int, array: str) -> None:
    """Raise UserError if an index of --array is not a line of the sweep's file."""
    for part in array.partition("%")[0].split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        if not found:
            raise UserError(f"--array is {array}. Use FIRST-LAST, such as 1-5%2.")
        first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
        for index in range(first, last + 1, step):
            if not 1 <= index <= num_lines:
                hint = f"Lines count from 1: use --array=1-{num_lines}"
                raise UserError(f"{path} has {num_lines} lines, and no line {index} of --array={array}. {hint}.")


def node_range(text: str | None) -> tuple[int, int]:
    """Return the least and the largest number of nodes of `N` or `MIN-MAX`. Raises UserError for anything else."""
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text or "1")
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise UserError(f"--nodes is {text}. Use a number, such as 4, or a range, such as 2-8.")
    return least, most


def check_world(config: Config, world_size: int) -> None:
    """Raise UserError if so many ranks cannot share the training: the rule that the ranks themselves apply."""
    from launch.plan import describe_data
    from train.functional import layers
    from train.state import resolve_num_micro_batches
    from train.storage import network

    *_, shape, num_classes = describe_data(config.data)
    model = network.build(config.model, shape, num_classes, config.seed, config.train.channels_last).module
    has_batch_norm = bool(layers.batch_norms(model))
    resolve_num_micro_batches(config.train, world_size, has_batch_norm=has_batch_norm)


def check_lines(path: Path, array: str, arguments: list[str], world_size: int) -> None:
    """Raise UserError if a sweep's file cannot be read, lacks a line, or a line makes no run of so many ranks."""
    try:
        content = (ROOT / path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        expected = "Use 'seeds', or a file with one line of flags per run"
        raise UserError(f"--sweep {path} cannot be read: {error}. {expected}.") from None
    lines = [line.rstrip("\r") for line in content.removesuffix("\n").split("\n")] if content else []  # as sed does
    check_array(path, len(lines), array)
    for number, line in enumerate(lines, 1):
        if "\\" in line or not line.replace("\t", " ").isprintable():  # xargs, which the job uses, reads them otherwise
            raise UserError(f"{path}, line {number} has a backslash or a control character. Leave it out.")
        try:
            check_world(parse([*arguments, *shlex.split(line)]), world_size)
        except ValueError as error:  # shlex's, or a UserError
            raise UserError(f"{path}, line {number}: {error}") from None


def early_signal(extra: list[str]) -> list[str]:
    """Return the option that has a short job save in the last fifth of its time, unless a signal is asked for."""
    given = [found[1] for word in extra if (found := re.fullmatch("(?:-t|--time=)(.*)", word))]
    if not given or "SBATCH_SIGNAL" in os.environ or any(word.startswith("--signal") for word in extra):
        return []
    try:
        minutes = parse([f"--run.time_limit={given[-1]}"]).run.time_limit  # it is written as Slurm's times are
    except UserError:  # UNLIMITED, or nothing that sbatch takes
        return []
    return [f"--signal=USR2@{math.ceil(minutes * 60 / 5)}"] if 0 < minutes <= SHORT_MINUTES else []


def command(options: argparse.Namespace, extra: list[str], arguments: list[str]) -> list[str]:
    """Return the sbatch command line."""
    least, most = node_range(options.nodes)
    asked = [name for name in RANKS if getattr(options, name) not in (None, "0")]
    if least < most and options.ntasks_per_node == 1:
        asked.remove("ntasks_per_node")  # with it Slurm gives the least number of nodes
    if least == most and not asked:
        asked, options.ntasks_per_node = ["ntasks_per_node"], 1
    nodes = options.nodes or (None if asked[0] in TOTALS else "1")
    words = ["--nodes", nodes] if nodes else []
    for name in asked:
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    words += ["--array", options.array] if options.array else []
    words += ["--no-kill"] if least < most else []
    script = ["slurm/sweep.sbatch", options.sweep] if options.sweep else ["slurm/train.sbatch"]
    script += [f"--min-nodes={least}"] if least < most else []
    return ["sbatch", "--parsable", *words, *extra, *early_signal(extra), *script, *arguments]


def run(*argv: str) -> str:
    """Run a command in the project's directory with the site's settings. Raises UserError if it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in KEPT}
    done = subprocess.run(("bash", "-c", SITE, "bash", *argv), cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"{argv[0]} failed: {message}")
    return done.stdout.strip()


def print_new(log: Path, position: int) -> int:
    """Print what a log holds after `position`; return its end."""
    if not log.exists():
        return position
    with open(log, errors="replace") as file:
        file.seek(position)
        print(file.read(), end="", flush=True)
        return file.tell()


def follow(job: str) -> int:
    """Print the log and each new state until the job ends or is held; return its exit code."""
    shown, position, answered_at = "", 0, time.monotonic()
    while True:
        try:
            text = run("scontrol", "show", "job", "-o", job)
        except UserError as error:  # a controller that is being restarted
            if time.monotonic() - answered_at > PATIENCE_SECONDS:
                print(f"job {job} continues, but cannot be followed: {error}", file=sys.stderr)
                return LOST
            time.sleep(POLL_SECONDS)
            continue
        answered_at, fields = time.monotonic(), dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", text))
        state, reason = fields["JobState"], fields["Reason"]
        position = print_new(Path(fields.get("StdOut", "/dev/null")), position)
        now = f"{state} ({reason}) {fields.get('NodeList', '')}".replace("(None) ", "").replace("(null)", "")
        if now != shown:
            print(f"{time.strftime('%H:%M:%S')} job {job}: {now}", flush=True)
            shown = now
        if ENDED.fullmatch(state) or "held" in reason.lower():
            code = int(fields["ExitCode"].split(":")[0])
            return code or (FINISHED if state == "COMPLETED" else CRASHED)
        time.sleep(POLL_SECONDS)


def main(argv: list[str]) -> int:
    """Submit; return 0, LOST, INTERRUPTED, or the exit code of a job that was followed."""
    own, arguments = split_arguments(argv)
    options, extra = make_parser().parse_known_args(own)
    if stray := [word for word in extra if not word.startswith("-")]:
        usage = "Pass sbatch options as --name=value and training options after `--`"
        raise UserError(f"unexpected argument: {stray[0]!r}. {usage}.")
    config = parse(arguments)
    if options.print_run:
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("--print-run is for the job: SLURM_JOB_ID is not set.")
        job = os.environ["SLURM_JOB_ID"]
        folder = f"sweep-{os.environ['SLURM_ARRAY_JOB_ID']}" if options.sweep else ""
        print(Path(config.run.dir, folder, run_name(config, arguments, job)))
        return FINISHED
    check_options(options, extra)
    if options.sweep and options.sweep != "seeds":
        check_lines(Path(options.sweep), options.array, arguments, count_ranks(options))
    check_world(config, count_ranks(options))
    sbatch = command(options, extra, arguments)
    if options.dry_run:
        print(shlex.join(sbatch))
        return FINISHED
    run(sbatch[0], "--test-only", *sbatch[2:])
    job = run(*sbatch).split(";")[0]
    log = ROOT / (f"slurm-{job}_*.log" if options.sweep else f"slurm-{job}.log")
    place = Path(config.run.dir, f"sweep-{job}" if options.sweep else run_name(config, arguments, job))
    print(f"job {job}: squeue -j {job}; log {log}; run {place}; scancel {job} ends it", flush=True)
    if not options.follow:
        return FINISHED
    try:
        return follow(job)
    except KeyboardInterrupt:
        print(f"job {job} continues", file=sys.stderr)
        return INTERRUPTED
