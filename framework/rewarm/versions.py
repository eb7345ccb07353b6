"""Version of the package and the one place where the ranges of what it stands on are raised.

``setup.py`` executes this file without importing the package, so it must import only the standard library.
"""

from __future__ import annotations

__version__ = "0.1.0"

# The upper bounds are what was tried. torch stays below 2.14 so that one line resolves to a CPU build where the
# index offers one and to a CUDA build elsewhere. Megatron-Core's private names are touched in several files of
# engine/megatron/ and in no other folder; engine/megatron/compat.py calls require() before any of them.
REQUIREMENTS: dict[str, str] = {
    "torch": ">=2.6,<2.14",
    "megatron-core": ">=0.16.1,<0.17",
    "deepspeed": ">=0.19.8,<0.20",
    "transformers": ">=4.57,<6",
    "tokenizers": ">=0.22",
    "safetensors": ">=0.5",
    "datasets": ">=3.0",
    "wandb": ">=0.19",
    "numpy": ">=1.26",
    "scipy": ">=1.11",
    "pydantic": ">=2.9,<3",
    "pyyaml": ">=6.0",
    "typer": ">=0.15",
    "rich": ">=13.7",
    "zstandard": ">=0.22",
    "pyarrow": ">=15",
    "matplotlib": ">=3.8",
}
"""Distribution name -> accepted versions of everything that ``pip install rewarm`` installs."""


def requirement_lines() -> list[str]:
    """The ``install_requires`` lines, in the order of :data:`REQUIREMENTS`."""
    return [name + spec for name, spec in REQUIREMENTS.items()]


def require(distribution: str) -> str:
    """Check that an installed distribution is inside the range it was tried with.

    Called where private names of that distribution are touched.

    Args:
        distribution: a key of :data:`REQUIREMENTS`.

    Returns:
        The installed version.

    Raises:
        rewarm.errors.UserError: if it is missing or outside its range, naming both and the command that installs it.
    """
    from importlib.metadata import PackageNotFoundError, version

    from packaging.specifiers import SpecifierSet

    from rewarm.errors import UserError

    spec = REQUIREMENTS[distribution]
    fix = f"run: pip install '{distribution}{spec}'"
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise UserError(f"{distribution} is not installed", fix=fix) from None
    if not SpecifierSet(spec).contains(found, prereleases=True):
        raise UserError(f"{distribution} {found} is outside {spec}, the range this version was tried with", fix=fix)
    return found
