"""What is done with a trained model: export it to a file, and predict with it.

A module belongs here if it needs the weights of a run but not its training.
"""
