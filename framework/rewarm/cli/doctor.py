"""``rewarm doctor``: what this machine has, what is broken, and what will be slow and why."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

import typer

GIB = 2**30
ESSENTIAL = frozenset(
    {"torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "pyyaml", "typer",
     "rich"}
)  # fmt: skip
"""Packages without which ``rewarm train`` cannot start."""


class Level(StrEnum):
    """How bad a finding is; only ``broken`` changes the exit status."""

    OK = "ok"
    NOTE = "note"
    SLOW = "slow"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    subject: str
    level: Level
    detail: str
    fix: str | None = None


def doctor() -> None:
    """Look at this machine and this installation: versions, devices, compilers, limits, and what will be slow and why.

    Exit status 1 if something essential is broken. Under torchrun or srun, every rank reports its own node.

    [bold]Examples[/bold]

        rewarm doctor

        srun --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=1 rewarm doctor
    """
    from rich.console import Console
    from rich.table import Table

    found = list(examine())
    table = Table(title=f"rewarm doctor on {socket.gethostname()}", title_justify="left", show_lines=False)
    for heading in ("subject", "", "what was found"):
        table.add_column(heading)
    styles = {Level.OK: "green", Level.NOTE: "cyan", Level.SLOW: "yellow", Level.BROKEN: "bold red"}
    for finding in found:
        table.add_row(finding.subject, f"[{styles[finding.level]}]{finding.level}[/]", finding.detail)
    console = Console()
    console.print(table)
    for finding in found:
        if finding.fix is not None:
            text = f"{finding.level}: {finding.subject}: {finding.fix}"
            console.print(text, style=styles[finding.level], markup=False, highlight=False, soft_wrap=True)
    broken = [finding.subject for finding in found if finding.level is Level.BROKEN]
    console.print(f"broken: {', '.join(broken)}" if broken else "nothing is broken", highlight=False)
    if broken:
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Every finding about this machine, in the order of the report."""
    from rewarm.engine.threads import LoadWatch, cpu_quota
    from rewarm.versions import REQUIREMENTS

    watch = LoadWatch()

    yield Finding("python", Level.OK, f"{sys.version.split()[0]} at {sys.executable}")
    yield from packages(REQUIREMENTS)
    has_gpu = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if find_spec("torch") is not None:
        yield from devices(has_gpu)
    yield from imports(["megatron.core"])
    yield from accelerated_libraries(has_gpu)
    yield from compilers(has_gpu)
    yield from native_libraries(has_gpu)
    yield from cores(os.environ, len(os.sched_getaffinity(0)), cpu_quota(), watch.busy(), os.getloadavg()[0])
    yield memory()
    yield ranks(os.environ)
    yield host_name()
    yield from disks(Path.cwd(), Path(tempfile.gettempdir()))
    yield from limits(has_gpu)
    yield tracking()


