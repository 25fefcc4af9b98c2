"""What `-dry_run` prints: the run that the settings would start, its cost, and likely mistakes in it."""
