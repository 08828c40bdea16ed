"""The program that a person runs: it starts, describes and compares trainings, and imports torch only inside functions."""
