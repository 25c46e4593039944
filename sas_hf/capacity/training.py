"""One model trained on one task, by one rate and one seed, and by how much it errs in the end."""

import itertools
import math
import time
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from .models import config_of, make_model
from .tasks import Task
from .variants import Variant


# Where the seeds of batches begin, apart from those of weights, and the seed of what all models are tried on. (PyTorch
# reads 32 bits of a seed.)
STREAMS, HELD_OUT = 2**31, 2**32 - 1
TRIED_ROWS, TRIED_BATCHES = 512, 8
WARM_UP = 0.1  # of the steps
SHOWN = 20  # points of a curve


def train(task: Task, level: int, variant: Variant, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """
    Train a model from scratch: AdamW without decay, gradients of norm 1 at most, a warm-up and a cosine to zero.

    Args:
        seed: of the weights and of the stream of batches, which is the same for all variants.

    Returns:
        `error` on data that no seed trains on; `curve`, the mean loss of each twentieth of the training; `diverged`:
        whether the loss was no number, in which case the error is chance; `seconds` of training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(task, level, config_of(task, level, variant.fields))
    stream = torch.Generator().manual_seed(STREAMS + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARM_UP * steps), steps)
    losses, begun = [], time.perf_counter()
    for _ in range(steps):
        loss = model(**task.make_batch(level, task.rows, stream)).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begun
    error = try_out(task, level, model)
    diverged = not math.isfinite(losses[-1]) or not math.isfinite(error)
    bounds = [place * len(losses) // SHOWN for place in range(SHOWN + 1)]
    parts = [losses[low:high] for low, high in itertools.pairwise(bounds) if high > low]
    return {
        "error": task.chance(level) if diverged else error,
        "curve": [] if diverged else [sum(part) / len(part) for part in parts],
        "diverged": diverged,
        "seconds": seconds,
    }


@torch.no_grad()
def try_out(task: Task, level: int, model: torch.nn.Module) -> float:
    """Its error on held-out data, the same at every call."""
    held_out = torch.Generator().manual_seed(HELD_OUT)
    batches = [task.make_batch(level, TRIED_ROWS, held_out) for _ in range(TRIED_BATCHES)]
    model.eval()
    return task.error([(model(**batch), batch) for batch in batches])
