"""Weights of RepLKNet from and to other frameworks; `python port_weights/convert.py -h`."""
