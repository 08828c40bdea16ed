"""The program that a person runs: it starts, describes and compares trainings. torch is imported in functions."""
