"""The command line."""

from mtl.cli.program import main

__all__ = ["main"]
