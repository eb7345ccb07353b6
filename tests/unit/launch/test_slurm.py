"""What is read from SLURM, and what is refused before anything is queued."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from rewarm.errors import UserError
from rewarm.launch.batch_script import JobRequest, Places, batch_script
from rewarm.launch.slurm import Partition, choose_partition, count_gpus, parse_time
from rewarm.launch.submit import check_request

BATCH = Partition("batch", True, True, 24 * 3600, 16, 12, 64, 8)


@pytest.mark.parametrize(
    ("text", "seconds"),
    # The examples of sbatch's manual: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
    [("90", 5400), ("2:30", 150), ("8:00:00", 28800), ("1-0", 86400), ("1-12:30", 131400), ("2-01:00:05", 176405)],
)
def test_times(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "8h", "1:2:3:4", "-5", "1.5", "tomorrow", "0", "0:00:00"])
def test_bad_times_say_how_to_write_them(text: str) -> None:
    with pytest.raises(UserError, match="write minutes, H:M:S or D-H:M:S"):
        parse_time(text)


@pytest.mark.parametrize(
    ("gres", "count"),
    [("(null)", 0), ("gpu:8", 8), ("gpu:h100:8(S:0-1)", 8), ("gpu:a100_3g.20gb:4,gpu:a100:2,nvme:1", 6), ("nvme:4", 0)],
)
def test_gpus_of_a_node(gres: str, count: int) -> None:
    assert count_gpus(gres) == count


def test_no_slurm_on_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no SLURM on this host: sinfo is not on the PATH"):
        choose_partition(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 17}, "--nodes 17 is more than the 16 nodes of partition 'batch'"),
        ({"gpus_per_node": 16}, "--gpus-per-node 16, but partition 'batch' has 8 GPUs a node"),
        ({"time": "2-0"}, "--time 2-0 is above the 1440 minutes of partition 'batch'"),
        ({"time": "1", "warning": 90}, "--warning 90 s leaves nothing of --time 1"),
        ({"cpus_per_rank": 16}, "8 ranks a node with 16 CPUs each need 128 CPUs"),
    ],
)
def test_what_the_partition_can_never_serve(changes: dict[str, object], message: str) -> None:
    values = {"nodes": 2, "ranks_per_node": 8, "gpus_per_node": 8, "time": "8:00:00", **changes}
    with pytest.raises(UserError, match=message):
        check_request(JobRequest(**values), BATCH)  # type: ignore[arg-type]


def test_nodes_that_are_down_are_mentioned() -> None:
    request = JobRequest(14, 8, 8, "8:00:00")
    assert check_request(request, BATCH) == ["only 12 nodes of 'batch' are up now: the job will wait for more"]


@pytest.mark.parametrize("container", [None, "/images/rewarm.sif", "nvcr.io#nvidia/pytorch:25.06-py3"])
def test_the_batch_script_is_valid_shell_and_holds_what_was_asked(tmp_path: Path, container: str | None) -> None:
    request = JobRequest(
        4, 8, 8, "12:00:00", "batch", "proj", container, 12, 300, "bad[1-2]", ("qos=high",), "chain"
    )  # fmt: skip
    run = tmp_path / "a run"
    places = Places(run, run / "slurm" / "002", tmp_path, Path("/venv/bin/python"), (tmp_path,))
    text = batch_script(request, places)
    for option in (
        "nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "time=12:00:00", "partition=batch",
        "account=proj", "exclude=bad[1-2]", "signal=USR2@300", "requeue", "open-mode=append",
        "dependency=singleton", "qos=high",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in text
    assert f'#SBATCH --"output={run}/logs/slurm.out"\n' in text  # sbatch ends a word at a space without quotes
    # The arrays as bash reads them, spaces and all.
    body = text[: text.index("source ")] + 'printf "%s\\n" "${launch[@]}" -- "${train[@]}" -- "$run" "$again"'
    shown = subprocess.run(["bash", "-euc", body], capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[0] == "srun" and shown[-1] == "chain" and shown[-2] == str(run)
    train = shown[shown.index("--") + 1 :]
    assert train[1:5] == ["-m", "rewarm", "train", str(run / "slurm" / "002" / "config.yaml")]
    if container is None:
        assert train[0] == "/venv/bin/python"
    else:
        assert any(container in word for word in shown[: shown.index("--")]) and train[0] == "python3"


def test_every_srun_ends_all_tasks_when_one_ends_badly() -> None:
    """Else the others wait in a collective until its time limit; SLURM's default leaves that to the site."""
    root = Path(__file__).parents[3]
    places = [root / "README.md", *(root / "docs" / "guide").glob("*.md"), *(root / "launch").rglob("*")]
    places += [*(root / "framework" / "rewarm" / "cli").rglob("*.py"), root / "framework" / "rewarm/launch/job.sh"]
    call = re.compile(r"(?:^|[\s(`=])srun(?= +(?:-|\"\$|rewarm|python))(.*)")
    calls = [
        (path.name, found[0])
        for path in places
        if path.is_file()
        for line in path.read_text().splitlines()
        if not line.lstrip().startswith("#") and (found := call.search(line))
    ]
    assert len(calls) > 5
    assert [each for each in calls if "--kill-on-bad-exit=1" not in each[1]] == []


