"""The curves that wandb and TensorBoard draw, from the lines of the run's own files.

Names group a panel by quantity: ``loss/english``, ``loss/python`` and ``held_out_loss/english``.
"""

from __future__ import annotations

from rewarm.tracking.metrics import EvaluationLine, MetricsLine


def metrics_scalars(line: MetricsLine) -> dict[str, float]:
    """Curves of a metrics line; what has no value (a domain without tokens, a loss that is not finite) is left out."""
    scalars: dict[str, float | None] = {
        "tokens": line["tokens"],
        "loss": line["loss"],
        "learning_rate": line["learning_rate"],
        "grad_norm": line["grad_norm"],
        "tokens_per_second": line["tokens_per_second"],
    }
    for name, domain in line["domains"].items():
        scalars[f"loss/{name}"] = domain["loss"]
        scalars[f"weight/{name}"] = domain["weight"]
        scalars[f"objective/{name}"] = domain.get("objective")
    return {name: value for name, value in scalars.items() if value is not None}


def evaluation_scalars(line: EvaluationLine) -> dict[str, float]:
    """Curves of an evaluation line."""
    scalars: dict[str, float | None] = {}
    for name, domain in line["domains"].items():
        scalars[f"held_out_loss/{name}"] = domain["loss"]
        scalars[f"held_out_bits_per_byte/{name}"] = domain["bits_per_byte"]
    return {name: value for name, value in scalars.items() if value is not None}
