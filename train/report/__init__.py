"""Run directories as one HTML page.

A module belongs here if it works on the files of a run alone, after or during the training. It needs no torch and no
data set, and it computes nothing again: what the page says, the run has recorded.
"""
