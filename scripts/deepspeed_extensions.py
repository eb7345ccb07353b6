"""Compile the extensions that DeepSpeed would otherwise compile at the start of the first run that needs them.

    python scripts/deepspeed_extensions.py [cpu_adam] [async_io]

Into ~/.cache/rewarm/deepspeed, or the folder that EXTENSIONS names. cpu_adam is for deepspeed.offload_ratio below 1;
async_io, which needs libaio's headers, for offload to nvme. Both without arguments.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from rewarm.config.deepspeed import DeepSpeedConfig
from rewarm.engine.deepspeed.extensions import is_built, prepare_extensions
from rewarm.errors import UserError

SETTINGS: dict[str, dict[str, Any]] = {
    "cpu_adam": {"offload_optimizer": "cpu", "offload_ratio": 0.5},
    "async_io": {"offload_optimizer": "nvme", "nvme_path": "."},
}


def main() -> None:
    """Build what was named."""
    for name in sys.argv[1:] or list(SETTINGS):
        if name not in SETTINGS:
            sys.exit(f"{name} is none of {', '.join(SETTINGS)}")
        place = {"zero_stage": 3, "build_timeout": 60, "extensions_folder": os.environ.get("EXTENSIONS")}
        settings = DeepSpeedConfig.model_validate({**place, **SETTINGS[name]})
        try:
            prepare_extensions(settings)
        except UserError as error:
            sys.exit(f"{name}: {error}")
        assert is_built(name, settings)
        print(f"{name} is built")


if __name__ == "__main__":
    main()
