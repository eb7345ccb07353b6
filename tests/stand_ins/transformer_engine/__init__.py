"""What Megatron-Core uses of Transformer Engine, in plain torch: the class layout, the parameters' names and their
marks, for tests on machines without it. No kernel of its own and one rank only."""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "1.4.0"
