"""Measurements of speed, each with its command, number of repetitions and hardware.

A module belongs here if its figures depend on the machine. No test judges by them.
"""
