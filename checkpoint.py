"""Kept for code that imports `load_weights` from here, where it was before; new code takes `port_weights.load`."""
from port_weights.load import load_weights

__all__ = ['load_weights']
