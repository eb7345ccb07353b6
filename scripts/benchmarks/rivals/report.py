"""What was measured, as a table, as JSON, and held against the goals (standard library only)."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rivals.sizes import Shape, state
from rivals.turns import Record

OURS = ("cpu", "streamed", "dos", "auto")
RIVALS = ("deepspeed-2", "deepspeed-3", "twinflow", "hybrid")
ZERO_OFFLOAD = ("deepspeed-2", "deepspeed-3")
TOLERANCE = 0.01
"""Relative; two frameworks round bfloat16 differently."""


@dataclass
class Result:
    """Everything that goes into the report."""

    options: argparse.Namespace
    shape: Shape
    gpu: float
    left: float
    records: list[Record]
    place: str = ""
    """CPU, memory and GPU."""
    overlap: dict[str, Any] | None = None
    machine: dict[str, float] | None = None
    began: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"))

    def at(self, micro_batches: int) -> dict[str, Record]:
        """Contestant -> what it did."""
        return {record.name: record for record in self.records if record.micro_batches == micro_batches}

    def median(self, name: str, micro_batches: int) -> float | None:
        """Seconds of a step."""
        record = self.at(micro_batches).get(name)
        return None if record is None or record.failed else statistics.median(record.seconds)

    def strangers(self) -> list[str]:
        """Contestants whose losses are not those of the others, step by step from the first."""
        found = []
        for count in self.options.micro_batches:
            ran = [record for record in self.at(count).values() if record.losses and not record.failed]
            middle = [statistics.median(step) for step in zip(*(record.losses for record in ran), strict=False)]
            for record in ran:
                pairs = zip(record.losses, middle, strict=False)
                if any(not abs(ours - theirs) <= TOLERANCE * abs(theirs) for ours, theirs in pairs):
                    found.append(f"{record.name} at {count}")
        return found

    def equal_bits(self) -> list[str]:
        """Modes of this project whose losses are those of none to the last digit."""
        found = []
        for count in self.options.micro_batches:
            plain = self.at(count).get("none")
            for name in OURS:
                record = self.at(count).get(name)
                if plain and record and plain.losses and record.losses == plain.losses:
                    found.append(f"{name} at {count}")
        return found

    def judged(self) -> str | None:
        """The mode that the goals are for: auto, or the fastest of those that ran without it."""
        first = self.options.micro_batches[0]
        ran = {name: seconds for name in OURS if (seconds := self.median(name, first)) is not None}
        return "auto" if "auto" in ran else min(ran, key=lambda name: ran[name], default=None)


def goals(result: Result) -> list[tuple[str, str, str]]:
    """What was wanted, what was found, and ``met``, ``not met`` or ``not measured``."""
    mode = result.judged()
    few, many = min(result.options.micro_batches), max(result.options.micro_batches)
    rows = []
    for count, wanted, names in ((few, 2.5, ZERO_OFFLOAD), (many, 1.0, RIVALS)):
        text = f"{wanted:g}x {'ZeRO-Offload' if wanted > 1 else 'every rival'} at {count} micro-batches"
        theirs = {name: seconds for name in names if (seconds := result.median(name, count)) is not None}
        ours = None if mode is None else result.median(mode, count)
        if ours is None or not theirs or not result.gpu:
            rows.append((f"at least {text}", "", "not measured"))
            continue
        fastest = min(theirs, key=lambda name: theirs[name])
        ratio = theirs[fastest] / ours
        found = f"{mode}: {ratio:.2f}x the fastest, {fastest}"
        rows.append((f"at least {text}", found, "met" if ratio >= wanted else "not met"))
    return [*rows, *(use_of_machine(result, name, few) for name in ("streamed", "auto"))]


def use_of_machine(result: Result, name: str, count: int) -> tuple[str, str, str]:
    """Share of the link each way, and of host memory, that a mode's update uses."""
    wanted = f"80% of PCIe each way, or 85% of DRAM, in the update ({name})"
    record = result.at(count).get(name)
    if result.machine is None or record is None or record.failed or not record.update:
        return wanted, "", "not measured"
    seconds = statistics.median(update["seconds"] for update in record.update)
    bytes_each = {
        way: per * record.facts["parameters"] * statistics.median(update[way] for update in record.update)
        for way, per in record.facts["traffic"].items()
    }
    share = {way: moved / seconds / result.machine[way] for way, moved in bytes_each.items()}
    found = ", ".join(f"{way} {part:.0%}" for way, part in share.items()) + f" of {seconds:.3f} s"
    met = min(share["h2d"], share["d2h"]) >= 0.8 or share["dram"] >= 0.85
    return wanted, found, "met" if met else "not met"


def write(result: Result, folder: Path) -> None:
    """report.md and report.json."""
    values = {
        "command": command(),
        "date": result.began,
        "machine": result.place,
        "versions": versions(),
        "shape": asdict(result.shape),
        "gpu_bytes": result.gpu,
        "gpu_bytes_left": result.left,
        "rates": result.machine,
        "overlap": result.overlap,
        "contestants": [record.as_dict() for record in result.records],
        "other_losses": result.strangers(),
        "goals": [dict(zip(("goal", "found", "verdict"), row, strict=True)) for row in goals(result)],
    }
    (folder / "report.json").write_text(json.dumps(values, indent=2) + "\n")
    (folder / "report.md").write_text(markdown(result) + "\n")


