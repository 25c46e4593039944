"""How a recipe's trainer steps and validates: decay by shape, a rate of the simulation's own, rows for flash."""

from pathlib import Path
from typing import cast

import torch

from .durable_trainer import DurableTrainer
from .folders import output_folder
from .lineage import Lineage
from .packing import one_row


# Whatever a simulated attention adds to a model has this in its name.
SIMULATION = "_simulation."


class RecipeTrainer(DurableTrainer):
    """
    A `DurableTrainer` with the papers' optimizer: weight decay on tensors of two or more dimensions alone (SAS paper,
    after nanoGPT), where the stock Trainer goes by names. `label_smoothing_factor` is for training alone: "eval_loss"
    is not smoothed.

    Attributes:
        simulation_learning_rate: of the simulation's parameters; schedules scale it as the others'.
        lineage: written beside each model that is saved.
        joins_rows: give the model each batch of packed sequences as one row, by [`one_row`].
    """

    simulation_learning_rate: float | None = None
    joins_rows: bool = False
    lineage: Lineage | None = None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else output_folder(self.args)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if hasattr(model, "peft_config") and hasattr(model, "generation_config"):  # which peft leaves out
            model.generation_config.save_pretrained(folder)
        if self.lineage is not None:
            self.lineage.save(folder, model, self.step_of_model)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: a run's card is written with its weights. (TRL would put one there without them.)"""

    def prediction_step(self, *args, **kwargs):
        # What is validated is the likelihood: a smoothed loss has no perplexity and compares with no other run's.
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.label_smoother = smoother

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = super()._prepare_inputs(inputs)
        return one_row(inputs) if self.joins_rows else inputs

    def set_simulation_learning_rate(self, learning_rate: float | None) -> None:
        """
        To be called before `train`; `None`: as all others.

        Raises:
            ValueError: where no parameter of a simulation is trained.
        """
        trained = [
            name for name, weight in cast(torch.nn.Module, self.model).named_parameters() if weight.requires_grad
        ]
        if learning_rate is not None and not any(SIMULATION in name for name in trained):
            raise ValueError(
                f"`simulation_learning_rate` is {learning_rate}, but no parameter of a simulation is trained; drop it."
            )
        self.simulation_learning_rate = learning_rate

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        # Under ZeRO-3 a parameter's own shape is empty, and its real one is here.
        shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in model.named_parameters()}
        return [name for name, shape in shapes.items() if len(shape) >= 2]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.simulation_learning_rate is not None:
            given = cast(torch.nn.Module, self.model) if model is None else model
            split_simulation(optimizer, given, self.simulation_learning_rate)
        return optimizer


def split_simulation(optimizer: torch.optim.Optimizer, model: torch.nn.Module, learning_rate: float) -> None:
    """Give the simulation's parameters groups of their own, behind the others, with that learning rate."""
    simulation = {id(weight) for name, weight in model.named_parameters() if SIMULATION in name}
    others, split = [], []
    for group in optimizer.param_groups:
        inside = [weight for weight in group["params"] if id(weight) in simulation]
        outside = [weight for weight in group["params"] if id(weight) not in simulation]
        if outside:
            others.append(group | {"params": outside})
        if inside:
            split.append(group | {"params": inside, "lr": learning_rate})
    optimizer.param_groups[:] = others + split
