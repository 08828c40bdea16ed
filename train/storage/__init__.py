"""What outlives a process: data sets, checkpoints and the lease on a run directory."""
