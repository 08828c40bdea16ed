"""Measurements of speed, each with its command, number of repetitions and hardware."""
