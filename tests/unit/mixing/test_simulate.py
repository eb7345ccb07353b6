"""``rewarm mixture``: the numbers it prints and the errors it gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from rewarm.cli.mixture import app
from rewarm.config.mixture import MixtureConfig
from rewarm.errors import UserError
from rewarm.mixing.audit import audit
from rewarm.mixing.draws import sample_hash
from rewarm.mixing.mixers.build import build_mixer, with_targets
from rewarm.mixing.repetition import effective_tokens
from rewarm.mixing.sampler import SampledDomain, Sampler
from rewarm.mixing.weight_log import WeightLog
from rewarm.mixing.weights import TOTAL, quantise

W = {"a": 0.5, "b": 0.3, "c": 0.2}
LOSSES, INITIAL, TARGETS = {"a": 1.6, "b": 2.2, "c": 3.0}, {"a": 2, "b": 2.5, "c": 3.2}, {"a": 1.5, "b": 1.9, "c": 2.7}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def table(folder: Path, *lines: dict[str, Any]) -> str:
    place = folder / "losses.jsonl"
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(place)


def simulate(mixer: str, losses: str, *more: str, weights: dict[str, float] = W) -> list[dict[str, Any]]:
    arguments = ["--mixer", mixer, "--weights", json.dumps(weights), "--losses", losses, "--json", *more]
    return [json.loads(line) for line in run("simulate", *arguments).splitlines()]


@pytest.mark.parametrize(
    ("mixer", "line", "more", "expected"),
    [
        ("velocitune", {"step": 10, "loss": LOSSES}, [], [0.415516, 0.336533, 0.247951]),
        ("dynamic_batch_loading", {"step": 10, "loss": LOSSES}, [], [0.450154, 0.329901, 0.219945]),
        ("dbl", {"step": 10, "loss": LOSSES}, ["--set", "floor=0.0001"], [0.450154, 0.329901, 0.219945]),
        ("doremi", {"step": 1, "loss": {"a": 1.9, "b": 1.8, "c": 2.9}}, [], [0.577895, 0.232624, 0.189480]),
        ("odm", {"step": 100, "loss": LOSSES}, [], [0.286007, 0.319317, 0.394675]),
        (
            "pike",
            {
                "step": 1,
                "loss": LOSSES,
                "squared_gradient_norms": {"a": 1, "b": 0.5, "c": 0.25},
                "gradient_variances": {"a": 2, "b": 8, "c": 4},
            },
            ["--set", "norm_factor=0.5", "--set", "batch_size=64"],
            [0.582569, 0.259757, 0.157674],
        ),
    ],
)
def test_golden_vectors(
    mixer: str, line: dict[str, Any], more: list[str], expected: list[float], tmp_path: Path
) -> None:
    given = ["--initial", json.dumps(INITIAL), "--targets", json.dumps(TARGETS), *more]
    (result,) = simulate(mixer, table(tmp_path, line), *given)
    assert result["step"] == line["step"]
    assert list(result["weights"].values()) == pytest.approx(expected, abs=1e-6)


def test_golden_vector_of_temperature(tmp_path: Path) -> None:
    losses = table(tmp_path, {"step": 1, "loss": LOSSES})
    (result,) = simulate("temperature", losses, "--set", "temperature=5", weights={"a": 900, "b": 90, "c": 10})
    assert list(result["weights"].values()) == pytest.approx([0.490787, 0.309666, 0.199547], abs=1e-6)


def test_updates_follow_one_another_from_an_evaluation_file(tmp_path: Path) -> None:
    lines = [
        {"step": s, "tokens": s * 100, "domains": {n: {"loss": loss - s / 100} for n, loss in INITIAL.items()}}
        for s in (0, 10, 20)
    ]
    results = simulate("velocitune", table(tmp_path, *lines), "--targets", json.dumps(TARGETS))
    assert list(results[0]["weights"].values()) == pytest.approx(list(W.values()))
    weights = np.array(list(W.values()))
    for step, result in zip((10, 20), results[1:], strict=True):
        velocity = 1 - step / 100 / (np.array(list(INITIAL.values())) - np.array(list(TARGETS.values())))
        weights = weights * np.exp(velocity) / (weights * np.exp(velocity)).sum()
        assert list(result["weights"].values()) == pytest.approx(weights.tolist(), abs=1e-8)
        assert list(result["velocity"].values()) == pytest.approx(velocity.tolist())


def test_a_failed_evaluation_keeps_the_weights_and_says_so(tmp_path: Path) -> None:
    lines = table(tmp_path, {"step": 1, "loss": LOSSES}, {"step": 2, "loss": {**LOSSES, "b": math.nan}})
    first, second = simulate("dbl", lines, "--targets", json.dumps(TARGETS))
    assert second["weights"] == first["weights"] and "b is not a finite number" in second["note"]


def test_ado_and_skill_it_run_from_losses_alone(tmp_path: Path) -> None:
    lines = [
        {"step": s, "tokens": s * 1000, "loss": {"a": 2 + 0.1 * s**-0.5, "b": 1 + 9 * s**-0.5, "c": 3 + 0.1 * s**-0.5}}
        for s in range(1, 12)
    ]
    results = simulate("ado", table(tmp_path, *lines), "--set", "warmup=0", "--set", "smoothing=0.9")
    assert results[-1]["weights"]["b"] > 0.8 and results[2]["weights"] == pytest.approx(W)
    graph = json.dumps({"a": {"a": 1}, "b": {"b": 1}, "c": {"c": 1}})
    results = simulate("skill_it", table(tmp_path, *lines), "--set", f"graph={graph}")
    assert results[-1]["weights"]["c"] > results[-1]["weights"]["a"]


@pytest.mark.parametrize(
    ("mixer", "more", "weights", "message"),
    [
        ("velocitun", [], W, r"no mixer 'velocitun'(.|\n)*did you mean 'velocitune'"),
        ("velocitune", [], W, "needs --targets"),
        ("odm", ["--set", "deccay=0.5"], W, r"no setting 'deccay'(.|\n)*did you mean 'decay'"),
        ("odm", ["--set", "decay=-1"], W, "decay=-1 of mixer odm"),
        ("odm", ["--set", "decay"], W, "not of the form key=value"),
        ("odm", [], {"a": 0, "b": 0}, "sum to 0"),
        ("odm", [], {"a": 1, "b": -1}, "weight of domain 'b' is -1"),
        ("odm", [], {"a": 1, "x": 1}, r"losses.jsonl:1 has no loss for domain 'x'"),
        ("pike", [], W, "needs squared_gradient_norms"),
        ("unimax", [], W, "needs --set total_tokens"),
        ("velocitune", ["--targets", '{"a": 1}'], W, "no value for domain 'b'"),
        ("velocitune", ["--targets", "{"], W, "is not numbers by domain"),
        ("velocitune", ["--targets", "missing.json"], W, "cannot read missing.json"),
    ],
)
def test_bad_input_is_named(
    mixer: str, more: list[str], weights: dict[str, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        simulate(mixer, table(tmp_path, {"step": 1, "loss": LOSSES}), *more, weights=weights)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "losses.jsonl").write_text('{"step": 1, "loss": {"a": 1, "b": 1, "c": 1}}\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"losses.jsonl:2 is no line of a loss table"):
        simulate("odm", str(tmp_path / "losses.jsonl"))
    with pytest.raises(UserError, match="holds no losses"):
        simulate("odm", table(tmp_path))


def test_a_plot_is_written(tmp_path: Path) -> None:
    simulate("odm", table(tmp_path, {"step": 1, "loss": LOSSES}), "--plot", str(tmp_path / "w.png"))
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")


def test_targets_extrapolate_a_pilot_and_feed_velocitune(tmp_path: Path) -> None:
    def loss(tokens: float) -> dict[str, Any]:
        return {"a": {"loss": 1.5 + 2.0 * (tokens / 1000) ** -0.4}, "b": {"loss": 1.0 + (tokens / 1000) ** -0.2}}

    lines = [{"step": s, "tokens": s * 1000, "domains": loss(s * 1000)} for s in range(1, 21)]
    lines = [{"step": 0, "tokens": 0, "domains": {"a": {"loss": 9.0}, "b": {"loss": 9.0}}}, *lines]
    place = table(tmp_path, *lines)
    output = tmp_path / "targets.json"
    run("targets", place, "--tokens", "1e6", "--output", str(output))
    fitted = json.loads(output.read_text())
    assert fitted["targets"] == pytest.approx({"a": 1.5 + 2 * 1000**-0.4, "b": 1 + 1000**-0.2}, abs=2e-3)
    assert fitted["laws"]["a"]["exponent"] == pytest.approx(0.4, abs=1e-2)
    assert max(map(abs, fitted["laws"]["b"]["residuals"])) < 1e-3
    assert len(simulate("velocitune", place, "--targets", str(output), weights={"a": 1, "b": 1})) == 21
    with pytest.raises(UserError, match="evaluated domain 'a' 3 times after 17000 tokens"):
        run("targets", place, "--tokens", "1e6", "--output", str(output), "--skip-tokens", "17000")


def test_a_mixture_is_proposed_from_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(12):
        x = rng.dirichlet(np.ones(2))
        lines.append(
            {
                "weights": dict(zip("ab", x, strict=True)),
                "loss": {"a": 1 + math.exp(-x[0]), "b": 1 + math.exp(-3 * x[1])},
            }
        )
    place = table(tmp_path, *lines)
    arguments = ["propose", place, "--prior", '{"a": 1, "b": 1}', "--divergence", "0", "--json"]
    found = json.loads(run(*arguments))
    # Minimum of exp(-x) + exp(-3 (1 - x)): x = (3 - ln 3) / 4.
    assert found["weights"]["a"] == pytest.approx((3 - math.log(3)) / 4, abs=1e-3)
    assert found["worst_residual"] < 1e-3
    capped = json.loads(run(*arguments, "--caps", '{"a": 0.25}'))
    assert capped["weights"] == pytest.approx({"a": 0.25, "b": 0.75})


def test_a_domain_that_every_run_replays_at_the_same_share_keeps_it(tmp_path: Path) -> None:
    """Runs of a continued stage: the replayed domain is evaluated like the others, and its share tells nothing."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(12):
        x = float(rng.uniform(0.1, 0.9))
        loss = {"a": 1 + math.exp(-x), "b": 1 + math.exp(-3 * (1 - x)), "old": 2.0}
        lines.append({"weights": {"a": 0.75 * x, "b": 0.75 * (1 - x), "old": 0.25}, "loss": loss})
    place, best = table(tmp_path, *lines), (3 - math.log(3)) / 4
    both = {"a": 1, "b": 1}
    arguments = ["propose", place, "--divergence", "0", "--importance", '{"a": 1, "b": 1, "old": 0}', "--json"]
    found = json.loads(run(*arguments, "--prior", json.dumps(both)))
    assert found["weights"] == pytest.approx({"a": best, "b": 1 - best}, abs=1e-3)
    assert found["loss"]["old"] == pytest.approx(2.0, abs=1e-3)
    found = json.loads(run(*arguments, "--prior", json.dumps({**both, "old": 0.5})))
    assert found["weights"] == pytest.approx({"a": 0.75 * best, "b": 0.75 * (1 - best), "old": 0.25}, abs=1e-3)
    capped = json.loads(run(*arguments, "--prior", json.dumps({**both, "old": 1}), "--caps", '{"a": 0.3}'))
    assert capped["weights"] == pytest.approx({"a": 0.3, "b": 0.45, "old": 0.25}, abs=1e-3)
    with pytest.raises(UserError, match="every run has 0.25 of domain 'old', and its cap is 0.2"):
        run(*arguments, "--prior", json.dumps({**both, "old": 1}), "--caps", '{"old": 0.2}')
    lines[3]["weights"] = {"a": 0.5, "b": 0.4, "old": 0.1}
    with pytest.raises(UserError, match="different shares of domain 'old', which --prior does not name"):
        run("propose", table(tmp_path, *lines), "--prior", json.dumps(both))


