"""What a user can get wrong: one message that names the value and the fix, status 2, no stack trace, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from patience import PATIENCE
from rewarm.data.indexed import IndexedWriter, token_dtype
from system.conftest import Workplace, write_domain

MISTAKES = {
    "missing tokenizer": (["tokenizer=nowhere"], ["tokenizer=nowhere", "no such folder"]),
    "misspelt key": (["optimizer.nam=sgd"], ["unknown setting optimizer.nam", "optimizer.name"]),
    "misspelt section": (["optimiser.name=sgd"], ["optimiser", "did you mean optimizer"]),
    "wrong parent": (["parent=runs/none"], ["parent=runs/none", "no such folder"]),
    "parent that is no run": (["parent=."], ["neither a run", "Hugging Face folder"]),
    "ranks and heads": (["parallel.tensor=3"], ["parallel.tensor=3", "num_attention_heads=4"]),
    "ranks and layers": (["parallel.pipeline=3"], ["parallel.pipeline=3", "num_layers=4"]),
    "ranks and batch": (["parallel.data=3"], ["global_batch_size=8", "3 data-parallel ranks"]),
    "missing domain": (["data.threes=nothing"], ["data.threes.path=nothing", "nothing.bin"]),
    "domain smaller than the batch": (["batch.global_batch_size=4096"], ["windows", "one step takes"]),
    "empty domain": (["data.threes=empty"], ["empty", "split"]),
    "truncated .bin": (["data.threes=cut"], ["cut.bin", "bytes"]),
    "unwritable run folder": (["runs_folder=/proc/nowhere"], ["/proc/nowhere", "cannot be written"]),
    "no such override": (["batch"], ["not of the form a.b.c=value"]),
    "contradiction": (["parallel.sequence=true"], ["parallel.sequence=true", "parallel.tensor=1"]),
    "ignored setting": (["model={num_layers: 2}"], ["model is ignored with parent=runs/base"]),
    "replay of the unknown": (["replay.domains={countin: 1}"], ["countin", "counting"]),
    "window longer than the domain": (["batch.sequence_length=4000"], ["less than one window"]),
    "offload without state": (
        ["offload.mode=cpu", "optimizer={name: sgd, beta1: 0.9}"],
        ["offload.mode=cpu moves the state of AdamW", "optimizer.name=sgd"],
    ),
    "offload without room": (
        ["offload={mode: cpu, host_memory: 1e-6}"],
        ["offload.mode=cpu needs", "of host memory per rank", "mode=auto or nvme"],
    ),
    "too many passes": (["data.threes.max_epochs=0.01"], ["max_epochs=0.01", "threes"]),
}


@pytest.fixture(scope="module")
def place(trained: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A copy of the trained workplace with damaged domains in it."""
    folder = tmp_path_factory.mktemp("bad") / "place"
    shutil.copytree(trained.folder, folder)
    write_domain(folder / "empty", 5, num_documents=0)
    write_domain(folder / "cut", 5)
    os.truncate(folder / "cut.bin", 100)
    return Workplace(folder)


def check_message(output: str, *parts: str) -> None:
    """One message, with the parts and without a stack trace."""
    assert output.count("rewarm: ") == 1, output
    assert "Traceback" not in output, output
    assert "fix: " in output, output
    for part in parts:
        assert part in output, output


def test_a_hugging_face_folder_has_no_optimizer_state_to_keep(place: Workplace) -> None:
    place.run("export", "runs/base", "--output", "exported")
    output = place.run("train", "continue.yaml", "parent=exported", "optimizer_state=keep", expect=2)
    check_message(output, "optimizer_state=keep", "parent=exported", "Hugging Face folder")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_by_name(place: Workplace, mistake: str) -> None:
    arguments, parts = MISTAKES[mistake]
    check_message(place.run("train", "continue.yaml", "name=bad", *arguments, expect=2), *parts)


