"""The library behind the nodes: it runs without ComfyUI."""

__version__ = "0.1.0"
