"""What the settings in config.py have to satisfy beyond the limits of each key."""
