"""`train.profile_steps A:B`: torch.profiler over a stretch of steps, as a trace that ui.perfetto.dev opens.

Rank 0 alone is traced: it is the one that writes. What the profiler costs at start and end does not count as training. All
ranks know which steps are traced, since they read results together before and after.
"""

import torch

from train.config import TrainConfig, read_steps
from train.rundir import RunDir, replacing
from train.storage.lease import Lease


class Tracer:
    """Starts the profiler before its first step and writes the trace after its last, on rank 0; on others it only counts."""

    def __init__(self, config: TrainConfig, lease: Lease, *, is_main: bool) -> None:
        wanted = config.profile_steps
        self.first, self.last = read_steps("train.profile_steps", wanted) if wanted else (-1, -1)
        self.lease = lease
        self.profiler = torch.profiler.profile() if wanted and is_main else None
        self.began: int | None = None  # after this step

    def should_start(self, step: int) -> bool:
        """Whether to begin before the update after `step` updates."""
        return self.began is None and self.first <= step < self.last

    def start(self, step: int) -> None:
        """Begin to trace after `step` updates."""
        self.began = step
        if self.profiler is not None:
            self.profiler.start()

    def should_stop(self, step: int, *, is_last: bool = False) -> bool:
        """Whether update `step` was the last that is wanted, or the run's last, and a trace has begun."""
        return self.began is not None and self.last > 0 and (is_last or step == self.last)

    def write(self, step: int) -> str:
        """End; on rank 0 write the trace. Return what to say."""
        self.last = 0
        if self.profiler is None:
            return ""
        self.profiler.stop()
        path = RunDir(self.lease.run_dir).trace
        try:
            with self.lease.writing() as staging, replacing(path, staging) as temporary:
                self.profiler.export_chrome_trace(str(temporary))
        except OSError as error:
            return f"warning: {path} cannot be written: {error.strerror}. Training goes on."
        assert self.began is not None
        return f"steps {self.began + 1} to {step} of rank 0 are traced in {path}: open it in ui.perfetto.dev"
