"""The description of a cluster: a YAML file beside the configurations, one a kind of node."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from rewarm.config.section import Section
from rewarm.config.yaml_text import read_yaml
from rewarm.errors import UserError


class Cluster(Section):
    """Nodes of one kind."""

    name: str
    """What people call it."""
    nodes: int | None = Field(None, gt=0)
    """How many there are; null means SLURM's partition says."""
    gpus_per_node: int = Field(gt=0)
    """GPUs of a node."""
    gpu_memory: float = Field(gt=0)
    """GiB of one GPU, as torch.cuda.get_device_properties(0).total_memory / 2**30 gives it."""
    reserved: float = Field(0.1, ge=0, lt=1)
    """Share of a GPU's memory that a plan leaves free for the CUDA context, NCCL's buffers, workspaces of kernels and
    fragmentation. A rule of thumb, not measured here."""


def load_cluster(path: str | Path) -> Cluster:
    """Read a description.

    Raises:
        UserError: if the file cannot be read, or a key is unknown, missing or out of range.
    """
    values = read_yaml(path, "cluster file")
    if not isinstance(values, dict):
        raise UserError(f"the cluster file {path} holds no settings", fix="see configs/clusters/ for an example")
    try:
        return Cluster(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where}: {first['msg']}", fix="see configs/clusters/ for an example") from error
