"""Reinforced Token Optimization (arXiv 2404.18922) on Megatron-Core."""

__version__ = "0.1.0"