def markdown(result: Result) -> str:
    """The report as a page."""
    shape, lines = result.shape, [f"# Offload against its rivals, {result.began}", "", f"    {command()}", ""]
    lines += [f"Machine: {result.place}.", f"Versions: {', '.join(versions())}.", ""]
    lines.append(
        f"{shape.parameters / 1e9:.2f} billion parameters ({shape.num_layers} layers, {shape.hidden_size} wide), "
        f"windows of {shape.sequence_length} tokens, one a micro-batch, bfloat16; state {state(shape) / 1e9:.1f} GB, "
        + (f"GPU memory left {result.left / 1e9:.1f} of {result.gpu / 1e9:.1f} GB." if result.gpu else "no GPU.")
    )
    lines.append(how(result.options))
    for count in result.options.micro_batches:
        lines += ["", f"## {count} micro-batches", "", *table(result, count)]
    lines += ["", "## Goals", "", "| goal | found | |", "|---|---|---|"]
    lines += [f"| {wanted} | {found} | {verdict} |" for wanted, found, verdict in goals(result)]
    lines += ["", "## Losses", "", losses(result), "", "## Both directions at once", "", overlap(result)]
    return "\n".join(lines)


def how(options: argparse.Namespace) -> str:
    """How the turns were taken."""
    alive = "all alive, idle between turns" if options.keep else "one alive at a time, built anew for each turn"
    return (
        f"{options.rounds} interleaved rounds of {options.warm} steps to warm up and {options.steps} timed ones, of "
        f"which the mean is taken, the end of the last update included; {alive}. Whole steps: forward, backward, "
        "clipping, update. none has the whole GPU."
    )


def table(result: Result, count: int) -> list[str]:
    """One row per contestant."""
    header = ["", "median s", "least to most", *(f"x {name}" for name in RIVALS), "GPU GB", "host GB", ""]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    host = "resident_bytes" if result.options.keep else "host_bytes"
    for name, record in result.at(count).items():
        seconds = result.median(name, count)
        if seconds is None:
            lines.append(f"| {name} |" + " |" * (len(header) - 2) + f" failed: {record.failed} |")
            continue
        each = record.seconds
        theirs = [result.median(rival, count) for rival in RIVALS]
        ratios = ["" if other is None else f"{other / seconds:.2f}" for other in theirs]
        facts = record.facts
        memory = [f"{max(0.0, facts[key]) / 1e9:.1f}" for key in ("gpu_bytes", host)]
        row = [name, f"{seconds:.3f}", f"{min(each):.3f} to {max(each):.3f}", *ratios, *memory]
        lines.append(f"| {' | '.join(row)} | {facts.get('placement', '')} |")
    return lines


def losses(result: Result) -> str:
    """The first steps of everyone, and who stands apart."""
    lines = ["| | micro-batches | losses from the first step on |", "|---|---|---|"]
    for record in result.records:
        if record.losses:
            shown = ", ".join(f"{value:.4f}" for value in record.losses)
            lines.append(f"| {record.name} | {record.micro_batches} | {shown} |")
    apart = result.strangers()
    verdict = f"Not those of the others: {', '.join(apart)}." if apart else f"All within {TOLERANCE:.0%} of the median."
    equal = result.equal_bits()
    bits = f"Equal to those of none in every digit: {', '.join(equal)}." if equal else ""
    return "\n".join([*lines, "", f"{verdict} {bits}".strip()])


def overlap(result: Result) -> str:
    """What the trace of a streamed step shows."""
    found = result.overlap
    if found is None or "failed" in found:
        return f"Not measured: {'streamed took no part' if found is None else found['failed']}."
    text = (
        f"`streamed.trace.json`, one step of streamed: copies to the device {found['h2d_busy']:.3f} s, from it "
        f"{found['d2h_busy']:.3f} s, both at once {found['both_busy']:.3f} s, which is {found['share_both']:.0%} of "
        "the time in which anything is copied."
    )
    if "pageable" in found:
        return f"{text} {found['pageable']:.0f} copies went through memory that is not locked."
    return f"{text} Without a GPU these are the executor's own times of copies within host memory."


def command() -> str:
    """As it was typed."""
    return f"python {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}"


def machine_line(has_gpu: bool) -> str:
    """CPU, memory and GPU."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{len(os.sched_getaffinity(0))} cores of {model}, {memory / 1e9:.0f} GB"
    if not has_gpu:
        return f"{text}, no GPU"
    import torch

    driver = Path("/proc/driver/nvidia/version")
    module = driver.read_text().splitlines()[0] if driver.exists() else "driver unknown"
    return f"{text}, {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {module}"


def versions() -> list[str]:
    """Of what took part."""
    names = ("torch", "deepspeed", "megatron-core", "transformers", "transformer-engine")
    found = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return found
