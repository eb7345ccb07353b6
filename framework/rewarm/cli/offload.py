"""``rewarm offload``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rewarm.config.offload import OffloadConfig
    from rewarm.config.run import RunConfig
    from rewarm.offload.planning.placement import Scored
    from rewarm.offload.planning.routes import Job, Machine
    from rewarm.offload.runtime.device import Device
    from rewarm.offload.runtime.profile import Profile

app = typer.Typer(
    help="Optimizer state outside GPU memory: measure a machine, place state on it, look at a step.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

ConfigArgument = Annotated[Path | None, typer.Argument(help="A run's YAML file, whose model and offload are taken.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="Settings of the run to change, as a.b.c=value.")]
ProfileOption = Annotated[Path | None, typer.Option("--profile", help="A profile's file; this machine's if not given.")]
ParametersOption = Annotated[float | None, typer.Option("--parameters", help="Parameters of the model, such as 20e9.")]
ForwardOption = Annotated[
    float, typer.Option("--forward", help="Seconds of one forward pass beside which updates may run.")
]
BackwardOption = Annotated[
    float, typer.Option("--backward", help="Seconds of one backward pass beside which state may move.")
]
RanksOption = Annotated[int, typer.Option("--ranks", min=1, help="Ranks of this node.")]
ShardsOption = Annotated[
    int | None,
    typer.Option("--shards", min=1, help="Ranks that share the optimizer state; those of the node if not given."),
]
MicroBatchesOption = Annotated[int, typer.Option("--micro-batches", min=1, help="Micro-batches per step.")]
DeviceOption = Annotated[
    float | None, typer.Option("--device-memory", help="GB of GPU memory beside model and activations.")
]
SettingsOption = Annotated[
    list[str] | None, typer.Option("--set", help="Setting of offload, key=value; repeat for more.")
]
ClipOption = Annotated[bool, typer.Option("--clip/--no-clip", help="Wait for the global gradient norm.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("profile")
def profile(
    config: ConfigArgument = None,
    overrides: OverridesArgument = None,
    nvme: Annotated[list[Path] | None, typer.Option("--nvme", help="Folder on a local drive; repeat for more.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of one rank's update.")] = None,
    ranks: RanksOption = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=0.5, help="About how long it may take.")] = 20.0,
    stand_in: Annotated[
        float | None, typer.Option("--stand-in", min=0.01, help="Without a GPU: a link of this many GB/s each way.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; the cache if not given.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the rates that placements are computed from. Run it alone on the node, with one rank's threads.

    [bold]Examples[/bold]

        rewarm offload profile my.yaml --ranks 8

        rewarm offload profile --nvme /local/nvme0 --nvme /local/nvme1

        rewarm offload profile --stand-in 2 --seconds 5
    """
    from rewarm.offload.runtime.profile import cache_path, check_drives, measure

    settings = _run(config, overrides).offload if config is not None else _settings(None)
    threads = threads or settings.cpu_threads or max(1, len(os.sched_getaffinity(0)) // ranks - 1)
    paths = nvme or [Path(path) for path in settings.nvme_paths]
    check_drives([str(path) for path in paths])
    device = _device(settings.stand_in if stand_in is None else stand_in, required=config is None)
    measured = measure(device, threads=threads, nvme_paths=paths, seconds=seconds, device_free=4e9)
    path = output or (Path(settings.profile) if settings.profile else cache_path(measured.fingerprint))
    measured.save(path)
    if output is None:
        measured.save(cache_path("latest"))
    if as_json:
        typer.echo(path.read_text())
        return
    _print_profile(measured)
    typer.echo(f"saved to {path}")


@app.command("place")
def place(
    config: ConfigArgument = None,
    overrides: OverridesArgument = None,
    parameters: ParametersOption = None,
    forward: ForwardOption = 0.0,
    backward: BackwardOption = 0.0,
    profile: ProfileOption = None,
    ranks: RanksOption = 1,
    shards: ShardsOption = None,
    micro_batches: MicroBatchesOption = 1,
    device_memory: DeviceOption = None,
    settings: SettingsOption = None,
    clip: ClipOption = True,
    as_json: JsonOption = False,
) -> None:
    """Place the optimizer state and hold the prediction against known systems and the lower bound.

    [bold]Examples[/bold]

        rewarm offload place my.yaml offload.mode=auto --ranks 8 --device-memory 20

        rewarm offload place --parameters 20e9 --ranks 4 --forward 0.21 --backward 0.97 --device-memory 8
    """
    from rewarm.offload.planning.placement import corners, score, subgroup_count
    from rewarm.offload.planning.plan import plan
    from rewarm.offload.planning.relaxation import relax

    share = _Share(parameters, forward, backward, ranks, shards, micro_batches, device_memory, clip)
    chosen_settings, machine, job = _case(config, overrides, settings, profile, share)
    chosen = plan(chosen_settings, machine, job)
    size, slots, split = chosen_settings.subgroup_size, chosen.placement.slots, chosen_settings.split_master
    subgroups = subgroup_count(job, size)
    known = [score(machine, job, placement) for placement in corners(machine, job, subgroups, slots=slots)]
    bound = relax(machine, job, subgroups, slots=slots, split=split)[0].seconds
    if as_json:
        rows = [{"name": row.placement.name, "seconds": row.seconds} for row in known]
        answer = {"placement": chosen.placement.as_dict(), "seconds": chosen.seconds, "bound": bound, "known": rows}
        typer.echo(json.dumps(answer, indent=2))
        return
    _print_table(chosen, known, bound, machine, job)


@app.command("trace")
def trace(
    config: ConfigArgument = None,
    overrides: OverridesArgument = None,
    parameters: ParametersOption = None,
    forward: ForwardOption = 0.0,
    backward: BackwardOption = 0.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Chrome trace to write.")] = Path("offload-trace.json"),
    png: Annotated[Path | None, typer.Option("--png", help="Gantt chart to write.")] = None,
    profile: ProfileOption = None,
    ranks: RanksOption = 1,
    shards: ShardsOption = None,
    micro_batches: MicroBatchesOption = 1,
    device_memory: DeviceOption = None,
    settings: SettingsOption = None,
    clip: ClipOption = True,
) -> None:
    """Write the predicted timeline of one step: open it in ui.perfetto.dev.

    [bold]Examples[/bold]

        rewarm offload trace my.yaml offload.mode=streamed --png step.png

        rewarm offload trace --parameters 7e9 --forward 0.1 --backward 0.3 --set mode=auto --png step.png
    """
    from rewarm.offload.planning.pipeline import predict
    from rewarm.offload.planning.plan import plan
    from rewarm.offload.planning.simulate import chrome_trace, draw

    share = _Share(parameters, forward, backward, ranks, shards, micro_batches, device_memory, clip)
    chosen_settings, machine, job = _case(config, overrides, settings, profile, share)
    chosen = plan(chosen_settings, machine, job)
    timeline = predict(machine, job, chosen.placement)
    output.write_text(chrome_trace(timeline))
    typer.echo(f"wrote {output}: {timeline.seconds:.3f} s, {chosen.placement.describe()}")
    if png is not None:
        draw(timeline, png, f"{chosen.placement.name}: {chosen.placement.describe()}")
        typer.echo(f"wrote {png}")


@dataclass(frozen=True, slots=True)
class _Share:
    """What is said on the command line about the job."""

    parameters: float | None
    forward: float
    backward: float
    ranks: int
    shards: int | None
    micro_batches: int
    device_memory: float | None
    clip: bool


def _device(stand_in: float | None, *, required: bool) -> Device:
    from rewarm.offload.runtime.device import open_device

    return open_device(stand_in, required=required)


def _run(path: Path, overrides: list[str] | None) -> RunConfig:
    from rewarm.config.load import load

    return load(path, overrides or [])


def _settings(settings: list[str] | None) -> OffloadConfig:
    from pydantic import ValidationError

    from rewarm.config.offload import OffloadConfig
    from rewarm.config.yaml_text import parse_yaml
    from rewarm.errors import UserError, nearest

    values: dict[str, Any] = {"mode": "auto"}
    given: set[str] = set()
    for setting in settings or []:
        key, separator, text = setting.partition("=")
        if not separator:
            raise UserError(f"--set {setting!r} is not of the form key=value")
        if key not in OffloadConfig.model_fields:
            guess = nearest(key, list(OffloadConfig.model_fields))
            hint = f"did you mean {guess}?" if guess else f"known: {', '.join(OffloadConfig.model_fields)}"
            raise UserError(f"unknown setting offload.{key}; {hint}")
        if key in given:
            raise UserError(f"--set {key} is given twice", fix="give each setting once")
        given.add(key)
        try:
            values[key] = parse_yaml(text)
        except ValueError as error:
            raise UserError(f"--set {setting!r}: the value is not valid YAML: {error}") from error
    try:
        return OffloadConfig(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"offload.{where}: {message}" if where else message) from error


def _case(
    config: Path | None, overrides: list[str] | None, settings: list[str] | None, profile: Path | None, share: _Share
) -> tuple[OffloadConfig, Machine, Job]:
    """The settings, and this rank's share of the machine and of the model."""
    from rewarm.errors import UserError
    from rewarm.offload.planning.routes import Job
    from rewarm.offload.runtime.profile import cache_path, load

    parameters, shards = share.parameters, share.shards or share.ranks
    grad_bytes = param_bytes = 2
    eight_bit = False
    if config is None:
        chosen = _settings(settings)
        if parameters is None:
            raise UserError("whose state is to be placed is not said", fix="name a run's YAML file, or --parameters")
    else:
        if settings:
            raise UserError(f"--set {settings[0]} beside {config}", fix=f"write offload.{settings[0]} after the file")
        run = _run(config, overrides)
        chosen = run.offload
        parameters = _parameters(run) if parameters is None else parameters
        shards = share.shards or max(share.ranks, _ranks(run))
        # Both engines reduce gradients in fp32; DeepSpeed keeps its own fp32 parameters on the device.
        half = run.precision == "bfloat16" and run.engine == "megatron"
        grad_bytes, param_bytes = 4, 2 if half else 4
        eight_bit = run.optimizer.eight_bit
    for name, value in (("parameters", parameters), ("forward", share.forward), ("backward", share.backward)):
        if not 0 <= value < float("inf") or (name == "parameters" and value == 0):
            raise UserError(f"--{name} {value:g} must be positive")
    file = profile or (Path(chosen.profile) if chosen.profile else cache_path("latest"))
    memory = chosen.device_memory if share.device_memory is None else share.device_memory
    machine = load(file).machine(
        ranks=share.ranks,
        host_memory=None if chosen.host_memory is None else chosen.host_memory * 1e9,
        device_free=None if memory is None else memory * 1e9,
        size=chosen.subgroup_size,
        eight_bit=eight_bit,
    )
    job = Job(
        max(1, round(parameters / shards)),
        max(1e-6, share.forward),
        max(1e-6, share.backward),
        micro_batches=share.micro_batches,
        grad_bytes=grad_bytes,
        param_bytes=param_bytes,
        clip=share.clip,
        eight_bit=eight_bit,
    )
    return chosen, machine, job


def _parameters(run: RunConfig) -> float:
    """Parameters of a run's model."""
    from rewarm.errors import UserError
    from rewarm.model.architecture import Architecture, parameter_count
    from rewarm.train.stage import resolve_stage

    architecture = resolve_stage(run, _ranks(run)).architecture
    if not isinstance(architecture, Architecture):
        raise UserError("how many parameters the model has is known once it is built", fix="give --parameters")
    return float(parameter_count(architecture))


def _ranks(run: RunConfig) -> int:
    from rewarm.launch.start import local_rank_count

    return local_rank_count(run)


def _print_profile(measured: Profile) -> None:
    typer.echo(measured.description)
    for name, value in (
        ("host to device", measured.h2d),
        ("device to host", measured.d2h),
        ("both together", measured.duplex),
        ("host memory", measured.dram),
    ):
        typer.echo(f"  {name:28}{value / 1e9:10.2f} GB/s")
    for where, rates in (("CPU update", measured.cpu_rates), ("device update", measured.device_rates)):
        for size, rate in rates.items():
            typer.echo(f"  {where + f' of {int(size) / 1e6:.0f}M':28}{rate / 1e9:10.2f} Gparam/s")
    for where, rate in measured.eight_bit_rates.items():
        name = f"{'CPU' if where == 'cpu' else where} update, 8-bit moments"
        typer.echo(f"  {name:28}{rate / 1e9:10.2f} Gparam/s")
    typer.echo(f"  {'CPU update under copies':28}{measured.cpu_rate_under_copies / 1e9:10.2f} Gparam/s")
    for path, drive in measured.nvme.items():
        typer.echo(f"  {path}: read {drive['read'] / 1e9:.2f}, write {drive['write'] / 1e9:.2f} GB/s")
    typer.echo(f"  measured in {measured.seconds:.0f} s")


def _print_table(chosen: Scored, known: list[Scored], bound: float, machine: Machine, job: Job) -> None:
    from rewarm.offload.planning.placement import update_seconds
    from rewarm.offload.planning.routes import memory

    typer.echo(f"{'':34}{'step s':>9}{'update s':>10}{'GPU GB':>8}{'host GB':>9}{'NVMe GB':>9}")
    for row in [*sorted(known, key=lambda scored: -scored.seconds), chosen]:
        sizes = [size / 1e9 for size in memory(row.placement, job)]
        name = f"chosen: {row.placement.name}" if row is chosen else row.placement.name
        update = update_seconds(machine, job, row.placement)
        typer.echo(f"{name:34}{row.seconds:9.3f}{update:10.3f}{sizes[0]:8.1f}{sizes[1]:9.1f}{sizes[2]:9.1f}")
    typer.echo(f"{'lower bound':34}{bound:9.3f}")
    typer.echo(f"without any update{'':16}{job.hidden:9.3f}")
    typer.echo(chosen.placement.describe())
