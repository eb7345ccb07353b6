"""Installs the package from ``framework/`` and compiles ``csrc/``; see pyproject.toml for the tools.

``python setup.py build_ext --inplace`` compiles into a source tree. The libraries are optional: without a compiler the
package installs and warns at run time. ``CXX`` names the C++ compiler, ``REWARM_CUDA_ARCHS`` (``80;90a;100``) the GPU
architectures; the CUDA library is built where ``nvcc`` is found, for those of them that this ``nvcc`` knows.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
VERSIONS = runpy.run_path(str(ROOT / "framework" / "rewarm" / "versions.py"))
NATIVE = runpy.run_path(str(ROOT / "framework" / "rewarm" / "kernels" / "native.py"))
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2"]
# Contraction is off because the update must round alike on every instruction set (csrc/common/adamw.h).
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=default",
    "-Wall",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--cudart", "static"]


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME, else of PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def compile_command(name: str, sources: list[str], output: str, architectures: list[str] | None = None) -> list[str]:
    """The one compiler call that makes a library; ``architectures`` None means those that fit."""
    build = f'-DREWARM_BUILD="{VERSIONS["__version__"]} {NATIVE["source_digest"](ROOT / "csrc")}"'
    if name.endswith("cpu"):
        return [os.environ.get("CXX", "g++"), *CXX_FLAGS, build, *sources, "-o", output]
    architectures = cuda_architectures() if architectures is None else architectures
    # The PTX of the lowest architecture lets the driver serve those that are not named.
    lowest = min(map(number, architectures))
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    targets.append(f"-gencode=arch=compute_{lowest},code=compute_{lowest}")
    escaped = build.replace('"', '\\"')
    return [find_nvcc() or "nvcc", *NVCC_FLAGS, *targets, escaped, *sources, "-o", output]


def number(architecture: str) -> int:
    """90 of ``90a``."""
    return int(architecture.rstrip("af"))


def wanted_architectures() -> list[str]:
    """Of ``REWARM_CUDA_ARCHS``, written as here, as nvcc does (``sm_80``) or as torch does (``8.0 9.0``)."""
    text = os.environ.get("REWARM_CUDA_ARCHS", "").strip() or "80;90a;100"
    found = []
    for name in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(?:sm_|compute_)?(?:(\d{2,3})|(\d{1,2})\.(\d))([af]?)", name)
        if match is None:
            raise SystemExit(f"REWARM_CUDA_ARCHS={text}: {name!r} is no architecture; write numbers such as 80;90a;100")
        found.append((match[1] or match[2] + match[3]) + match[4])
    return list(dict.fromkeys(found))


def known_architectures() -> set[int]:
    """What this nvcc lists; empty if it cannot say (before CUDA 11)."""
    try:
        command = [find_nvcc() or "nvcc", "--list-gpu-arch"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {int(found) for found in re.findall(r"compute_(\d+)", listed)}


def cuda_architectures() -> list[str]:
    """Those that are wanted and that this nvcc knows; if it knows none of them, the newest of its own.

    The driver compiles the PTX of an older architecture for a newer GPU, so that every choice runs on all later ones.
    """
    wanted, known = wanted_architectures(), known_architectures()
    chosen = [name for name in wanted if not known or number(name) in known]
    return leave_out([name for name in wanted if name not in chosen], chosen or [str(max(known))])


def leave_out(names: list[str], rest: list[str]) -> list[str]:
    """Say what is left out, and return the rest."""
    if names:
        print(
            f"warning: {find_nvcc() or 'nvcc'} does not know GPU architecture {', '.join(names)}: left out of the CUDA "
            f"library, which is compiled for {', '.join(rest)}; REWARM_CUDA_ARCHS names others",
            file=sys.stderr,
        )
    return rest


class PlainLibraries(build_ext):
    """Compiles each extension with one compiler call into a library without Python's name suffix or symbols."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        architectures = cuda_architectures() if ext.name.endswith("cuda") else []
        while True:
            command = compile_command(ext.name, ext.sources, str(output), architectures)
            try:
                subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
                return
            except (OSError, subprocess.CalledProcessError) as error:
                detail = (getattr(error, "stderr", "") or str(error)).strip()
                # A list may be longer than what works: that of an nvcc which knows 90 but not yet 90a.
                unknown = re.search(r"[Uu]nsupported gpu architecture '(?:compute|sm)_(\w+)'", detail)
                rest = [name for name in architectures if unknown is not None and name != unknown[1]]
                if unknown is None or not rest or rest == architectures:
                    first = detail.splitlines()[0]
                    raise CompileError(
                        f"{ext.name} was not compiled ({first}): slower fallbacks will be used"
                    ) from error
                architectures = leave_out([unknown[1]], rest)


def libraries() -> list[Extension]:
    """One library for the CPU, and one for CUDA where its compiler is found."""
    found = []
    for kind, pattern, wanted in (("cpu", "*.cpp", True), ("cuda", "*.cu", find_nvcc() is not None)):
        sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / kind).glob(pattern))
        if wanted and kind == "cuda":
            wanted_architectures()  # a mistake in them ends the installation, not only this library
        if wanted and sources:
            found.append(Extension(f"rewarm._native.librewarm_{kind}", sources, optional=True))
    return found


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
    package_data={"rewarm": ["py.typed", "launch/job.sh"]},
    ext_modules=libraries(),
    cmdclass={"build_ext": PlainLibraries},
    install_requires=VERSIONS["requirement_lines"](),
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "tensorboard>=2.17",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.13",
            "types-PyYAML",
            *DOCS,
        ],
        "docs": DOCS,
        "tensorboard": ["tensorboard>=2.17"],
    },
    entry_points={"console_scripts": ["rewarm=rewarm.__main__:main"]},
)
