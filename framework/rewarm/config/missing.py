"""What a configuration names and is not on this machine."""

from __future__ import annotations

from pathlib import Path

from rewarm.config.run import RunConfig


def missing_paths(config: RunConfig) -> list[str]:
    """Settings that name what is not there, without opening anything; the way to look at a configuration elsewhere
    than where it will run."""
    named = {"parent": config.parent, "tokenizer": config.tokenizer}
    for name, domain in config.data.items():
        named |= {f"data.{name}.path": domain.path, f"data.{name}.held_out": domain.held_out}
    named |= {f"replay.paths.{name}": path for name, path in config.replay.paths.items()}
    for setting in ("targets", "reference"):
        value = getattr(config.mixture.settings, setting, None)
        named[f"mixture.{config.mixture.mixer}.{setting}"] = value if isinstance(value, str) else None
    named |= {"deepspeed.json_file": config.deepspeed.json_file, "offload.profile": config.offload.profile}
    named |= {f"offload.nvme_paths.{index}": path for index, path in enumerate(config.offload.nvme_paths)}
    return [f"{setting}={path}" for setting, path in named.items() if path is not None and not _is_there(path)]


def _is_there(path: str) -> bool:
    """A folder or a file, or the prefix of a pair of token files."""
    return Path(path).exists() or Path(f"{path}.bin").exists()
