"""What a run tells about itself while it runs: metrics, W&B, alarms, traces. Nothing here can change the training."""
