"""What a run reports: rows, W&B, warnings, fingerprints, traces and the summary.

A module belongs here if it tells people about the training and reads the plan and the state to do so. Nothing here
decides what a step computes, and no failure to report ends a run.
"""