def packages(requirements: Mapping[str, str]) -> Iterator[Finding]:
    """Installed versions against the accepted ranges; what is in range shares one line."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.specifiers import SpecifierSet

    good = []
    for name, spec in requirements.items():
        level = Level.BROKEN if name in ESSENTIAL else Level.NOTE
        fix = f"pip install '{name}{spec}'"
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, level, f"not installed; accepted: {spec}", fix)
            continue
        if SpecifierSet(spec).contains(found, prereleases=True):
            good.append(f"{name} {found}")
        else:
            yield Finding(name, level, f"{found} is outside {spec}, the range this version was tried with", fix)
    if good:
        yield Finding("packages", Level.OK, ", ".join(good))


def devices(has_gpu: bool) -> Iterator[Finding]:
    """What torch can compute on. ``has_gpu``: the machine shows an NVIDIA driver, whatever torch says."""
    try:
        import torch
    except Exception as error:  # a broken binary raises anything from OSError to ImportError
        yield Finding("torch", Level.BROKEN, f"cannot be imported: {error}", "reinstall torch for this platform")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, compute capability {capability}"
            slow = "set precision=float32" if properties.major < 8 else None
            detail = text if slow is None else f"{text}: no bfloat16 units"
            yield Finding(f"gpu {index}", Level.SLOW if slow else Level.OK, detail, slow)
    elif has_gpu and torch.version.cuda is None:
        fix = "install a CUDA build of torch, see https://pytorch.org/get-started/locally"
        yield Finding("gpu", Level.SLOW, f"there is one, but torch {torch.__version__} is a CPU build", fix)
    elif has_gpu:
        fix = "update the driver, or install a torch built for an older CUDA; check CUDA_VISIBLE_DEVICES"
        detail = f"there is one, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it"
        yield Finding("gpu", Level.BROKEN, detail, fix)
    else:
        yield Finding("gpu", Level.NOTE, "none: training runs on the CPU, for small models and tests")
    yield cpu_kernels(torch.backends.cpu.get_cpu_capability(), _cpu_flags())
    if not torch.distributed.is_available():
        yield Finding("distributed", Level.BROKEN, "torch was built without torch.distributed", "install a full build")
    elif torch.cuda.is_available() and not torch.distributed.is_nccl_available():
        yield Finding("nccl", Level.BROKEN, "torch was built without NCCL", "install a CUDA build of torch for Linux")


def imports(modules: Sequence[str]) -> Iterator[Finding]:
    """Modules that are installed but fail to load, as after half an upgrade; each is tried in a process of its own."""
    for name in modules:
        if find_spec(name.split(".")[0]) is not None and (problem := _import_problem(name)) is not None:
            yield Finding(
                name, Level.BROKEN, f"cannot be imported: {problem}", "install it again in the accepted range"
            )


def cpu_kernels(capability: str, flags: set[str]) -> Finding:
    """Vector instructions that torch uses, and whether bfloat16 is computed or emulated."""
    if capability == "DEFAULT" and platform.machine() == "x86_64":
        return Finding("cpu", Level.SLOW, "torch found no AVX2: plain kernels", "use a newer CPU")
    native_bfloat16 = bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)
    emulated = "" if native_bfloat16 else "; bfloat16 is emulated here: on this CPU choose precision=float32"
    return Finding("cpu", Level.OK if native_bfloat16 else Level.NOTE, f"{capability} kernels{emulated}")


def accelerated_libraries(has_gpu: bool) -> Iterator[Finding]:
    """Optional kernel libraries; missing ones matter only where there is a GPU."""
    uses = {
        "transformer_engine": "fused layers for megatron.attention=transformer_engine; sdpa works without it",
        "apex": "Megatron-Core's fused gradient accumulation; torch's kernels are used without it",
    }
    for name, use in uses.items():
        title = name.replace("_", " ")
        if find_spec(name) is None:
            yield Finding(title, Level.SLOW if has_gpu else Level.NOTE, f"not installed: {use}")
        elif (problem := _import_problem(name)) is not None:
            fix = "build it again for this torch, or uninstall it: Megatron-Core uses it wherever it is found"
            yield Finding(title, Level.BROKEN, f"installed, but cannot be imported: {problem}", fix)
        else:
            yield Finding(title, Level.OK, f"installed: {use.split(';')[0]}")


def compilers(has_gpu: bool) -> Iterator[Finding]:
    """Compilers, which the native library and DeepSpeed's kernels are built with."""
    needs = {
        "g++": "builds the native library at installation",
        "ninja": "builds DeepSpeed's kernels when they are first used",
        "nvcc": "builds CUDA kernels",
    }
    for name, use in needs.items():
        path = shutil.which(name)
        if path is not None:
            yield Finding(name, Level.OK, f"{_first_line([path, '--version'])} ({path})")
        elif name != "nvcc" or has_gpu:
            yield Finding(name, Level.NOTE, f"not found; {use}", f"install {name}, then install rewarm again")


def native_libraries(has_gpu: bool) -> Iterator[Finding]:
    """The compiled helpers of ``csrc/``; everything works without them, slower."""
    from rewarm.native import LIBRARY_FOLDER, REBUILD, open_library

    for kind in ("cpu", "cuda") if has_gpu else ("cpu",):
        path = LIBRARY_FOLDER / f"librewarm_{kind}.so"
        library, problem = open_library(path)
        subject = f"native {kind} library"
        if library is None:
            yield Finding(subject, Level.SLOW, f"{problem}: fallbacks do its work, slower", f"run: {REBUILD}")
        else:
            yield Finding(subject, Level.OK, str(path))


def cores(
    environment: Mapping[str, str], usable: int, quota: float | None, busy: float, load: float
) -> Iterator[Finding]:
    """Cores this process may use, what other programs leave of them, and the threads that training will start.

    Args:
        environment: the process's variables.
        usable: cores of the affinity mask.
        quota: cores' worth of time that the container grants; None without a limit.
        busy: cores' worth of work of other programs, as measured just now.
        load: Linux's load average of the last minute.
    """
    from rewarm.engine.threads import Cores, choose

    limit = min(float(usable), quota or usable)
    granted = "" if quota is None or quota >= usable else f", {quota:g} cores' time granted by the container"
    found = (
        f"{usable} usable of {os.cpu_count()}{granted}; {busy:.1f} busy with other programs, load average {load:.2f}"
    )
    yield Finding("cores", Level.OK, found)
    given, chosen = environment.get("OMP_NUM_THREADS", ""), choose(Cores(limit, busy), None)
    if given.isdigit() and int(given) > limit:
        fix = f"set OMP_NUM_THREADS to at most {max(1, int(limit))} divided by the ranks of this machine"
        yield Finding("threads", Level.SLOW, f"OMP_NUM_THREADS={given} is more than the cores", fix)
    elif given:
        yield Finding("threads", Level.OK, f"{given} a rank, by OMP_NUM_THREADS")
    elif round(busy) >= 1:
        text = f"a CPU run of one rank would start {chosen.number} ({chosen.why})"
        fix = "wait for the other programs, or end them: top lists them; distributed.threads sets another number"
        yield Finding("threads", Level.SLOW, text, fix)
    else:
        yield Finding("threads", Level.OK, f"a CPU run of one rank starts up to {chosen.number} ({chosen.why})")
    if environment.get("OMP_WAIT_POLICY", "").lower() == "active":
        text = "OMP_WAIT_POLICY=active: beside another program threads wait for whole time slices"
        yield Finding("waiting", Level.SLOW, text, "unset OMP_WAIT_POLICY, unless these cores are for one run alone")


