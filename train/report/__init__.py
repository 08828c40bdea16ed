"""Run directories as one HTML page. Needs no torch: only what a run has written."""
