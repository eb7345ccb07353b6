"""Old domains that are only watched."""

from __future__ import annotations

from system.conftest import Workplace


def test_watched_domains_are_on_the_screen_and_may_move(workplace: Workplace) -> None:
    workplace.run("train", "base.yaml", "name=here", "stop_at=1 steps")
    for suffix in (".bin", ".idx"):
        (workplace.folder / f"counting{suffix}").rename(workplace.folder / f"moved{suffix}")
    train = ("train", "continue.yaml", "parent=runs/here", "replay.fraction=0")
    output = workplace.run(*train, "name=unseen", "stop_at=4 steps")
    assert "not watched for forgetting" in output and "set replay.paths.counting to its new place" in output
    assert set(workplace.lines("unseen", "evaluation.jsonl")[0]["domains"]) == {"threes", "sevens"}
    # A resume may say where it is now, and later rows then have one more column.
    output = workplace.run(*train, "name=unseen", "stop_at=8 steps", "replay.paths.counting=moved")
    header = next(line for line in output.splitlines() if line.split()[:2] == ["step", "tokens"])
    assert header.split()[2:] == ["threes", "sevens", "counting"]
    line = workplace.lines("unseen", "evaluation.jsonl")[-1]
    assert line["step"] == 8 and set(line["domains"]) == {"threes", "sevens", "counting"}
    assert f"{line['domains']['counting']['loss']:.4f}" in output
    assert "stop_at=8 steps); the same command without it goes on" in output
    output = workplace.run(*train, "name=wrong", "replay.paths.couting=moved", expect=2)
    assert "replay.paths names 'couting'" in output and "did you mean 'counting'?" in output