def memory(root: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> Finding:
    """Memory that is free now, under the container's limit if there is one."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total, free = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        total, free = min(total, limit), min(free, limit - used)
    except (OSError, ValueError):
        pass  # no limit
    text = f"{free / GIB:.1f} GiB free of {total / GIB:.1f} GiB"
    if free < 2 * GIB:
        return Finding("memory", Level.SLOW, text, "close other programs, or ask for more")
    return Finding("memory", Level.OK, text)


def ranks(environment: Mapping[str, str]) -> Finding:
    """The ranks that a launcher made, if one did."""
    from rewarm.engine.environment import find_ranks
    from rewarm.errors import UserError

    try:
        found = find_ranks(environment)
    except (UserError, KeyError, ValueError) as error:
        fix = getattr(error, "fix", None) or "start the ranks with torchrun or srun"
        return Finding("ranks", Level.BROKEN, getattr(error, "message", str(error)), fix)
    if found.launcher == "single":
        return Finding("ranks", Level.OK, "no launcher: rewarm train starts the ranks it needs on this machine")
    return Finding("ranks", Level.OK, f"rank {found.rank} of {found.world_size}, by {found.launcher}")


def host_name() -> Finding:
    """Whether the machine's own name has an address, which gloo and NCCL ask for."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError as error:
        fix = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface to use"
        return Finding("host name", Level.NOTE, f"{name} has no address ({error}): ranks may not meet", fix)
    return Finding("host name", Level.OK, f"{name} is {address}")


def disks(working: Path, temporary: Path) -> Iterator[Finding]:
    """Space and permission where runs and temporary files go."""
    for subject, folder, least in (("disk", working, 5 * GIB), ("temporary files", temporary, GIB)):
        text = f"{shutil.disk_usage(folder).free / GIB:.1f} GiB free in {folder}"
        if not os.access(folder, os.W_OK):
            fix = "change to a folder you can write to, or set runs_folder" if folder == working else "set TMPDIR"
            yield Finding(subject, Level.BROKEN, f"{folder} cannot be written", fix)
        elif shutil.disk_usage(folder).free < least:
            yield Finding(subject, Level.NOTE, text, "make room: a checkpoint holds 12 to 16 bytes per parameter")
        else:
            yield Finding(subject, Level.OK, text)


def limits(has_gpu: bool, shared_memory: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Limits of the process that fast transfers and many ranks run into."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    text = "unlimited" if unlimited else f"{locked / 2**20:.0f} MiB"
    if has_gpu and not unlimited:
        fix = "raise 'memlock' in limits.conf, or start the container with --ulimit memlock=-1"
        yield Finding("ulimit -l", Level.SLOW, f"{text}: InfiniBand registers memory against this", fix)
    else:
        yield Finding("ulimit -l", Level.OK, f"{text} of locked memory")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < 4096:
        yield Finding(
            "ulimit -n", Level.NOTE, f"{files} open files; many ranks and shards need more", "ulimit -n 65536"
        )
    if shared_memory.exists():
        size = shutil.disk_usage(shared_memory).total
        small = size < GIB
        mend = "start the container with --shm-size=8g or --ipc=host" if small else None
        level = Level.SLOW if small else Level.OK
        yield Finding("shared memory", level, f"{size / GIB:.1f} GiB in {shared_memory}", mend)


def tracking() -> Finding:
    """Where wandb would find its key."""
    from rewarm.config.training import WandbConfig
    from rewarm.tracking.wandb import find_key, resolve_mode

    key, mode = find_key(), resolve_mode(WandbConfig())
    found = "no key configured" if key is None else f"a key in {key}"
    return Finding("wandb", Level.OK if mode == "online" else Level.NOTE, f"{found}: runs are recorded {mode}")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _import_problem(name: str) -> str | None:
    """Why a module cannot be imported, or None; a crash or a hang of its binary does not reach this process."""
    try:
        run = subprocess.run(
            [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=900, check=False
        )
    except subprocess.TimeoutExpired:
        return "no end after fifteen minutes"
    if run.returncode == 0:
        return None
    return run.stderr.strip().splitlines()[-1] if run.stderr.strip() else f"exit status {run.returncode}"


def _first_line(command: list[str]) -> str:
    """A program's answer about its version: the line that says release, else the first."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else "no version")
