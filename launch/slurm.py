"""`python -m launch slurm`: check a training, submit it to Slurm, follow it.

No job is queued that would fail on a typo: the config is parsed, the ranks must be able to share the batch, and the
request passes `sbatch --test-only`. Arguments are passed as a list, never through a shell's parser. The job itself is
slurm/train.sbatch.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from train.cli import Parser, parse, run_name, split_arguments
from train.config import Config
from train.errors import CRASHED, FINISHED, UserError

ROOT = Path(__file__).parent.parent
SITE = 'if [ -f slurm/site.env ]; then set -a; . slurm/site.env >&2; set +a; fi; exec "$@"'  # its SBATCH_* reach sbatch
POLL_SECONDS, PATIENCE_SECONDS = 1.0, 120.0
LOST, INTERRUPTED = 3, 130  # exit codes: the job was submitted and can no longer be followed; Ctrl-C
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED")


def make_parser() -> Parser:
    """Build the command line."""
    parser = Parser(
        prog="python -m launch slurm",
        usage="%(prog)s [OPTIONS] [SBATCH OPTIONS] -- TRAIN ARGUMENTS",
        description="Check a training and submit it. Options that are not listed go to sbatch: --time, --partition, "
        "--signal=USR2@600, --requeue, --no-requeue, --mem=0, ... Write those with a value as --name=value.",
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default 1)")
    gpus = "GPUs and ranks per node; 0: CPU ranks (default 0)"
    parser.add_argument("--gpus-per-node", type=int, default=0, help=gpus)
    parser.add_argument("--ntasks-per-node", type=int, default=1, help="CPU ranks per node (default 1)")
    sweep = "'seeds', or a file with one line of flags per run; needs --array, such as --array=1-5%%2"
    parser.add_argument("--sweep", help=sweep)
    parser.add_argument("--dry-run", action="store_true", help="print the command and do not submit")
    parser.add_argument("--follow", action="store_true", help="show the log and the job's states until it ends")
    for_the_job = "check the arguments, print the run's directory (for the job)"
    parser.add_argument("--print-run", action="store_true", help=for_the_job)
    return parser


def check_options(options: Namespace, extra: list[str]) -> None:
    """Raise UserError if an option has a value that makes no job."""
    for name, least in (("nodes", 1), ("ntasks_per_node", 1), ("gpus_per_node", 0)):
        value = getattr(options, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}. Use {least} or more.")
    has_array = any(word.startswith("--array=") for word in extra)
    if options.sweep and not has_array:
        raise UserError("--sweep needs --array=FIRST-LAST, such as --array=1-5%2.")
    if options.sweep and options.follow:
        raise UserError("--sweep cannot be followed: each of its tasks has its own log. Drop --follow.")


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


def check_lines(path: Path, arguments: list[str]) -> None:
    """Raise UserError if a sweep's file cannot be read or one of its lines makes no config."""
    try:
        lines = (ROOT / path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        expected = "Use 'seeds', or a file with one line of flags per run"
        raise UserError(f"--sweep {path} cannot be read: {error}. {expected}.") from None
    for number, line in enumerate(lines, 1):
        try:
            parse([*arguments, *shlex.split(line)])
        except ValueError as error:  # shlex's, or a UserError
            raise UserError(f"{path}, line {number}: {error}") from None


def command(options: Namespace, extra: list[str], arguments: list[str]) -> list[str]:
    """Return the sbatch command line."""
    kind = "gpus" if options.gpus_per_node else "ntasks"
    ranks = [f"--{kind}-per-node", str(options.gpus_per_node or options.ntasks_per_node)]
    script = ["slurm/sweep.sbatch", options.sweep] if options.sweep else ["slurm/train.sbatch"]
    return ["sbatch", "--parsable", "--nodes", str(options.nodes), *ranks, *extra, *script, *arguments]


def run(*argv: str) -> str:
    """Run a command in the project's directory with the site's settings. Raises UserError if it fails."""
    done = subprocess.run(("bash", "-c", SITE, "bash", *argv), cwd=ROOT, capture_output=True, text=True)
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


def follow(job: str, log: Path) -> int:
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
        answered_at, fields = time.monotonic(), dict(re.findall(r"(\S+?)=(\S*)", text))
        state, reason = fields["JobState"], fields["Reason"]
        position = print_new(log, position)
        now = f"{state} ({reason}) {fields.get('NodeList', '')}".replace("(None) ", "").replace("(null)", "")
        if now != shown:
            print(f"{time.strftime('%H:%M:%S')} job {job}: {now}", flush=True)
            shown = now
        if state not in ACTIVE or "held" in reason.lower():
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
        print(Path(config.run.dir) / run_name(config, arguments, os.environ["SLURM_JOB_ID"]))
        return FINISHED
    check_options(options, extra)
    if options.sweep and options.sweep != "seeds":
        check_lines(Path(options.sweep), arguments)
    check_world(config, options.nodes * (options.gpus_per_node or options.ntasks_per_node))
    sbatch = command(options, extra, arguments)
    if options.dry_run:
        print(shlex.join(sbatch))
        return FINISHED
    run(sbatch[0], "--test-only", *sbatch[2:])
    job = run(*sbatch).split(";")[0]
    log = ROOT / (f"slurm-{job}_*.log" if options.sweep else f"slurm-{job}.log")
    place = f"runs/sweep-{job}" if options.sweep else str(Path(config.run.dir) / run_name(config, arguments, job))
    print(f"job {job}: squeue -j {job}; log {log}; run {place}; scancel {job} ends it", flush=True)
    if not options.follow:
        return FINISHED
    try:
        return follow(job, log)
    except KeyboardInterrupt:
        print(f"job {job} continues", file=sys.stderr)
        return INTERRUPTED
