"""The settings for DeepSpeed: a pure function of the config, also written to the run directory.

No other file knows DeepSpeed's keys. Torch-free: the memory estimate uses the same bounds.
"""

from typing import Any

MAX_BUCKET = 200_000_000  # elements; DeepSpeed's own 5e8 would allocate 2 GB of fp32 for any model


def deepspeed_config(
    *,
    zero_stage: int,
    precision: str,
    clip: float,
    world_size: int,
    num_trainable: int,
    offload: str = "off",
) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`, a pure function of the run's settings.

    Batch sizes are formal: a step's packs vary in number, so `Engine.step` sets the accumulation
    boundary and scales the loss itself.

    offload: what waits in the memory of the host: off, optimizer (fp32 weights and moments, updated
        by the CPU), or all (the partitioned weights too).

    Raises:
        ValueError: a combination that DeepSpeed accepts and gets wrong.
    """
    for knob, refusal in (
        ("zero_stage", precision_refusal(precision, zero_stage)),
        ("offload", offload_refusal(offload, zero_stage)),
    ):
        if refusal is not None:
            raise ValueError(f"train.{knob}: {refusal}")
    bucket = max(1, min(MAX_BUCKET, num_trainable))
    config: dict[str, Any] = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,  # adapter gradients are small; one stream keeps sums in order
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if zero_stage == 3:
        # The default keeps a model below 1e9 parameters gathered between forward and backward.
        config["zero_optimization"]["stage3_max_reuse_distance"] = 0
    if offload != "off":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        # Torch's AdamW runs there as well; DeepSpeed's own would be compiled at the first use.
        config["zero_force_ds_cpu_optimizer"] = False
    if offload == "all":
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if zero_stage > 1:  # stage 1 with fp32 sums is another, older optimiser of DeepSpeed
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def precision_refusal(precision: str, zero_stage: int) -> str | None:
    """Why this ZeRO stage cannot train in that precision; None if it can."""
    if zero_stage == 0 and precision == "bf16":
        # DeepSpeed's optimiser runs an empty step first.
        return "with bf16 DeepSpeed's first steps are too small at stage 0; set it to 1, 2 or 3"
    return None


def offload_refusal(offload: str, zero_stage: int) -> str | None:
    """Why this ZeRO stage cannot keep that on the host; None if it can."""
    if offload == "all" and zero_stage != 3:
        return (
            f"only ZeRO-3 parts with the weights, and train.zero_stage is {zero_stage}; set it to "
            "3, or offload to optimizer"
        )
    if offload == "optimizer" and zero_stage < 2:
        return (
            f"needs a divided optimiser state, and train.zero_stage is {zero_stage}; set it to 2 "
            "or 3, or offload to off"
        )
    return None
