"""Who this process is and what it does with the others: ranks, devices, reductions, signals, clocks. No files."""
