"""Installs the package from ``framework/`` and builds the C library in ``csrc/``; see pyproject.toml for the tools."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSIONS = runpy.run_path(str(ROOT / "framework" / "rewarm" / "versions.py"))

setup(
    name="rewarm",
    version=VERSIONS["__version__"],
    description="Distributed continual pre-training of large language models",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "framework"},
    packages=find_packages("framework"),
    package_data={"rewarm": ["py.typed"]},
    install_requires=VERSIONS["requirement_lines"](),
    extras_require={
        "test": ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.8", "mypy>=1.13", "types-PyYAML"],
        "tensorboard": ["tensorboard>=2.17"],
    },
    entry_points={"console_scripts": ["rewarm=rewarm.cli.main:main"]},
)
