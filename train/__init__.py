"""Lockstep: the program that every rank runs.

`(config, step)` determines everything; ranks only decide who computes it.
"""

__version__ = "0.3.0"
