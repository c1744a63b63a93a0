"""``conceptkit …``: sample, decompose, verify, benchmarks and the demo, from a terminal. One module a family of commands."""

from importlib import import_module

from .frame import app, main

__all__ = ["app", "main"]

FAMILIES = ("sample", "decompose", "edit", "demo", "bench")
"""The modules that add commands to ``app`` when they are imported, in the order in which ``conceptkit --help`` lists them."""

for _family in FAMILIES:
    import_module(f".{_family}", __name__)
