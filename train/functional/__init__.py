"""Pure functions from (config, step) to numbers: order, random numbers, augmentation, models, optimizer, step tables.

Everything here gives the same result for the same arguments, on any rank and at any time. Nothing here communicates
with other ranks, reads or writes a file, looks at the clock or draws from a global random generator. Those belong in
`world/`, `storage/` and `tracking/`.
"""
