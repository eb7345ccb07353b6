"""``rewarm offload`` from profile to picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rewarm.cli.offload import app
from rewarm.errors import UserError
from rewarm.offload.runtime.profile import Profile

CASE = ["--parameters", "2e9", "--forward", "0.1", "--backward", "0.2", "--device-memory", "4"]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile of a machine with one GPU."""
    path = tmp_path / "profile.json"
    rates = {"1048576": 2e9, "16777216": 2.5e9}
    Profile("f", "a machine", 25e9, 24e9, 40e9, 80e9, rates, 2e9, rates, 8e9, 200e9, {}, 1.0).save(path)
    return path


def test_place_holds_the_choice_against_known_systems(profile: Path) -> None:
    result = CliRunner().invoke(app, ["place", *CASE, "--profile", str(profile)], catch_exceptions=False)
    assert result.exit_code == 0
    for word in ("zero_offload", "deep_optimizer_states (k=2)", "streamed", "chosen", "lower bound"):
        assert word in result.output
    result = CliRunner().invoke(app, ["place", *CASE, "--profile", str(profile), "--json"], catch_exceptions=False)
    answer = json.loads(result.output)
    assert answer["bound"] <= answer["seconds"] <= 1.031 * min(row["seconds"] for row in answer["known"])


def test_trace_writes_a_trace_and_a_picture(profile: Path, tmp_path: Path) -> None:
    arguments = ["-o", str(tmp_path / "t.json"), "--png", str(tmp_path / "t.png"), "--set", "mode=streamed"]
    result = CliRunner().invoke(app, ["trace", *CASE, "--profile", str(profile), *arguments], catch_exceptions=False)
    assert result.exit_code == 0 and "100% streamed, split master" in result.output
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {"fetch", "update", "flush", "forward"} <= {event.get("cat") for event in events}
    assert (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--set", "mod=auto"], "did you mean mode"),
        (["--set", "mode=cpu", "--set", "stride=3"], "ignored by offload.mode=cpu"),
        (["--set", "mode=none"], "GB of GPU memory per rank"),
        (["--set", "auto"], "key=value"),
    ],
)
def test_bad_settings_are_explained(profile: Path, extra: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, ["place", *CASE, "--profile", str(profile), *extra], catch_exceptions=False)


def test_without_a_gpu_profile_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="no CUDA device"):
        CliRunner().invoke(app, ["profile"], catch_exceptions=False)
