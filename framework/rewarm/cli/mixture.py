"""``rewarm mixture``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rewarm.mixing.audit import Audit
    from rewarm.mixing.targets import Target

app = typer.Typer(
    help="Domain weights: try a mixer, fit targets, propose a mixture, audit a run, average its weights.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("simulate")
def simulate(
    mixer: Annotated[str, typer.Option("--mixer", help="Name of the mixer.")],
    losses: Annotated[
        Path, typer.Option("--losses", help='One {"step": s, "loss": {domain: nats}} a line, or an evaluation.jsonl.')
    ],
    weights: Annotated[
        str,
        typer.Option("--weights", help="Start weights by domain, as JSON or a JSON file; tokens, for a mixer by size."),
    ],
    initial: Annotated[
        str | None, typer.Option("--initial", help="Losses before training, by domain; the first line's if not given.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help="Losses to reach, or the reference model's, by domain.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of the mixer, key=value; repeat for more.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write a PNG of the weights.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a mixer would do on a table of losses, in seconds and without a model.

    [bold]Examples[/bold]

        rewarm mixture simulate --mixer velocitune --weights '{"en": 0.7, "code": 0.3}' --targets targets.json
        --losses runs/pilot/evaluation.jsonl --set step_size=0.2 --plot weights.png

        rewarm mixture simulate --mixer odm --weights '{"a": 1, "b": 1}' --losses losses.jsonl --json
    """
    from rewarm.mixing.loss_table import read_loss_table
    from rewarm.mixing.simulate import simulate as run

    results = run(
        mixer,
        _by_domain("--weights", weights) or {},
        read_loss_table(losses),
        initial=_by_domain("--initial", initial),
        targets=_by_domain("--targets", targets),
        settings=_settings(settings or []),
    )
    if plot is not None:
        _plot(results, plot, mixer)
    if as_json:
        sys.stdout.writelines(json.dumps(result) + "\n" for result in results)
    else:
        _print_weights(results)


