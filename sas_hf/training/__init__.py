"""Training that a kill cannot spoil, on the stock `Trainer`, and documents packed into full sequences."""

from .durable_trainer import DurableTrainer
from .packing import pack_documents


__all__ = ["DurableTrainer", "pack_documents"]
