"""Planned memory against figures from papers and counts from other code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rewarm.config.load import build
from rewarm.config.run import RunConfig
from rewarm.engine.layout import check_layout
from rewarm.errors import UserError
from rewarm.launch.batch_script import JobRequest
from rewarm.launch.submit import check_cluster
from rewarm.model.architecture import Architecture
from rewarm.model.description import HuggingFaceModel, from_scratch
from rewarm.planner.cluster import Cluster, load_cluster
from rewarm.planner.memory import GIB, check_memory, plan_memory
from rewarm.planner.zero import count_parameters, state_bytes

LLAMA_3_8B = {
    "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
H100 = Cluster(name="h100", gpus_per_node=8, gpu_memory=79.1)


def settings(**changes: Any) -> tuple[RunConfig, Architecture]:
    values = {
        "name": "plan", "data": {"x": "x"}, "model": LLAMA_3_8B, "precision": "bfloat16",
        "batch": {"sequence_length": 8192, "global_batch_size": 64, "micro_batch_size": 1}, **changes,
    }  # fmt: skip
    config = build(values)
    assert config.model is not None
    return config, Architecture.from_config(config.model, 128256)


def test_bytes_per_parameter_of_a_whole_model() -> None:
    config, architecture = settings()
    (memory,) = plan_memory(config, architecture, check_layout(config, architecture, 1))
    # 8,030,261,248 parameters, as published with the model; 2 + 4 + 12 bytes each.
    assert memory.parameters + memory.gradients + memory.optimizer == 18 * 8_030_261_248


def test_stages_hold_the_whole_model_together() -> None:
    config, architecture = settings(parallel={"pipeline": 4, "tensor": 2})
    stages = plan_memory(config, architecture, check_layout(config, architecture, 8))
    norms = 32 * 2 * 4096 + 4096  # a copy on either tensor rank
    # Two bytes each, over one of two tensor ranks.
    assert sum(stage.parameters for stage in stages) == 8_030_261_248 + norms
    # 1F1B: the first stage holds four micro-batches, the last one.
    assert stages[0].activations == 4 * stages[3].activations


def test_what_does_not_fit_is_refused_with_the_setting_that_helps() -> None:
    config, architecture = settings()
    with pytest.raises(UserError, match="but a GPU of h100 has 79.1 GiB") as error:
        check_memory(config, architecture, check_layout(config, architecture, 1), H100)
    assert "activation_recomputation=full" in str(error.value.fix) or "parallel" in str(error.value.fix)
    config, architecture = settings(activation_recomputation="full", parallel={"tensor": 2})
    layout = check_layout(config, architecture, 8)
    assert "usable on h100" in check_memory(config, architecture, layout, H100)


def test_recomputation_and_tensor_ranks_save() -> None:
    def activations(**changes: Any) -> int:
        config, architecture = settings(**changes)
        layout = check_layout(config, architecture, config.parallel.model_ranks)
        return plan_memory(config, architecture, layout)[0].activations

    plain = activations()
    assert activations(activation_recomputation="full") < plain / 10
    assert activations(parallel={"tensor": 4, "sequence": True}) == pytest.approx(plain / 4, rel=0.01)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shares_what_the_paper_says(stage: int) -> None:
    # Figure 1 of the paper: 7.5e9 parameters, 64 ranks: 31.4, 16.6 and 1.9 GB.
    config, _ = settings(engine="deepspeed", deepspeed={"zero_stage": stage})
    architecture = settings()[1]
    layout = check_layout(config, from_scratch(architecture, "deepspeed", "bfloat16"), 64)
    total = sum(state_bytes(config, 7_500_000_000, layout).values()) / 1e9
    assert total == pytest.approx({1: 31.4, 2: 16.6, 3: 1.9}[stage], abs=0.06)


def test_parameters_of_a_family_without_a_mapping() -> None:
    values = {"model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
    layer = 4 * 64 * 64 + 4 * 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64
    assert count_parameters(HuggingFaceModel(values)) == 2 * 64 * 100 + 2 * layer + 2 * 64
    assert count_parameters(HuggingFaceModel({"model_type": "unheard_of"})) is None


def test_a_job_that_the_nodes_cannot_serve() -> None:
    config, architecture = settings(parallel={"tensor": 8})
    request = JobRequest(2, 8, 8, "10")
    assert "planned memory" in check_cluster(config, architecture, request, H100)[0]
    with pytest.raises(UserError, match="more than the 4 of small"):
        check_cluster(config, architecture, request, H100.model_copy(update={"name": "small", "gpus_per_node": 4}))
    with pytest.raises(UserError, match="this job has none"):
        check_cluster(config, architecture, JobRequest(2, 8, 0, "10"), H100)
    zero, _ = settings(engine="deepspeed", deepspeed={"zero_stage": 1})
    model = from_scratch(architecture, "deepspeed", "bfloat16")
    assert "without activations" in check_cluster(zero, model, request, H100)[0]
    tiny = H100.model_copy(update={"gpu_memory": 16.0})
    with pytest.raises(UserError, match="take at least"):
        check_cluster(zero, model, request, tiny)


def test_a_cluster_file(tmp_path: Path) -> None:
    example = Path(__file__).parents[3] / "configs" / "clusters" / "h100-8x80gb.yaml"
    assert load_cluster(example).gpu_memory * GIB < 86e9
    path = tmp_path / "cluster.yaml"
    path.write_text("name: odd\ngpus_per_node: 0\ngpu_memory: 80\n")
    with pytest.raises(UserError, match="gpus_per_node"):
        load_cluster(path)
    path.write_text("name: odd\ngpus_per_node: 8\ngpu_memory: 80\nracks: 2\n")
    with pytest.raises(UserError, match="racks"):
        load_cluster(path)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"mode": "cpu"}, 0),
        ({"mode": "auto"}, 0),  # as little as that, if need be
        ({"mode": "streamed", "slots": 2, "subgroup_size": 10_000_000}, 12 * 20_000_000),
        ({"mode": "streamed"}, 12 * 150_000_000),
        ({"mode": "twinflow", "resident_fraction": 0.25}, 3 * 8_030_261_248),
    ],
)
def test_offloaded_state_leaves_the_device(section: dict[str, Any], expected: int) -> None:
    config, architecture = settings(offload=section)
    (memory,) = plan_memory(config, architecture, check_layout(config, architecture, 1))
    assert memory.optimizer == expected


@pytest.mark.parametrize(
    ("precision", "offload", "kept"),
    [
        ("bfloat16", {}, 4 + 2 + 8 / 2048),
        ("float32", {}, 2 + 8 / 2048),  # an fp32 parameter is its own main parameter
        ("bfloat16", {"mode": "twinflow", "resident_fraction": 0.5}, 3 + 4 / 2048),
    ],
)
def test_8_bit_moments_take_two_bytes_and_their_scales(precision: str, offload: dict[str, Any], kept: float) -> None:
    config, architecture = settings(precision=precision, offload=offload, optimizer={"name": "adamw_8bit"})
    (memory,) = plan_memory(config, architecture, check_layout(config, architecture, 1))
    assert memory.optimizer == round(kept * 8_030_261_248)
    zero, _ = settings(engine="deepspeed", optimizer={"name": "adamw_8bit"})
    layout = check_layout(zero, from_scratch(architecture, "deepspeed", "bfloat16"), 1)
    assert state_bytes(zero, 1 << 20, layout)["optimizer"] == (4 + 2 + 8 / 2048) * (1 << 20)


@pytest.mark.parametrize(("stage", "kept"), [(0, 0), (1, 4), (3, 4)])
def test_deepspeed_keeps_its_fp32_parameters_on_the_device(stage: int, kept: int) -> None:
    """What plain ZeRO keeps is 12 bytes per parameter, 8 at stage 0."""
    config, architecture = settings(
        engine="deepspeed", precision="float32", offload={"mode": "cpu"}, deepspeed={"zero_stage": stage}
    )
    layout = check_layout(config, from_scratch(architecture, "deepspeed", "float32"), 1)
    assert state_bytes(config, 1_000_000, layout)["optimizer"] == kept * 1_000_000