def pilot(folder: Path, *, is_run: bool) -> Path:
    """Evaluations of a pilot with new domains a and b, a replayed one, and one that is only watched and rises."""
    folder.mkdir()
    if is_run:
        (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"a": "x", "b": {"path": "y"}}}))

    def losses(tokens: float) -> dict[str, Any]:
        amounts = {"a": 1.5 + 2.0 * tokens**-0.4, "b": 1.0 + tokens**-0.2, "old": 2.0 - 1e-3 * tokens}
        return {name: {"loss": loss} for name, loss in amounts.items()} | {"watched": {"loss": None}}

    lines = [{"step": s, "tokens": s * 1000, "domains": losses(max(s, 0.1))} for s in range(12)]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("named", ["run", "file"])
def test_targets_of_a_continued_stage_are_of_its_new_domains(named: str, tmp_path: Path) -> None:
    """The guide's recipe: a pilot that replays an old domain gives targets that simulation and training take."""
    folder, output = pilot(tmp_path / "pilot", is_run=True), tmp_path / "targets.json"
    place = folder if named == "run" else folder / "evaluation.jsonl"
    run("targets", str(place), "--tokens", "1e6", "--output", str(output))
    found = json.loads(output.read_text())["targets"]
    assert list(found) == ["a", "b"]
    simulated = simulate(
        "velocitune", str(folder / "evaluation.jsonl"), "--targets", str(output), weights={"a": 6, "b": 4}
    )
    assert len(simulated) == 12
    settings = MixtureConfig.model_validate({"mixer": "velocitune", "velocitune": {"targets": str(output)}})
    resolved = with_targets(settings, ["a", "b"])
    assert resolved.velocitune is not None and resolved.velocitune.targets == found
    build_mixer(resolved, ["a", "b"], np.ones(2), lambda text: 0)
    # Old domains can still be asked for.
    run("targets", str(place), "--tokens", "1e6", "--output", str(output), "--domain", "old")
    assert list(json.loads(output.read_text())["targets"]) == ["old"]
    with pytest.raises(UserError, match="domain 'watched' 0 times"):
        run("targets", str(place), "--tokens", "1e6", "--output", str(output), "--domain", "watched")


