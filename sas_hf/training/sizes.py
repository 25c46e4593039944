"""What training a recipe's model needs, counted without building it: parameters, operations and memory."""

import copy
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..report.quantities import GIB, memory_text
from .adapters import prepare_parameters
from .recipe_fields import TrainingRecipe
from .tasks import find_task


NUMBER = 4  # bytes: weights, gradients and moments are float32, whatever the products are computed in
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 2**60  # bytes; what cgroups write where there is no limit
# Of a batch: what says which tokens see which. Products of whole squares are counted, whatever it holds.
SEEN = ("attention_mask", "position_ids")


@dataclass(frozen=True)
class Memory:
    """
    Bytes that training a model takes on one device.

    Attributes:
        weights, gradients, moments: the last two of what is trained; 0 of those that another optimiser than AdamW may
            do without.
        kept: for the backward pass of a micro-batch; `None` where that was not measured.
    """

    weights: int
    gradients: int
    moments: int
    kept: int | None = None

    @property
    def sure(self) -> int:
        """Without which nothing can be trained."""
        return self.weights + self.gradients + self.moments

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimiser": self.moments}
        return ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items() if size)


def meta_model(recipe: TrainingRecipe, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a recipe on the meta device, by the definition of its attention ("eager"), adapters put on it or
    parameters frozen."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the run itself will say
        auto_class = find_task(recipe.task).auto_class
        model = auto_class.from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32)
        return prepare_parameters(model, recipe.model)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """All, and those that are trained; tied ones once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def count_operations(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """
    Multiplications and additions of the forward and backward pass of a batch: of all products of matrices and
    convolutions, those of attention for each query with each key, also where the future is hidden. What the backward
    pass computes a second time is not among them, nor sums, norms, softmax, dropout and the optimiser.

    Args:
        model: on the meta device.

    Raises:
        ValueError: for a model whose operations depend on the numbers, of which there are none on that device.
    """
    batch = {name: values.to("meta") for name, values in batch.items() if name not in SEEN}
    model.train()
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"a {type(model).__name__} cannot be counted without numbers: {reason}") from error
    finally:
        model.zero_grad()
    return counter.get_total_flops()


def memory_needed(model: torch.nn.Module, arguments: TrainingArguments) -> Memory:
    """Of a model's weights, gradients and moments on one device; what is sharded is taken to be in equal parts."""
    total, trained = count_parameters(model)
    optimiser = str(getattr(arguments.optim, "value", arguments.optim))
    has_moments = optimiser.startswith("adamw_torch") and not optimiser.endswith("bit")
    has_gradients = not any(part in optimiser for part in ("lomo", "layerwise"))  # which use them up one by one
    parts = max(1, arguments.world_size) if _is_sharded(arguments) else 1
    return Memory(
        weights=NUMBER * total // parts,
        gradients=NUMBER * trained // parts if has_gradients else 0,
        moments=2 * NUMBER * trained // parts if has_moments else 0,
    )


def machine_memory(arguments: TrainingArguments) -> int | None:
    """Bytes of the device that the Trainer would use; of a CPU this machine's, swap included, or this process's share
    of a control group. `None` where that is not known."""
    if arguments.device.type == "cuda":
        return torch.cuda.get_device_properties(arguments.device).total_memory
    if arguments.device.type != "cpu":
        return None
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroup_limits())]) + psutil.swap_memory().total


def free_memory(arguments: TrainingArguments) -> int | None:
    """Of these bytes those that nobody uses now; swap not among them."""
    if arguments.device.type == "cuda":
        return torch.cuda.mem_get_info(arguments.device)[0]
    if arguments.device.type != "cpu":
        return None
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _cgroup_limits())])


def check_fits(recipe: TrainingRecipe, arguments: TrainingArguments) -> None:
    """
    Raise a ValueError for a model whose weights, gradients and moments alone are more than the machine holds.

    Nothing is said of a model that cannot be described yet: its task tells what is wrong with it. Nor where DeepSpeed
    or FSDP may keep parts elsewhere than on the device.
    """
    holds = None if _is_offloaded(arguments) else machine_memory(arguments)
    if holds is None:
        return
    try:
        model = meta_model(recipe, find_task(recipe.task).model_config(recipe))
    except (ValueError, OSError, ImportError):
        return
    memory = memory_needed(model, arguments)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if arguments.device.type == "cpu" else 1
    if beside * memory.sure > holds:  # `beside`: processes that share it
        raise ValueError(f"{too_large(recipe, memory, holds)}.")


def too_large(recipe: TrainingRecipe, memory: Memory, holds: int) -> str:
    name = "config" if recipe.model.checkpoint is None else "checkpoint"
    return (
        f"`model.{name}` is {getattr(recipe.model, name)}: training it needs about {memory_text(memory.sure)} of "
        f"memory (in GiB: {memory}), and this machine has {memory_text(holds)}; distribute it "
        "(docs/distributed.md), train less of it (`model.lora`) or take a smaller model"
    )


def _is_sharded(arguments: TrainingArguments) -> bool:
    """Whether processes may hold parts of a model instead of the whole."""
    names = ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG")
    return bool(arguments.fsdp or arguments.deepspeed) or any(_is_set(f"ACCELERATE_USE_{name}") for name in names)


def _is_offloaded(arguments: TrainingArguments) -> bool:
    """Whether parts of it may be kept elsewhere than on the device, on a disk for instance."""
    if arguments.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        return True
    return _is_set("FSDP_OFFLOAD_PARAMS") or "offload" in f"{arguments.fsdp} {arguments.fsdp_config}"


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group that this process is in, of either version of these."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # another system than Linux
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        version = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        group = root / place.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                limit, used = ((folder / f"memory.{name}").read_text(encoding="ascii").strip() for name in version)
                statistics = dict(map(str.split, (folder / "memory.stat").read_text(encoding="ascii").splitlines()))
            except OSError:  # seen from inside of a container
                continue
            if limit != "max" and int(limit) < UNLIMITED:
                cached = statistics.get("total_inactive_file", statistics.get("inactive_file", 0))  # goes when need be
                yield int(limit), int(used) - int(cached)
