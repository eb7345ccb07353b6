"""What the device module says without a device, and the table of peaks."""

from __future__ import annotations

import pytest
import torch

from rewarm.engine import device


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H20", 148e12),
        ("Some GPU of tomorrow", None),
    ],
)
def test_peak_flops_by_device_name(name: str, peak: float | None) -> None:
    assert device.peak_flops("bfloat16", name) == peak


def test_random_state_is_restored() -> None:
    state = device.rng_state()
    first = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_without_a_gpu() -> None:
    assert device.local_device() == torch.device("cpu")
    assert device.communication_backend() == "gloo"
    assert device.peak_flops("float32") is None
    assert device.peak_memory() > 10 * 2**20