@pytest.mark.parametrize("mixer", ["velocitune", "dynamic_batch_loading"])
def test_a_file_of_targets_may_hold_more_domains_than_the_stage_weighs(mixer: str, tmp_path: Path) -> None:
    folder = pilot(tmp_path / "elsewhere", is_run=False)
    targets = {"a": 1.4, "b": 0.9, "old": 1.9}
    (tmp_path / "targets.json").write_text(json.dumps({"targets": targets}))
    place = str(folder / "evaluation.jsonl")
    for text in (str(tmp_path / "targets.json"), json.dumps(targets)):
        given = ["--targets", text, "--initial", json.dumps({"a": 5, "b": 5, "old": 5})]
        assert len(simulate(mixer, place, *given, weights={"a": 6, "b": 4})) == 12
    with pytest.raises(UserError, match=r"--targets names 'bb'(.|\n)*did you mean 'b'"):
        simulate(mixer, place, "--targets", json.dumps({**targets, "bb": 1}), weights={"a": 6, "b": 4})
    with pytest.raises(UserError, match="--targets has no value for domain 'b'"):
        simulate(mixer, place, "--targets", '{"a": 1, "old": 2}', weights={"a": 6, "b": 4})

    def mixture(value: Any) -> MixtureConfig:
        return MixtureConfig.model_validate({"mixer": mixer, mixer: {"targets": value}})

    built = build_mixer(mixture(str(tmp_path / "targets.json")), ["b", "a"], np.ones(2), lambda text: 0)
    assert built.targets.tolist() == [0.9, 1.4]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="targets names 'old'"):  # what is given in place is meant as it stands
        build_mixer(mixture(targets), ["a", "b"], np.ones(2), lambda text: 0)
    with pytest.raises(UserError, match="targets has no value for domain 'c'"):
        build_mixer(mixture(str(tmp_path / "targets.json")), ["a", "c"], np.ones(2), lambda text: 0)


