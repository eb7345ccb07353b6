"""The extensions that DeepSpeed compiles at run time: built once, before they are needed, and never waited for in vain.

torch guards a build with a file named ``lock``. A build that is killed leaves it, and every later load waits for it for
ever. Builds here run in a process of their own under a time limit, one at a time on a machine, and a lock that nobody
holds is removed. No torch in this module.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from rewarm.config.deepspeed import DeepSpeedConfig
from rewarm.errors import UserError

_BUILDERS = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder"}
_LOADED_FIRST = {"async_io": ("pin_memory",)}
"""Extensions that another one loads, and builds, by itself."""
_END_SECONDS = 10.0
_LOAD_SECONDS = 30.0
"""A load of what is built holds torch's lock for a moment; an older lock belongs to a process that is gone."""


def needed_extensions(settings: DeepSpeedConfig) -> list[str]:
    """Names of the extensions that a configuration uses."""
    return ["cpu_adam"] * settings.needs_cpu_adam + ["async_io"] * settings.needs_async_io


def extensions_folder(settings: DeepSpeedConfig) -> Path:
    """Where they are kept: apart for each version, for each CPU since they are compiled for the one at hand, and for
    each compiler and environment, since another one's command line would compile them again on every rank."""
    base = settings.extensions_folder or str(Path.home() / ".cache" / "rewarm" / "deepspeed")
    place = "\n".join((_cpu(), os.environ.get("CXX", ""), sys.prefix))
    digest = hashlib.blake2b(place.encode(), digest_size=4).hexdigest()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return Path(base) / f"{python}-torch{version('torch')}-deepspeed{version('deepspeed')}-{digest}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def check_compiler(settings: DeepSpeedConfig) -> None:
    """Refuse a configuration whose extensions are not built and cannot be.

    Raises:
        UserError: naming what is missing.
    """
    for name in needed_extensions(settings):
        if is_built(name, settings):
            continue
        compiler = os.environ.get("CXX", "c++")
        for tool, package in ((compiler, "g++"), ("ninja", "ninja-build")):
            if not _has_tool(tool):
                raise UserError(
                    f"{_reason(name)} needs DeepSpeed's {name} extension, which is compiled at first use, but there is "
                    f"no {tool} here",
                    fix=f"install {package}, or do without: deepspeed.offload_ratio=1 and no offload to nvme",
                )


def _has_tool(tool: str) -> bool:
    return shutil.which(tool) is not None or (Path(sys.executable).parent / tool).is_file()


def _reason(name: str) -> str:
    return "deepspeed.offload_ratio below 1" if name == "cpu_adam" else "offload to nvme"


def is_built(name: str, settings: DeepSpeedConfig) -> bool:
    """True if an extension only has to be loaded."""
    folder = extensions_folder(settings)
    return all((folder / part / f"{part}.so").is_file() for part in (name, *_LOADED_FIRST.get(name, ())))


def prepare_extensions(settings: DeepSpeedConfig) -> None:
    """Build what is missing, remove stale locks, and point this process and its children to the result.

    Safe to call from several processes of a machine; one builds, the others wait.

    Raises:
        UserError: if a build fails or takes longer than ``build_timeout``.
    """
    names = needed_extensions(settings)
    if not names:
        return
    check_compiler(settings)
    folder = extensions_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), tools]))
    with (folder / ".building").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for name in names:
            _remove_stale_locks(folder, is_built(name, settings))
            if not is_built(name, settings):
                _build(name, folder, settings.build_timeout)


def _remove_stale_locks(folder: Path, built: bool) -> None:
    """Whoever builds holds the guard, so while it is ours a lock is a leftover, or of a load that takes a moment."""
    for lock in folder.glob("*/lock"):
        while built and lock.exists() and time.time() - lock.stat().st_mtime < _LOAD_SECONDS:
            time.sleep(0.2)
        lock.unlink(missing_ok=True)


_BUILD = """
import ctypes, os, signal, sys
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.killpg(0, signal.SIGTERM)
signal.signal(signal.SIGTERM, end)
set_parent_death_signal = 1
ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
if os.getppid() != int(sys.argv[2]):
    sys.exit(1)
from deepspeed.ops import op_builder
getattr(op_builder, sys.argv[1])().load(verbose=False)
"""
"""The build and its compilers end with whoever asked for it: the next one, seeing the guard free, would build into the
same folder at the same time. Compilers are in process groups of their own, which only ninja knows and ends, if it is
asked and not killed."""


def _build(name: str, folder: Path, minutes: float) -> None:
    print(f"compiling DeepSpeed's {name} extension into {folder}: once, it takes a minute or two ...", file=sys.stderr)
    process = subprocess.Popen(
        [sys.executable, "-c", _BUILD, _BUILDERS[name], str(os.getpid())],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=minutes * 60)
    except BaseException as error:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        (folder / name / "lock").unlink(missing_ok=True)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise UserError(
            f"compiling DeepSpeed's {name} extension took more than deepspeed.build_timeout={minutes:g} minutes",
            fix="set it higher; on a busy machine a build can take long",
        ) from error
    if process.returncode:
        (folder / name / "lock").unlink(missing_ok=True)
        raise UserError(
            f"DeepSpeed's {name} extension, which {_reason(name)} needs, cannot be compiled: {_cause(output)}",
            fix="install libaio-dev (libaio-devel)" if name == "async_io" else "see the compiler's message above",
        )


def _cause(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1]
