"""What a whole model's figures are held against: its floors, and the other providers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton_only_backend.bench import models

if TYPE_CHECKING:
    import torch

    from triton_only_backend.bench.trial import Plan
    from triton_only_backend.timing import Ceilings


def floors(model: torch.nn.Module, plan: Plan, limits: Ceilings) -> dict[str, Any]:
    """The least time of a token and of a prefill, in milliseconds, and what bounds them."""
    shape = plan.shape
    length = plan.prompt + plan.new_tokens // 2
    step_bytes = models.step_floor_bytes(model, shape, plan.batch, length)
    flops = models.prefill_floor_flops(model, shape, plan.batch, plan.prompt)
    weights = models.step_floor_bytes(model, shape, plan.batch, 0)
    return {
        "floor_ms_per_token": limits.floor_us(step_bytes, 0) / 1e3,
        "floor_prefill_ms": limits.floor_us(weights, flops) / 1e3,
        "step_bytes": step_bytes,
        "prefill_flops": flops,
        "ceilings": limits.source,
    }


def shares(row: dict[str, Any], limits: dict[str, Any]) -> dict[str, float]:
    """How near a provider comes to the `floors`; nothing where there are none."""
    pairs = {
        "floor_share": ("floor_ms_per_token", "ms_per_token"),
        "prefill_floor_share": ("floor_prefill_ms", "prefill_ms"),
    }
    return {
        name: limits[floor] / row[time] for name, (floor, time) in pairs.items() if floor in limits
    }


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How our provider stands to each other: times its speed, and the ratio of logits errors."""
    ours = next((row for row in rows if row["provider"] == "triton_only"), None)
    if ours is None:
        return {}
    found: dict[str, Any] = {}
    for row in rows:
        if row is ours:
            continue
        found[f"prefill speedup over {row['provider']}"] = row["prefill_ms"] / ours["prefill_ms"]
        found[f"decode speedup over {row['provider']}"] = row["ms_per_token"] / ours["ms_per_token"]
        if row.get("logits_error") and ours.get("logits_error"):
            ratio = ours["logits_error"] / row["logits_error"]
            found[f"logits error over that of {row['provider']}"] = ratio
    return found