@app.command("targets")
def targets(
    pilot: Annotated[Path, typer.Argument(help="Run of the pilot, or its evaluation.jsonl.")],
    tokens: Annotated[float, typer.Option("--tokens", help="Tokens that the stage will train on, as 2e9.")],
    output: Annotated[Path, typer.Option("--output", help="File to write; mixture.velocitune.targets can name it.")],
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="Domain to fit; repeat. All if not given.")
    ] = None,
    skip: Annotated[float, typer.Option("--skip-tokens", help="Leave out evaluations up to here, as the warm-up.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Target losses from a pilot: a power law for each domain's evaluations, extrapolated to the whole stage.

    The pilot is an ordinary run: the same model on a sub-sample at the original weights, with a constant learning rate
    and frequent evaluations.

    [bold]Example[/bold]

        rewarm mixture targets runs/pilot --tokens 2e9 --skip-tokens 1e6 --output targets.json
    """
    from rewarm.mixing.loss_table import read_loss_table
    from rewarm.mixing.targets import fit_targets

    place = pilot / "evaluation.jsonl" if pilot.is_dir() else pilot
    fitted = fit_targets(read_loss_table(place), int(tokens), domains=domains, skip_tokens=int(skip))
    content = {
        "targets": {name: target.loss for name, target in fitted.items()},
        "tokens": int(tokens),
        "pilot": str(place),
        "laws": {name: _law(target) for name, target in fitted.items()},
    }
    _write(output, json.dumps(content, indent=2) + "\n")
    if as_json:
        sys.stdout.write(json.dumps(content) + "\n")
    else:
        _print_targets(fitted, output)


@app.command("propose")
def propose(
    runs: Annotated[Path, typer.Argument(help='One {"weights": {domain: share}, "loss": {domain: nats}} a line.')],
    prior: Annotated[str, typer.Option("--prior", help="Mixture to stay near, by domain; usually tokens.")],
    importance: Annotated[
        str | None, typer.Option("--importance", help="Weight of each evaluated domain; equal if not given.")
    ] = None,
    caps: Annotated[str | None, typer.Option("--caps", help="Largest share by domain, from a limit on passes.")] = None,
    divergence: Annotated[
        float, typer.Option("--divergence", min=0, help="Nats of loss per nat of divergence.")
    ] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Fit the log-linear mixing law to runs on different mixtures and propose the one with the lowest loss.

    [bold]Example[/bold]

        rewarm mixture propose runs.jsonl --prior '{"web": 900, "code": 90, "math": 10}' --caps '{"math": 0.2}'
    """
    from rewarm.mixing.propose import propose as run

    proposal = run(
        runs,
        _by_domain("--prior", prior) or {},
        importance=_by_domain("--importance", importance),
        caps=_by_domain("--caps", caps),
        divergence=divergence,
    )
    if as_json:
        sys.stdout.write(json.dumps(proposal) + "\n")
        return
    sys.stdout.write("".join(f"{name:<24}{share:8.4f}\n" for name, share in proposal["weights"].items()))
    sys.stdout.write("".join(f"predicted loss {name:<24}{loss:8.4f}\n" for name, loss in proposal["loss"].items()))
    sys.stdout.write(f"worst residual of the fit {proposal['worst_residual']:.4f} nats\n")


@app.command("merge")
def merge(
    first: Annotated[Path, typer.Argument(help="Run that trained on one blend, or a checkpoint of it.")],
    second: Annotated[Path, typer.Argument(help="The same on another blend.")],
    mixes: Annotated[int, typer.Option("--mixes", min=3, help="Merged models, both ends included.")] = 9,
    prior: Annotated[
        float, typer.Option("--prior", min=0.001, max=0.999, help="Share of the second blend to stay near.")
    ] = 0.5,
    importance: Annotated[
        str | None, typer.Option("--importance", help="Weight of each evaluated domain; equal if not given.")
    ] = None,
    divergence: Annotated[
        float, typer.Option("--divergence", min=0, help="Nats of loss per nat of divergence.")
    ] = 0.05,
    as_json: JsonOption = False,
) -> None:
    """Choose between two blends without training those between them: merge two short runs and evaluate the merged.

    For a new stage of a long lineage: one probe with little of the new domains, one with much. The proposal is what
    the next stage takes as its mixture and replay fraction.

    [bold]Example[/bold]

        rewarm mixture merge runs/probe-10 runs/probe-90 --prior 0.5
    """
    from rewarm.mixing.propose import propose_blend
    from rewarm.train.merge import blend_shares, merge_probes

    merged = merge_probes(first, second, mixes)
    proposal = propose_blend(
        [each.share for each in merged],
        [each.losses for each in merged],
        prior,
        importance=_by_domain("--importance", importance),
        divergence=divergence,
    )
    proposal["weights"] = blend_shares(merged, proposal["share"])
    if as_json:
        rows = [{"share": each.share, "weights": each.weights, "loss": each.losses} for each in merged]
        sys.stdout.write(json.dumps({**proposal, "merged": rows}) + "\n")
        return
    for each in merged:
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in each.losses.items())
        sys.stdout.write(f"share of the second {each.share:6.3f}   {losses}\n")
    sys.stdout.write(f"proposed share of the second {proposal['share']:.4f}\n")
    sys.stdout.write("".join(f"{name:<24}{share:8.4f}\n" for name, share in proposal["weights"].items()))
    sys.stdout.write("".join(f"predicted loss {name:<24}{loss:8.4f}\n" for name, loss in proposal["loss"].items()))
    sys.stdout.write(f"worst residual of the fit {proposal['worst_residual']:.4f} nats\n")


@app.command("audit")
def audit(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: JsonOption = False,
) -> None:
    """Rebuild which windows every step used from the weight log alone, and compare with what training logged.

    Exit status 1 if a step differs.

    [bold]Example[/bold]

        rewarm mixture audit runs/quickstart-continue
    """
    from rewarm.mixing.audit import audit as rebuild
    from rewarm.mixing.audit import logged_hashes
    from rewarm.mixing.weight_log import WeightLog
    from rewarm.tracking.metrics import read_lines

    state, batch_size = _run_facts(run)
    result = rebuild(
        state["sampler"],
        WeightLog(run / "mixture.jsonl").entries(),
        logged_hashes(read_lines(run / "metrics.jsonl")),
        batch_size,
    )
    _print_audit(result, as_json)
    if result.different:
        raise typer.Exit(1)


@app.command("average")
def average(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
) -> None:
    """Mean weights of a run's new domains, as JSON that another stage takes as its mixture.weights.

    Of the loss under mixer doremi, else of the samples; each update counts as long as it was in force.

    [bold]Example[/bold]

        rewarm train large.yaml mixture.weights="$(rewarm mixture average runs/proxy)"
    """
    import yaml

    from rewarm.mixing.average import average_shares
    from rewarm.mixing.mixers import MIXERS
    from rewarm.mixing.weight_log import WeightLog

    state, _ = _run_facts(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    mixer = MIXERS.get(config["mixture"]["mixer"])
    shares = average_shares(
        WeightLog(run / "mixture.jsonl").entries(),
        int(state["sampler"]["sample_index"]),
        list(config["data"]),
        objective=mixer is not None and mixer.steers_objective,
    )
    sys.stdout.write(json.dumps({name: round(share, 9) for name, share in shares.items()}) + "\n")


def _run_facts(run: Path) -> tuple[dict[str, Any], int]:
    """State of a run's newest checkpoint, and its samples per step."""
    import yaml

    from rewarm.checkpoint.distributed import read_state
    from rewarm.checkpoint.store import list_checkpoints
    from rewarm.errors import UserError

    checkpoints = list_checkpoints(run / "checkpoints")
    if not (run / "config.yaml").is_file() or not checkpoints:
        raise UserError(f"{run} is not a run with a checkpoint", fix="give the folder of a run that has saved once")
    config = yaml.safe_load((run / "config.yaml").read_text())
    return read_state(checkpoints[0]), int(config["batch"]["global_batch_size"])


def _by_domain(option: str, text: str | None) -> dict[str, float] | None:
    """Numbers by domain, given as JSON or as the name of a JSON file (also one with ``targets`` inside)."""
    from rewarm.errors import UserError

    if text is None:
        return None
    fix = f"write {option} '{{\"domain\": number, ...}}', or name a JSON file that holds that"
    try:
        value = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
        value = value.get("targets", value) if option == "--targets" else value
        return {str(name): float(number) for name, number in value.items()}
    except OSError as error:
        raise UserError(f"{option}: cannot read {text}: {error.strerror}", fix=fix) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{option} {text!r} is not numbers by domain", fix=fix) from error


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    from rewarm.errors import UserError

    settings = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise UserError(f"--set {pair!r} is not of the form key=value")
        try:
            settings[key] = json.loads(text)
        except ValueError as error:
            raise UserError(f"--set {pair!r}: {text!r} is not a number or JSON") from error
    return settings


def _law(target: Target) -> dict[str, Any]:
    law = target.law
    return {
        "limit": law.limit,
        "scale": law.scale,
        "exponent": law.exponent,
        "residuals": list(law.residuals),
        "initial": target.initial,
        "final": target.final,
    }


def _print_weights(results: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("step", *results[0]["weights"], "note")
    for result in results:
        shares = [f"{share:.4f}" for share in result["weights"].values()]
        table.add_row(str(result["step"]), *shares, result.get("note", ""))
    Console().print(table)


def _print_targets(fitted: Mapping[str, Target], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("domain", "initial", "pilot's end", "target", "worst residual")
    for name, target in fitted.items():
        numbers = (target.initial, target.final, target.loss, target.law.worst_residual)
        table.add_row(name, *(f"{number:.4f}" for number in numbers))
    Console().print(table)
    sys.stdout.write(f"written to {output}\n")


def _print_audit(result: Audit, as_json: bool) -> None:
    domains = {
        name: {
            "windows": use.windows,
            "drawn": use.drawn,
            "different": use.seen,
            "most_repeated": use.most_repeated,
            "effective": round(use.effective, 1),
        }
        for name, use in result.domains.items()
    }
    if as_json:
        facts = {"steps": result.steps, "compared": result.compared, "different": result.different, "domains": domains}
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("domain", "windows", "drawn", "different", "most repeated", "worth in fresh windows")
    for name, use in domains.items():
        table.add_row(name, *(f"{value:,}" for value in use.values()))
    Console().print(table)
    verdict = (
        "all equal" if not result.different else f"{len(result.different)} differ, first at step {result.different[0]}"
    )
    sys.stdout.write(
        f"{result.steps:,} steps rebuilt from the weight log, {result.compared:,} hashes compared: {verdict}\n"
    )


def _plot(results: Sequence[Mapping[str, Any]], place: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from rewarm.errors import UserError

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in results[0]["weights"]:
        axes.plot([result["step"] for result in results], [result["weights"][name] for result in results], label=name)
    axes.set(xlabel="step", ylabel="weight", ylim=(0, None), title=title)
    axes.legend()
    try:
        figure.savefig(place, dpi=150, bbox_inches="tight", format="png")
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}") from error
    pyplot.close(figure)


def _write(place: Path, text: str) -> None:
    from rewarm.errors import UserError

    try:
        place.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}") from error
