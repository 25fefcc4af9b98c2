"""Compatibility: `load_weights` is in port_weights/load.py. New code should import it from there."""
from port_weights.load import load_weights

__all__ = ['load_weights']
