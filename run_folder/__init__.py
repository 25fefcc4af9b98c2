"""The folder of a run: the names in it, its checkpoints, metrics and curves."""
