"""Where a trained model comes from: the fidelity report and the card's metadata of what it started from go on with it.

A report speaks of the conversion; that the model has been trained since is added to it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import PreTrainedModel

from ..hub.card import read_card, trained_card
from ..hub.checkpoints import CARD_NAME, REPORT_NAME, read_report
from ..version import versions
from .base import BASE
from .recipe_fields import TrainingRecipe


@dataclass
class Lineage:
    """
    Args:
        name: of the run, the card's title.
        training: what is done: "task", "started_from", "revision", "trained"; with steps and versions, the report's
            new entry of `trained_since`.
        report: of the conversion that the run started from, if it did.
        card: of what the run started from.
        auto_class: that loads the model, such as "AutoModelForCausalLM".
    """

    name: str
    training: dict
    report: dict | None
    card: ModelCard | None
    auto_class: str

    def save(self, folder: str | Path, model: PreTrainedModel | PeftModel, step: int) -> None:
        """Write card and report beside a saved model, in the place of a template by peft."""
        training = self.training | {"steps": step, "versions": versions()}
        report = None
        if self.report is not None:
            report = self.report | {"trained_since": [*self.report.get("trained_since", []), training]}
            (Path(folder) / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        card = trained_card(model, self.name, self.auto_class, training, report, self.card)
        card.save(Path(folder) / CARD_NAME)


def read_lineage(recipe: TrainingRecipe, folder: Path, auto_class: str) -> Lineage:
    """
    Of a run in that folder, whose base (where it needs one) has been written.

    Args:
        auto_class: that loads the model.

    Raises:
        ValueError: for a damaged report or card of what it starts from.
    """
    model = recipe.model
    trained = "all parameters"
    if model.lora is not None:
        trained = "LoRA"
    elif model.trainable is not None:
        trained = f"parameters matching {', '.join(model.trainable)}"
    training = {
        "task": recipe.task,
        "started_from": model.checkpoint or model.config,
        "is_checkpoint": model.checkpoint is not None,
        "revision": model.revision,
    }
    place: str | Path | None = model.checkpoint
    revision = model.revision
    if model.conversion is not None:
        place, revision = folder / BASE, None
    report = card = None
    if place is not None:
        report, card = read_report(place, revision), read_card(place, revision)
    return Lineage(folder.resolve().name, training | {"trained": trained}, report, card, auto_class)
