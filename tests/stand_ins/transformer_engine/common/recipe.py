"""See the package."""


class DelayedScaling:
    """A base class; fp8 is not stood in for."""
