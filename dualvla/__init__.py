"""DualVLA: the method. Knows torch and numpy, never Ray (importing this package loads neither)."""

__version__ = "0.1.0"
