"""What outlives a process: data sets and their cache, checkpoints, and the lease on a run directory.

Here is the code that must survive a crash at any moment: it verifies what it reads and replaces files only as a
whole. What a run reports about itself (rows, W&B, alarms) belongs in `tracking/`, and the names of a run's files in
`rundir.py`.
"""