@pytest.mark.parametrize("container", [None, "image.sif", "registry#image:1"])
def test_every_srun_of_a_written_script_does_too(container: str | None) -> None:
    request = JobRequest(nodes=2, ranks_per_node=8, gpus_per_node=8, time="1:00:00", container=container)
    places = Places(Path("/r/run"), Path("/r/run/slurm/1"), Path("/w"), Path("/usr/bin/python3"))
    script = batch_script(request, places)
    assert script.count("srun") == script.count("srun --kill-on-bad-exit=1") > 0


def sbatch_word(text: str) -> str:
    """One word of a #SBATCH line as sbatch reads it: quotes of either kind, a backslash that escapes in both."""
    word, quote, escaped = "", "", False
    for letter in text:
        if escaped:
            word, escaped = word + letter, False
        elif letter == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if letter == quote else (word + letter, quote)
        elif letter in "\"'":
            quote = letter
        else:
            assert not letter.isspace(), f"{text!r} is more than one word"
            word += letter
    assert not quote and not escaped
    return word


HOSTILE = [
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "it's",
    'say "x"',
    "a#b",
    "*",
    "-rf",
    "a&b|c>d",
    "$HOME",
    "~",
    "!!",
    "50%j",
    "é",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("container", [None, "image of $(touch pwned).sif", "registry#$(touch pwned):1"])
def test_names_that_mean_something_to_a_shell_mean_nothing_in_the_script(
    tmp_path: Path, name: str, container: str | None
) -> None:
    working, run = tmp_path / name, tmp_path / name / "runs" / "base"
    submission = run / "slurm" / "001"
    stub = submission / "code" / "rewarm" / "launch" / "job.sh"
    stub.parent.mkdir(parents=True)
    stub.write_text('printf "%s\\n" "$run" "$again" "$submission" "$PYTHONPATH" -- "${launch[@]}" -- "${train[@]}"\n')
    mounts = (working,) if container else ()
    request = JobRequest(
        1, 1, 0, "10", account=name, container=container, exclude="n[1-3]", options=(f"comment={name}",)
    )
    places = Places(run, submission, working, working / "venv/bin/python", mounts)
    script = submission / "job.sbatch"
    script.write_text(batch_script(request, places))
    options = [
        sbatch_word(line.removeprefix("#SBATCH ")) for line in script.read_text().splitlines() if "#SBATCH" in line
    ]
    for expected in (f"--chdir={working}", f"--account={name}", f"--comment={name}", "--exclude=n[1-3]",
                     f"--output={str(run).replace('%', '%%')}/logs/slurm.out"):  # fmt: skip
        assert expected in options
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/somebody", "LANG": "C.UTF-8"}
    result = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    shown = result.stdout.splitlines()
    assert shown[:4] == [str(run), "no", "001", str(submission / "code")] and result.stderr == ""
    assert shown[-1] == str(submission / "config.yaml")
    if container is None:
        assert str(working / "venv/bin/python") in shown
    else:
        assert any(container in word for word in shown) and any(f"{working}:{working}" in word for word in shown)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("odd", ["a\ntouch pwned", "a\rb", "a\tb", "a\x1b[31m", "a\u2028b", "a\udcffb"])
def test_a_line_break_and_its_like_are_refused_wherever_they_are(tmp_path: Path, odd: str) -> None:
    plain = Path("/w")
    good = Places(plain / "run", plain / "run/slurm/001", plain, plain / "python", ())
    for change in ({"run": plain / odd}, {"working_directory": plain / odd}, {"python": plain / odd},
                   {"mounts": (plain / odd,)}):  # fmt: skip
        with pytest.raises(UserError, match="cannot be printed") as error:
            batch_script(JobRequest(1, 1, 0, "10"), replace(good, **change))
        assert str(error.value).isascii()
    for option in ({"account": odd}, {"partition": odd}, {"container": odd}, {"exclude": odd}, {"options": (odd,)}):
        with pytest.raises(UserError, match="cannot be printed"):
            batch_script(JobRequest(1, 1, 0, "10", **option), good)  # type: ignore[arg-type]


def test_signs_that_other_programs_would_split_a_path_at_are_refused() -> None:
    request = JobRequest(1, 1, 0, "10", container="image.sif")
    for run, mount, part in (
        ("/a:b/run", "/m", "PYTHONPATH"),
        ("/a\\b/run", "/m", "--output"),
        ("/r", "/a,b", "container"),
    ):
        places = Places(Path(run), Path(run) / "slurm/001", Path("/w"), Path("/python"), (Path(mount),))
        with pytest.raises(UserError, match=part):
            batch_script(request, places)
