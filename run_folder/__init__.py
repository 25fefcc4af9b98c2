"""The folder that a training run writes: its layout, settings, checkpoints, metrics and curves."""
