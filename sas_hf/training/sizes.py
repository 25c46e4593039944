"""What training a recipe's model needs, counted without building it: parameters, operations and memory."""

import copy
import os
import warnings
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from ..report.machine import total_memory
from ..report.quantities import GIB, memory_text
from .adapters import prepare_parameters
from .recipe_fields import TrainingRecipe
from .tasks import find_task


NUMBER = 4  # bytes: weights, gradients and moments are float32, whatever the products are computed in
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


def meta_model(recipe: TrainingRecipe, config: PreTrainedConfig) -> PreTrainedModel | PeftModel:
    """The model of a recipe on the meta device, by the definition of its attention ("eager"), adapters put on it or
    parameters frozen."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the run itself will say
        auto_class = find_task(recipe.task).auto_class
        model: PreTrainedModel = auto_class.from_config(
            copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32
        )
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


def check_fits(recipe: TrainingRecipe, arguments: TrainingArguments) -> None:
    """
    Raise a ValueError for a model whose weights, gradients and moments alone are more than the machine holds.

    Nothing is said of a model that cannot be described yet: its task tells what is wrong with it. Nor where DeepSpeed
    or FSDP may keep parts elsewhere than on the device.
    """
    holds = None if _is_offloaded(arguments) else total_memory(arguments.device)
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
