"""Multi-task learning with a shared trunk, task heads, and freezes that are declared, enforced and proven."""

__version__ = "0.1.0"
