"""What is compared on a task: attention with more heads, real and simulated, and its cost spent otherwise.

- `mha-2`: 2 heads that share the width: more of them are narrower, and cost no parameters. Where the task says how
  wide a head is, they are all so wide.
- `sas-2to4`: 2 heads simulated to 4; `sas-2to4-FORM`: the same in another form ([`form_fields`]).
- `real-2to4`: 4 real heads, each as wide as those of mha-2: what simulation would be at its best.
- `parameters-2to4`, `operations-2to4`: 2 heads, wider: as many parameters, as much arithmetic as the largest form of
  sas-2to4.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .models import HIDDEN_SIZE, config_of, make_model
from .tasks import Task


@dataclass(frozen=True)
class Variant:
    """
    Attributes:
        base: heads of the variant that it is compared with, "mha-BASE".
        heads: that attend: real or simulated ones.
        fields: of its configuration.
        form: of simulation ("heads", or of `Task.forms`), or "mha", "real", "parameters", "operations".
    """

    name: str
    base: int
    heads: int
    form: str
    fields: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Cost:
    """Parameters of a whole model; operations of a training step, forward and backward, for each sequence."""

    parameters: int
    operations: int


def form_fields(form: str, head_dim: int) -> dict[str, Any]:
    """What a form of simulation has beside more heads: "features" of queries and keys, twice as many; features of
    "values"; "id", the identity for the activation; "concat", an output projection for each group; several joined by
    "-"."""
    found: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {
        "heads": {},
        "features": {"simulated_head_dim": 2 * head_dim},
        "values": {"simulate_value_features": True},
        "id": {"simulation_act": "identity"},
        "concat": {"head_aggregation": "concat"},
    }
    for part in form.split("-"):
        found |= kinds[part]
    return found


def variants_of(task: Task, level: int) -> dict[str, Variant]:
    """
    All that are compared at a level, by name. Where it is tried around n heads: real heads 1, 2, ... 2n; simulated
    ones of n/4, n/2 and n, to twice and four times as many, not above 2n; all forms at n/2 to n.
    """
    middle = task.heads(level)
    real = [heads for heads in (1, 2, 4, 8, 16) if heads <= 2 * middle]
    simulated = [
        (base, times * base)
        for base in (middle // 4, middle // 2, middle)
        for times in (2, 4)
        if base and times * base <= 2 * middle
    ]
    found = [Variant(f"mha-{heads}", heads, heads, "mha", _plain(task, level, heads)) for heads in real]
    for base, heads in simulated:
        fields = _plain(task, level, base) | {"num_simulated_heads": heads}
        found.append(Variant(f"sas-{base}to{heads}", base, heads, "heads", fields))
    base, heads = middle // 2, middle
    plain = _plain(task, level, base)
    for form in task.forms:
        fields = plain | {"num_simulated_heads": heads} | form_fields(form, plain["head_dim"])
        found.append(Variant(f"sas-{base}to{heads}-{form}", base, heads, form, fields))
    if _plain(task, level, heads)["head_dim"] < plain["head_dim"]:  # else these are the plain heads themselves
        found.append(Variant(f"real-{base}to{heads}", base, heads, "real", plain | {"num_attention_heads": heads}))
    forms = [count_cost(task, level, variant) for variant in found if variant.name.startswith(f"sas-{base}to{heads}")]
    for what in ("parameters", "operations"):
        goal = max(getattr(cost, what) for cost in forms)
        found.append(Variant(f"{what}-{base}to{heads}", base, base, what, widen(task, level, plain, what, goal)))
    return {variant.name: variant for variant in found}


def choose_variants(known: dict[str, Variant], names: Sequence[str] | None) -> dict[str, Variant]:
    """Those of the names, in the order of all; all without names; and of every one its base."""
    if names is None:
        return known
    bases = {f"mha-{known[name].base}" for name in names if name in known}
    return {name: variant for name, variant in known.items() if name in bases or name in names}


def _plain(task: Task, level: int, heads: int) -> dict[str, Any]:
    width = task.head_dim(level) or HIDDEN_SIZE // heads
    return {"num_attention_heads": heads, "head_dim": width}


def widen(task: Task, level: int, fields: dict[str, Any], what: str, goal: int) -> dict[str, Any]:
    """The fields of the widest attention that costs no more than `goal`, and for the rest of it of the widest
    feed-forward block. (Heads by two features: RoPE turns pairs.)"""
    for name, step in (("head_dim", 2), ("intermediate_size", 1)):
        width = getattr(config_of(task, level, fields), name)
        now, wider = (
            getattr(count_cost(task, level, Variant("", 0, 0, what, fields | {name: width + more})), what)
            for more in (0, step)
        )
        # Every step adds as much as the first.
        fields = fields | {name: width + (goal - now) // (wider - now) * step}
    return fields


def count_cost(task: Task, level: int, variant: Variant) -> Cost:
    return _count_cost(task.name, level, tuple(sorted(variant.fields.items())), task)


@cache
def _count_cost(name: str, level: int, fields: tuple[tuple[str, Any], ...], task: Task) -> Cost:
    """On the meta device: without numbers."""
    batch = task.make_batch(level, 1, torch.Generator())
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = make_model(task, level, config_of(task, level, dict(fields)))
        model(**{part: tensor.to("meta") for part, tensor in batch.items()}).loss.backward()
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops())
