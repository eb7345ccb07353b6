"""Each patch of Megatron-Core is still needed: without it, the plain package fails. A test that fails here means that
upstream has mended something and a patch can go."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
import torch

from patience import PATIENCE

PROBE = r"""
import inspect, json, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
from megatron.core import jit, parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import distrib_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import layers, random
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer.torch_norm import WrappedTorchNorm

def fails(action):
    try:
        action()
    except Exception:
        return True
    return False

parallel_state.initialize_model_parallel()
class Config:
    calculate_per_token_loss = timers = no_sync_func = None
model = torch.nn.Linear(1, 1)
model.config = Config()
print(json.dumps({
    "devices": fails(lambda: torch.zeros(1, device="cuda")) and fails(lambda: schedules.forward_backward_no_pipelining(
        forward_step_func=None, data_iterator=None, model=model, num_microbatches=1, seq_length=1, micro_batch_size=1)),
    "random state": fails(lambda: random.model_parallel_cuda_manual_seed(1)),
    "type names": "'torch.cuda.FloatTensor'" in inspect.getsource(distrib_optimizer.DistributedOptimizer),
    "tied embeddings": ".cuda()" in inspect.getsource(LanguageModule.setup_embeddings_and_output_layer),
    "compilation at import": "torch._dynamo" in sys.modules and jit.jit_fuser is torch.compile,
    "optimizer state layout": not distrib_optimizer.HAVE_APEX_OR_TE,
    "checkpoint manager": 'get_context("spawn")' in inspect.getsource(filesystem_async),
    "norm": "sequence_parallel" in inspect.getsource(WrappedTorchNorm),
}))
"""


@cache
def _plain() -> dict[str, bool]:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=PATIENCE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is patched")
@pytest.mark.parametrize(
    "patch",
    [
        "devices",
        "random state",
        "type names",
        "tied embeddings",
        "compilation at import",
        "optimizer state layout",
        "checkpoint manager",
        "norm",
    ],
)
def test_the_plain_package_still_needs_the_patch(patch: str) -> None:
    assert _plain()[patch]


def test_nothing_outside_megatron_sees_the_stand_in() -> None:
    import megatron.core.pipeline_parallel.schedules as schedules

    import rewarm.engine.megatron  # noqa: F401  (installs)

    assert sys.modules["torch"] is torch
    if not torch.cuda.is_available():
        assert schedules.torch is not torch
        assert schedules.torch.zeros(1, device="cuda").device.type == "cpu"
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1, device="cuda")
