"""The HTTP service of serve.py: requests, limits, the page, and the worker processes that compute."""
