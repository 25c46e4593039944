"""The `sas_hf` model type of lm-evaluation-harness: its own Hugging Face model, with batches that fit in memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedConfig, PreTrainedModel

import sas_hf  # noqa: F401  registers the architectures, so that a checkpoint is loaded by its path alone


# What one batch may take on a CPU, per thread. More is slower: a 135M Llama with 49k tokens of vocabulary, scored by
# one thread, takes 20.4 s of CPU one by one, 13.1 with 190 MiB, 13.4 with 380, 15.0 with 760 and 18.8 with 1,530.
CPU_BATCH_BYTES = 256 << 20


@register_model("sas_hf")
class SASHFLM(HFLM):
    """
    lm-evaluation-harness's `hf` model for causal language models, choosing the batch size from the memory at hand.

    Every batch gets its own size: requests come longest first, so later batches of shorter requests hold more. The
    sizes chosen are kept in `chosen_batch_sizes`.

    Args:
        pretrained: path, Hub id or live model (then with `tokenizer`).
        batch_size: "auto" (the default) or a number.
        max_batch_size: no batch is larger; beyond it there is nothing to gain.
        memory_budget: bytes one batch may take; `None`: half of what is free when the requests come, and on a CPU at
            most 256 MiB per thread.
        device: `None`: the accelerator if there is one, else the CPU.
        kwargs: as the harness's `HFLM` takes them.

    Raises:
        ValueError: for a model that is not a causal language model, before its weights are read.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        batch_size: int | str = "auto",
        max_batch_size: int = 64,
        memory_budget: int | None = None,
        device: str | None = None,
        **kwargs,
    ):
        if not isinstance(pretrained, str):
            require_causal(pretrained.config)
        self.memory_budget = memory_budget
        self.chosen_batch_sizes: list[int] = []
        # Of a live model the harness warns that it is one.
        with nullcontext() if isinstance(pretrained, str) else silenced("lm_eval.models.huggingface"):
            super().__init__(
                pretrained,
                backend="causal",
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                device=device or default_device(),
                **kwargs,
            )

    def _get_config(self, pretrained: str, **kwargs) -> None:
        super()._get_config(pretrained, **kwargs)
        require_causal(self._config)

    def _batch_scheduler(self, pos: int, n_reordered_requests: tuple) -> int:
        # Called for every request with the batches' sizes so far, {first request: size}, which the harness empties
        # before each run; the size must stay what it is until the batch is full.
        first = next(reversed(self.batch_sizes), None)
        if first is None or pos == first + self.batch_sizes[first]:
            first = pos
            self.batch_sizes[first] = self._detect_batch_size(n_reordered_requests, pos)
        return self.batch_sizes[first]

    def _detect_batch_size(self, requests: tuple | None = None, pos: int = 0) -> int:
        # The harness tries sizes until one does not run out of memory; on a CPU the first failure ends the process.
        length, remaining = self.max_length, self.max_batch_size
        if requests:
            _, context, continuation = requests[pos]
            length, remaining = min(len(context) + len(continuation) - 1, self.max_length), len(requests) - pos
        if pos == 0:
            self._budget = self.memory_budget or default_budget(self.device)
        fitting = self._budget // bytes_per_sequence(self.config, length)
        size = max(1, min(fitting, self.max_batch_size, remaining))
        self.chosen_batch_sizes.append(size)
        return size


def require_causal(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` when log-likelihoods from left to right mean nothing for a model of this configuration."""
    for field, value in (("is_causal", False), ("is_encoder_decoder", True)):
        if getattr(config, field, not value) is value:
            raise ValueError(
                f"`{field}={value}`: the evaluation scores each token given those before it, which needs a causal "
                "decoder; fine-tune and score this model on a task of its own instead."
            )


def default_device() -> str:
    """The accelerator that torch finds, else "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def bytes_per_sequence(config: PreTrainedConfig, length: int) -> int:
    """Memory that one sequence of `length` tokens takes in a batch to be scored, estimated from above.

    Three float32 copies of the logits lead: those computed, their log-softmax, and the previous batch's, which the
    harness still holds. Then the activations of a layer, whose widest are the MLP's or the simulated heads, and the
    attention scores before and after the softmax, for attention that writes them out. Sixteen activations are what
    covers the peaks measured with simulation of heads (kernel 5) and features.
    """
    config = config.get_text_config()
    base_heads = getattr(config, "num_attention_heads", None) or 1  # none: a model without attention
    heads = getattr(config, "num_simulated_heads", None) or base_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // base_heads
    head_dim = getattr(config, "simulated_head_dim", None) or head_dim
    intermediate_size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    widest = max(config.hidden_size, intermediate_size, heads * head_dim)
    return 4 * (length * (3 * config.vocab_size + 16 * widest) + 2 * heads * length**2)


def default_budget(device: torch.device) -> int:
    """Bytes that one batch may take on `device` when the user says nothing."""
    half = available_memory(device) // 2
    return half if device.type != "cpu" else min(half, CPU_BATCH_BYTES * torch.get_num_threads())


def available_memory(device: torch.device) -> int:
    """Bytes free on `device`; for the CPU within the control group's limit, where there is one (containers)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, control_group_memory())


def control_group_memory(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that the process's Linux control groups (version 2) leave it; a large number where there is no limit."""
    free = 1 << 62
    try:
        groups = [line.removeprefix("0::/") for line in membership.read_text().splitlines() if line.startswith("0::/")]
    except OSError:
        return free
    for group in groups:
        folder = root / group
        while folder.is_relative_to(root):
            try:
                limit = (folder / "memory.max").read_text().strip()
                used = int((folder / "memory.current").read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # no limits at this level
                limit = "max"
            if limit != "max":
                # Pages of files read are counted as used, but given up when memory is short.
                free = min(free, max(0, int(limit) - used + int(statistics["inactive_file"])))
            folder = folder.parent
    return free


@contextmanager
def silenced(logger_name: str) -> Iterator[None]:
    """Only errors from this logger, for a while."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
