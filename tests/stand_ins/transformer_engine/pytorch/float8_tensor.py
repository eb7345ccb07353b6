"""See the package."""


class Float8Tensor:
    """No tensor is one."""
