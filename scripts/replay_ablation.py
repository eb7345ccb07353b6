"""How much of the forgetting does replay prevent, and what does it cost? The quickstart's second stage, several times.

    python scripts/replay_ablation.py                    # 0% and 5%, same seed; about 3 minutes on 2 cores
    python scripts/replay_ablation.py 0 0.01 0.05 0.25   # a ladder
    python scripts/replay_ablation.py --seed 7

Needs the quickstart's first stage (``bash scripts/quickstart.sh``); what is missing of it is made. Every arm continues
the same checkpoint with the same seed and the same number of tokens: replay takes its share from the new domains. The
exit status is 1 if continuing does not gain 0.3 nats on every new domain, or 5% leaves half of the forgetting of 0%.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEW, OLD = ("python", "cpp"), "english"


def rewarm(*arguments: str) -> None:
    """Run the command line from the project's root; what it prints is shown."""
    subprocess.run([sys.executable, "-m", "rewarm", *arguments], cwd=ROOT, check=True)


def change(run: str) -> dict[str, float]:
    """Nats per token that each domain's held-out loss rose by from the first to the last evaluation of a run."""
    lines = [json.loads(line) for line in (ROOT / "runs" / run / "evaluation.jsonl").read_text().splitlines()]
    first, last = lines[0]["domains"], lines[-1]["domains"]
    return {name: last[name]["loss"] - first[name]["loss"] for name in first}


def main() -> int:
    """Train the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fractions", nargs="*", type=float, default=[0.0, 0.05], help="replay fractions [0 0.05]")
    parser.add_argument("--seed", type=int, default=1234, help="seed of every arm [1234]")
    options = parser.parse_args()
    rewarm("data", "demo")
    rewarm("train", "configs/quickstart/base.yaml")
    changes = {}
    for fraction in options.fractions:
        run = f"replay-{fraction:g}-seed-{options.seed}"
        rewarm("train", "configs/quickstart/continue.yaml", f"name={run}", f"replay.fraction={fraction:g}",
               f"seed={options.seed}", "tracking.wandb.mode=disabled")  # fmt: skip
        changes[fraction] = change(run)
    print(f"\nchange of held-out loss in nats per token, seed {options.seed} (negative: learned, positive: forgot)")
    print(f"{'replay':>8} " + " ".join(f"{name:>9}" for name in (OLD, *NEW)))
    for fraction, rise in changes.items():
        print(f"{fraction:>8.0%} " + " ".join(f"{rise[name]:>+9.4f}" for name in (OLD, *NEW)))
    return judge(changes)


def judge(changes: dict[float, dict[str, float]]) -> int:
    """Say whether the two promises hold; 0 if they do."""
    gain = min(-rise[name] for rise in changes.values() for name in NEW)
    print(f"\nsmallest gain on a new domain: {gain:.3f} nats (promised: 0.3)")
    status = 0 if gain >= 0.3 else 1
    if 0.0 in changes and 0.05 in changes:
        left = changes[0.05][OLD] / changes[0.0][OLD]
        print(f"forgetting that 5% replay leaves of that of 0%: {left:.2f} (promised: below 0.5)")
        status |= 0 if left < 0.5 else 1
    return status


if __name__ == "__main__":
    sys.exit(main())
