"""What a user can get wrong with the deepspeed engine, and Python files of a model, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from system.conftest import BASE, VOCAB, Workplace, write_domain
from system.homegrown import write_homegrown
from system.test_bad_input import check_message

STAGE = BASE.replace("name: base", "name: own\nengine: deepspeed\nparent: homegrown").replace(
    BASE[BASE.index("model:") : BASE.index("duration:")], ""
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("own"))
    write_domain(place.folder / "counting", 1)
    write_homegrown(place.folder / "homegrown", VOCAB)
    (place.folder / "own.yaml").write_text(STAGE)
    return place


MISTAKES = {
    "code that is not trusted": ([], ["'homegrown' model in", "trust_remote_code=true"]),
    "pipeline": (["parallel.pipeline=2", "deepspeed.zero_stage=2"], ["parallel.pipeline=2", "engine=megatron"]),
    "tensor": (["parallel.tensor=2", "deepspeed.trust_remote_code=true"], ["parallel.tensor=2", "homegrown"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_by_name(place: Workplace, mistake: str) -> None:
    arguments, parts = MISTAKES[mistake]
    check_message(place.run("train", "own.yaml", *arguments, expect=2), *parts)


def test_code_of_a_trusted_model_trains_and_is_exported(place: Workplace) -> None:
    """Two ranks under stage 3; the engine's losses are those of transformers, which runs the exported files."""
    trusted = ["deepspeed.trust_remote_code=true", "deepspeed.zero_stage=3", "parallel.data=2", "stop_at=4 steps"]
    place.run("train", "own.yaml", *trusted)
    before, after = (place.lines("own", "evaluation.jsonl")[index] for index in (0, -1))
    assert after["domains"]["counting"]["loss"] < before["domains"]["counting"]["loss"]
    assert "trust_remote_code: true" in (place.folder / "runs/own/config.yaml").read_text()
    for command in (["export", "runs/own", "--output", "out"], ["evaluate", "runs/own"]):
        check_message(place.run(*command, expect=2), "'homegrown' model in", "on the command line")
    output = place.run("export", "runs/own", "deepspeed.trust_remote_code=true", "--output", "out", "--check")
    assert "exported" in output
    files = {path.name for path in Path(place.folder / "out").iterdir()}
    assert {"modeling_homegrown.py", "configuration_homegrown.py", "model.safetensors"} <= files
