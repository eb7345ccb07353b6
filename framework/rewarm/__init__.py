"""rewarm: distributed continual pre-training of large language models.

The package root imports nothing heavy: ``rewarm --help`` must answer without loading torch.
"""

from rewarm.versions import __version__

__all__ = ["__version__"]
