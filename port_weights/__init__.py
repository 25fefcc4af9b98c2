"""Reads and converts weights of PyTorch, safetensors and Paddle; `python port_weights/convert.py -h`."""
