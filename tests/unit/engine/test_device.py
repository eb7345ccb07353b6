"""What the device module says without a device, and the table of peaks."""

from __future__ import annotations

import pytest
import torch

from rewarm.engine import device


def test_random_state_is_restored() -> None:
    state = device.rng_state()
    first = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_without_a_gpu() -> None:
    assert device.local_device() == torch.device("cpu")
    assert device.communication_backend() == "gloo"
    assert device.peak_memory() > 10 * 2**20
