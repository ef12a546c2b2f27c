"""aquarl: distributed reinforcement learning of a small GPT on algebra word problems."""

__version__ = "0.1.0"
