"""Remakes the committed losses of tests/losses after a change that is meant to change them, and commits them.

    python scripts/update_losses.py "why the losses change"

The commit says for every case how much its losses changed. Without a reason it only prints the changes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "framework"), str(ROOT / "tests")]


def main() -> None:
    """Measure every case, write the files, commit them."""
    from ranks import losses

    reason = " ".join(sys.argv[1:])
    lines = []
    for case in losses.CASES:
        steps = losses.measure(case)
        known = (losses.FOLDER / f"{case}.json").is_file()
        change = f"{losses.largest_change(losses.read(case)[1], steps):.1e}" if known else "new"
        lines.append(f"{case}: {change}")
        print(lines[-1], flush=True)
        if reason:
            losses.write(case, steps)
    if not reason:
        print('nothing was written: give the reason to do so, as in: python scripts/update_losses.py "why"')
        return
    subprocess.run(["git", "add", "tests/losses"], cwd=ROOT, check=True)
    body = f"{reason}\n\nLargest relative change of a loss or gradient norm:\n" + "\n".join(lines)
    subprocess.run(["git", "commit", "-m", "Update the committed losses", "-m", body], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
