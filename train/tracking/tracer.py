"""Write a trace of some steps by torch.profiler (`train.profile_steps A:B`), which ui.perfetto.dev opens.

Only rank 0 is traced. The profiler's own start and end do not count as training time. All ranks count the traced steps,
since they read their results together before and after them.
"""

import torch

from train.config import TrainConfig, read_steps
from train.rundir import replacing
from train.storage.lease import Lease


class Tracer:
    """The profiler on rank 0, from its first step to its last. On other ranks, only the count of these steps."""

    def __init__(self, config: TrainConfig, lease: Lease, *, is_main: bool) -> None:
        wanted = config.profile_steps
        self.first, self.last = read_steps("train.profile_steps", wanted) if wanted else (-1, -1)
        self.lease = lease
        self.profiler = torch.profiler.profile() if wanted and is_main else None
        self.is_running = False

    def should_start(self, step: int) -> bool:
        """Return whether the trace must start now, after `step` updates. A run that resumes later has none."""
        return step == self.first

    def start(self) -> None:
        """Start the trace."""
        self.is_running = True
        if self.profiler is not None:
            self.profiler.start()

    def should_stop(self, step: int, *, is_last: bool = False) -> bool:
        """Return whether a trace runs and `step` is its last update, or the run's last."""
        return self.is_running and (is_last or step == self.last)

    def write(self, step: int) -> str:
        """End the trace, and write it on rank 0. Return the line to print."""
        self.is_running = False
        if self.profiler is None:
            return ""
        self.profiler.stop()
        path = self.lease.run_dir.trace
        try:
            with self.lease.writing() as staging, replacing(path, staging) as temporary:
                self.profiler.export_chrome_trace(str(temporary))
        except OSError as error:
            return f"warning: {path} cannot be written: {error.strerror}. Training continues."
        return f"steps {self.first + 1} to {step} of rank 0 are traced in {path}. Open it in ui.perfetto.dev."
