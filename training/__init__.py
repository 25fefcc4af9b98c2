"""How a run trains: its parts, its loop, and its state to resume from."""