@pytest.mark.parametrize("layout", [[], ["parallel.data=2"]])
def test_a_parent_whose_content_changed(workplace: Workplace, layout: list[str]) -> None:
    """One flipped bit in the weights, no size changed."""
    newest = workplace.folder / "runs" / "base" / "checkpoints" / "step-12"
    shard = max(newest.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    output = workplace.run("train", "continue.yaml", *layout, expect=2)
    check_message(output, "step-12", "is damaged", shard.name)


def test_optimizer_state_of_a_parent_that_has_none(place: Workplace) -> None:
    if not (place.folder / "exported").exists():
        place.run("export", "runs/base", "--output", "exported")
    arguments = ["parent=exported", "optimizer_state=keep"]
    check_message(place.run("train", "continue.yaml", "name=bad", *arguments, expect=2), "optimizer_state=keep")


def test_a_diverged_run_ends_with_a_message(place: Workplace) -> None:
    """Its updates are skipped, one after another: going on to the end would look like success."""
    output = place.run("train", "base.yaml", "name=diverged", "schedule.peak=1e38", "duration=40 steps", expect=2)
    check_message(output, "not finite", "in a row")
    assert "update skipped" in output


def test_ranks_that_torchrun_started_must_divide(place: Workplace) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "rewarm"]
    ran = subprocess.run(
        [*command, "train", "continue.yaml", "name=bad", "parallel.tensor=2"],
        cwd=place.folder, env=place.environment(), text=True, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    assert ran.returncode != 0
    assert "3 ranks cannot be shared by parallel.tensor=2" in ran.stderr


def test_tokenizer_of_another_vocabulary(place: Workplace) -> None:
    """A domain that was built with a larger tokenizer than the model has rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    larger = place.folder / "larger"
    larger.mkdir()
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(500)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(larger / "tokenizer.json"))
    (larger / "tokenizer_config.json").write_text('{"eos_token": "w1"}')
    (place.folder / "words.txt").write_text(
        "\n".join(" ".join(f"w{n * k % 500}" for n in range(80)) for k in range(60))
    )
    place.run("data", "build", "words.txt", "--output", "words", "--tokenizer", "larger", "--held-out", "0.2",
              "--text-document", "line")  # fmt: skip
    output = place.run("train", "continue.yaml", "name=bad", "data.threes=words", expect=2)
    check_message(output, "500", "300", "words")
    check_message(place.run("train", "continue.yaml", "name=bad", "tokenizer=larger", expect=2), "larger", "300")


def test_token_ids_beyond_the_model_are_named_when_read(place: Workplace) -> None:
    output = place.run("train", "base.yaml", "name=bad", "model.vocab_size=100", expect=2)
    check_message(output, "counting", "token id", "100 rows")


@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"]])
def test_held_out_token_ids_beyond_the_model_are_named(place: Workplace, layout: list[str]) -> None:
    """Split over tensor ranks the embedding takes them for another rank's: the loss would be finite and wrong."""
    writer = IndexedWriter(place.folder / "high", token_dtype(2000))
    writer.add(np.arange(600, 1800).astype(token_dtype(2000)), [1200])
    writer.close()
    output = place.run("train", "continue.yaml", "name=bad", "data.threes.held_out=high", *layout, expect=2)
    check_message(output, "threes", "held-out", "token id", "300 rows")


def test_debug_shows_the_stack(place: Workplace) -> None:
    output = place.run("train", "continue.yaml", "name=bad", "parent=runs/none", "--debug", expect=2)
    assert "Traceback" in output and "parent=runs/none" in output


@pytest.fixture
def small(workplace: Workplace) -> Iterator[Path]:
    """A file system of its own, small enough to be filled."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = workplace.folder / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("layout", [[], ["parallel.data=2"]])
def test_full_disk_while_saving_loses_nothing(workplace: Workplace, small: Path, layout: list[str]) -> None:
    """The disk fills up while the run trains; what was saved stays whole, and the run goes on once there is space."""
    arguments = [
        "train",
        "continue.yaml",
        "runs_folder=small",
        "duration=3000 steps",
        "evaluation.interval=null",
        *layout,
    ]
    checkpoints = small / "continue" / "checkpoints"
    process = workplace.start(*arguments)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (checkpoints / "latest").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.01)
        with pytest.raises(OSError, match="No space"), open(small / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(1 << 14))
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 2, output
    check_message(output, "No space left on device")
    saved = sorted(path.name for path in checkpoints.iterdir())
    assert saved[0] == "latest" and 1 <= len(saved[1:]) <= 2 and all(name.startswith("step-") for name in saved[1:])
    (small / "filler").unlink()
    stopped = max(int(name.removeprefix("step-")) for name in saved[1:])
    workplace.run(*arguments, f"stop_at={stopped + 6} steps")
    lines = [json.loads(line) for line in (small / "continue" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, stopped + 7))


def test_a_resume_with_another_recipe_is_refused(workplace: Workplace) -> None:
    workplace.run("train", "continue.yaml", "stop_at=3 steps")
    before = Path(workplace.folder / "runs" / "continue" / "metrics.jsonl").read_bytes()
    output = workplace.run("train", "continue.yaml", "schedule.peak=1", expect=2)
    check_message(output, "schedule.peak=0.003", "schedule.peak=1", "parent: ")
    output = workplace.run("train", "continue.yaml", "seed=7", expect=2)
    check_message(output, "seed=1234", "seed=7")
    assert Path(workplace.folder / "runs" / "continue" / "metrics.jsonl").read_bytes() == before
