"""Layers of Transformer Engine's layout have every norm, the right names, and train the same model.

Its kernels are not here: a stand-in has its class layout in plain torch (``tests/stand_ins``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]


def test_layers_of_its_layout_train_the_same_model(tmp_path: Path) -> None:
    """Under ``python -O`` too, which is the harder case: a missing norm was an assert's to find."""
    paths = [str(TESTS / "stand_ins"), str(TESTS), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-O", "-m", "ranks.transformer_engine", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1:] == ["same"], done.stdout + done.stderr
