"""gossamer: deep learning on a budget."""

__version__ = "0.1.0"
