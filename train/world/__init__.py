"""The ranks: which one this process is, and what all of them do together.

This room holds ranks and devices, the process group, the sum of the gradients, signals, clocks and the watchdog. A
module belongs here if it depends on the rank, the launcher or the machine. What a step computes does not belong here,
nor do the files of a run, except the records by which a watchdog finds out about the other ranks.
"""
