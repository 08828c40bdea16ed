"""Checks: of this machine, of a cluster, and of what runs have computed."""
