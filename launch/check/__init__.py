"""Checks: of a machine or a cluster before a training, and of what trainings have computed.

A module belongs here if its answer is that something holds or does not: `doctor`, `selftest`, `compare` and `replay`.
Checks of the code itself are tests.
"""
