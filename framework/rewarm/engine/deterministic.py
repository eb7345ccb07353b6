"""Asking for the same bits every time: from torch, and from the libraries below it through their variables.

On a CPU a run has the same bits without it. On a GPU some kernels add in the order in which threads happen to come.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from rewarm.errors import UserError

_WANTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", (":16:8",)),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", ()),
    "FLASH_ATTENTION_DETERMINISTIC": ("1", ()),
    # NVLink's switches (NVLS) add in no fixed order; a ring and a tree do.
    "NCCL_ALGO": (
        "Ring",
        ("Tree", "CollnetDirect", "CollnetChain", "^NVLS", "^NVLS,NVLSTree", "Ring,Tree", "Tree,Ring"),
    ),
    "NCCL_NVLS_ENABLE": ("0", ()),
}
"""Variable -> what it is set to, and what else is left as it is. cuBLAS reads its own when it first computes, NCCL when
ranks meet: set them before."""


def prepare_environment(deterministic: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what libraries read when they start. To be called before the GPU is first used; no torch.

    Raises:
        UserError: if a variable was set to something else.
    """
    if not deterministic:
        return
    for name, (value, others) in _WANTED.items():
        found = environment.setdefault(name, value)
        if found.lower() not in (value.lower(), *(other.lower() for other in others)):
            raise UserError(
                f"deterministic=true, but {name}={found} lets results differ from run to run",
                fix=f"unset {name}, or set it to {value}",
            )


def prepare(deterministic: bool) -> None:
    """Ask torch too: what cannot be computed in a fixed order becomes an error, and the attention kernels' backward
    passes add in one order.

    Raises:
        UserError: see :func:`prepare_environment`.
    """
    prepare_environment(deterministic)
    if not deterministic:
        return
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # torch's flash and memory-efficient attention obey the flag above; whether cuDNN's does depends on its version.
    torch.backends.cuda.enable_cudnn_sdp(False)
