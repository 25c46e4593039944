"""Losses that the architectures share, correct under gradient accumulation."""

import torch
from transformers import PreTrainedModel


def classification_loss(model: PreTrainedModel, logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
    """The loss of Transformers for classifiers of whole rows: `logits` `[B, num_labels]`, `labels` `[B]` class indices
    or regression targets, or `[B, num_labels]`.

    Args:
        kwargs: of the forward; `num_items_in_batch` counts the labels of all micro-batches of one optimiser step.
    """
    loss = model.loss_function(labels=labels, pooled_logits=logits, config=model.config, **kwargs)
    # The library's regression and multi-label losses are means over this call's items only.
    num_items = kwargs.get("num_items_in_batch")
    if num_items is not None and model.config.problem_type != "single_label_classification":
        loss = loss * (labels.numel() / num_items)
    return loss


def choice_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of `logits` `[B, choices]` and the right choices `[B]`.

    Args:
        num_items_in_batch: labels of all micro-batches of one optimiser step; `None`: of this call alone.
    """
    labels = labels.to(logits.device)
    if num_items_in_batch is None:
        return torch.nn.functional.cross_entropy(logits, labels)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