def made_run(folder: Path, steps: int = 30, batch: int = 6) -> None:
    """A run folder as training leaves it, with one change of weights inside a batch."""
    domains = [SampledDomain("a", 40, "content a"), SampledDomain("b", 500, "content b")]
    sampler, log = Sampler(domains, 7, quantise([1, 1])), WeightLog(folder / "mixture.jsonl")
    log.append(0, {"a": TOTAL // 2, "b": TOTAL // 2}, "start")
    log.append(50, {"a": TOTAL // 4, "b": 3 * TOTAL // 4}, "later")
    sampler.schedule_weights(quantise([1, 3]), 50)
    draws = [sampler.draw(batch) for _ in range(steps)]
    lines = [{"step": i, "sample_hash": sample_hash(["a", "b"], draw)} for i, draw in enumerate(draws, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump({"batch": {"global_batch_size": batch}}))
    checkpoint = folder / "checkpoints" / "step-30"
    checkpoint.mkdir(parents=True)
    state = {
        "step": steps, "tokens": steps * batch, "learning_rate": 0.1, "sampler": sampler.state_dict(), "hooks": {},
        "architecture": {}, "layout": None, "engine": "megatron", "precision": "float32",
    }  # fmt: skip
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_an_audit_agrees_with_an_honest_run(tmp_path: Path) -> None:
    made_run(tmp_path)
    found = json.loads(run("audit", str(tmp_path), "--json"))
    assert (found["steps"], found["compared"], found["different"]) == (30, 30, [])
    # 50 samples at 1/2 and 130 at 1/4 are 57.5 of domain a, which has 40 windows.
    drawn = found["domains"]["a"]["drawn"]
    assert drawn in (57, 58) and found["domains"]["b"]["drawn"] == 180 - drawn
    assert found["domains"]["a"]["different"] == 40 and found["domains"]["a"]["most_repeated"] == 2
    assert found["domains"]["b"]["most_repeated"] == 1
    assert found["domains"]["a"]["fresh"] == 40
    assert found["domains"]["a"]["effective"] == pytest.approx(effective_tokens(40, drawn / 40), abs=0.05)


def test_an_audit_finds_a_step_that_saw_something_else(tmp_path: Path) -> None:
    made_run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[4], lines[5] = json.dumps({"step": 5, "sample_hash": "0" * 32}), lines[5]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = CliRunner().invoke(app, ["audit", str(tmp_path), "--json"])
    assert result.exit_code == 1 and json.loads(result.output)["different"] == [5]


def test_an_audit_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run with a checkpoint"):
        run("audit", str(tmp_path))
    with pytest.raises(UserError, match="no entry for sample 0"):
        audit({"seed": 1, "domains": []}, [], {1: "x"}, 1)
