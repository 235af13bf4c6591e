"""Tidepool: one pool of GPUs that trains and serves, on Ray."""

__version__ = "0.1.0"
