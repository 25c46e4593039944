"""Training that a kill cannot spoil, on the stock `Trainer`, on documents packed into full sequences."""

from .data import TrainingData, check_data, training_data
from .durable_trainer import DurableTrainer
from .packing import pack_documents
from .recipe_fields import DataRecipe
from .streaming import PackedStream


__all__ = [
    "DataRecipe",
    "DurableTrainer",
    "PackedStream",
    "TrainingData",
    "check_data",
    "pack_documents",
    "training_data",
]
