"""Training: the parts of a run, its loop, and the state from which it resumes."""
