"""The `sas_hf` model type of lm-evaluation-harness: its own Hugging Face model, with batches that fit in memory.

Batches are planned before the first one runs, over all requests and all processes: so a run that was killed goes on
where it stopped (`answers`), and processes started by `accelerate launch` share the batches, with the numbers of one
uninterrupted process.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..hub.checkpoints import embedding_rows, load_adapter, load_model, tokens_beyond
from ..report.machine import available_memory
from .answers import Answer, AnswerStore
from .arguments import check_device


if TYPE_CHECKING:
    from peft import PeftModel


# What one batch may take on a CPU, per thread. More is slower: a 135M Llama with 49k tokens of vocabulary, scored by
# one thread, takes 20.4 s of CPU one by one, 13.1 with 190 MiB, 13.4 with 380, 15.0 with 760 and 18.8 with 1,530.
CPU_BATCH_BYTES = 256 << 20


# As the harness hands them over: the texts (`None` for a window of a longer text), and both parts' token ids.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class WholeCheckpoint:
    """`AutoModelForCausalLM`, but a checkpoint without some of its weights is refused, not filled up at random.

    Attributes:
        unused: names of weights in the checkpoint loaded that the model does not have.
    """

    def __init__(self):
        self.unused: list[str] = []

    def from_pretrained(self, source: str, revision: str | None = None, **options) -> PreTrainedModel:
        options = {"use_safetensors": None} | options  # pickled weights, too, where there are no others
        model, self.unused = load_model(AutoModelForCausalLM, source, revision, **options)
        return model


@register_model("sas_hf")
class SASHFLM(HFLM):
    """
    lm-evaluation-harness's `hf` model for causal language models, choosing the batch size from the memory at hand.

    Every batch gets its own size: requests come longest first, so later batches of shorter requests hold more. At a
    fixed batch size the batches are the `hf` model's. The sizes are kept in `chosen_batch_sizes`. Under `accelerate
    launch` each process holds the model and scores every n-th batch; each has all answers in the end.

    Args:
        pretrained: path, Hub id or live model (then with `tokenizer`).
        batch_size: "auto" (the default) or a number.
        max_batch_size: no batch is larger; beyond it there is nothing to gain.
        memory_budget: bytes one batch may take; `None`: half of what is free when the requests come, and on a CPU at
            most 256 MiB per thread.
        device: `None`: the accelerator if there is one, else the CPU.
        truncation: what to do with a request longer than the model's context: `True` cuts it from the left, as the
            `hf` model does; `False` raises before the first batch.
        answers: where log-likelihoods are kept, and taken from when they are there.
        shared: whether every process has a whole copy of a live model, to share the batches as well.
        kwargs: as the harness's `HFLM` takes them.

    Raises:
        ValueError: for a model that is not a causal language model, a tokenizer with more tokens than it, or a device
            that is not there, before weights are read; for weights that are missing, misshapen, damaged or not finite.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        batch_size: int | str = "auto",
        max_batch_size: int = 64,
        memory_budget: int | None = None,
        device: str | None = None,
        truncation: bool = False,
        answers: AnswerStore | None = None,
        shared: bool = False,
        **kwargs,
    ):
        if not isinstance(pretrained, str):
            require_causal(pretrained.config, live=True)
        self.AUTO_MODEL_CLASS = WholeCheckpoint()
        self.memory_budget = memory_budget
        self.answers = answers
        self.chosen_batch_sizes: list[int] = []
        self.num_truncated = 0
        self.num_reused = 0
        device = check_device(device) if device else default_device()
        if device == "cpu" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else each process would take itself for the only one
        # Of a live model the harness warns that it is one.
        with nullcontext() if isinstance(pretrained, str) else _taken_as_it_is(pretrained):
            super().__init__(
                pretrained,
                backend="causal",
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                device=device,
                truncation=truncation,
                **kwargs,
            )
        if isinstance(pretrained, str) and self.peft:
            self._model: PreTrainedModel | PeftModel = load_adapter(self.model, self.peft).eval()
        self.num_rows = self.model.config.get_text_config().vocab_size
        if (self.tokenizer.pad_token_id or 0) >= self.num_rows:
            self.tokenizer.pad_token_id = self.eot_token_id  # masked, but looked up
        processes = getattr(self, "accelerator", None)
        self.num_processes = processes.num_processes if processes else 1
        if not isinstance(pretrained, str) and torch.distributed.is_initialized():
            processes = PartialState()
            self.num_processes = processes.num_processes if shared else 1
        self.process_index = processes.process_index if processes else 0
        # The harness would deal out the questions, which changes the examples drawn for each; we deal out batches.
        self._rank, self._world_size = 0, 1

    def _get_config(self, pretrained: str, **kwargs) -> None:
        super()._get_config(pretrained, **kwargs)
        require_causal(self._config)

    def _create_tokenizer(self, *args, **kwargs) -> None:
        super()._create_tokenizer(*args, **kwargs)
        tokenizer, wanted = self.tokenizer, kwargs.get("add_bos_token")
        if wanted and tokenizer.bos_token_id is None:
            raise ValueError("`add_bos_token` is True, but the tokenizer has no `bos_token`; leave it out.")
        if tokenizer.pad_token is None and tokenizer.unk_token is None and tokenizer.eos_token is None:
            tokenizer.pad_token = tokenizer.bos_token  # the harness would add a token, which no embedding has
        # How many tokens the tokenizer puts behind a text.
        plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
        ends = (n for n in range(len(whole)) if plain == whole[len(whole) - n - len(plain) : len(whole) - n])
        self._num_appended = next(ends, 0)

    def _create_model(self, pretrained: str, *, peft: str | None = None, **kwargs) -> None:
        check_vocabulary(self.tokenizer, self._config, peft)
        # An adapter is put on when all else is done: the harness would first cut the embedding down to the tokenizer's
        # size, where a model pads it, and then tie the matrices that an adapter has parted.
        super()._create_model(pretrained, peft=None, **kwargs)

    @property
    def eot_token_id(self) -> int:
        """What ends a text; for a tokenizer that has no such token, what begins the next."""
        tokenizer = self.tokenizer
        return tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """As the `hf` model, but nothing goes on behind a text that its tokenizer has ended, and bos is where it was
        asked for."""
        tokens = super().tok_encode(string, add_special_tokens, **kwargs)
        if self._num_appended and len(tokens) > len(self.tokenizer.encode(string, add_special_tokens=False)):
            tokens = tokens[: -self._num_appended]
        if add_special_tokens is None and self.add_bos_token and tokens[:1] != [self.tokenizer.bos_token_id]:
            tokens = [self.tokenizer.bos_token_id, *tokens]
        return tokens

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each text as [`tok_encode`] has it, whatever its batch; cut from the left alone, never by the tokenizer."""
        tokens = [self.tok_encode(string)[-(left_truncate_len or 0) :] for string in strings]
        batch = self.tokenizer.pad({"input_ids": tokens}, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_tokens, continuation_tokens = super()._encode_pair(context, continuation)
        # White space alone is scored as a part of the continuation, and leaves a context without tokens.
        return context_tokens or [self.prefix_token_id], continuation_tokens

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Log-likelihoods of continuations, and whether each is what greedy decoding would give.

        Raises:
            ValueError: for a continuation without tokens of its own, a request longer than the model's context (before
                the first batch), and log-likelihoods that are not numbers.
        """
        for request in requests:
            if not request.args[1]:
                raise ValueError(
                    f"The continuation of a request of task {request.task_name!r} is empty, after "
                    f"{request.args[0][-40:]!r}; there is nothing to score."
                )
        answers = super().loglikelihood(requests, disable_tqdm)
        refuse_not_numbers((request.task_name, value) for request, (value, _) in zip(requests, answers, strict=True))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in windows of the model's context, all texts' windows sharing batches.

        The first token is predicted from the token that begins a text, which stands there once: the harness's `hf`
        has it twice where the tokenizer puts it there too, and predicts the second.
        """
        windows, texts = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                tokens = tokens[1:]
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                texts.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(texts, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += value
        refuse_not_numbers((request.task_name, value) for request, value in zip(requests, totals, strict=True))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations of prompts, up to what ends each.

        Raises:
            ValueError: for a prompt longer than the model's context without what may be generated, unless `truncation`
                is given (before the first batch), and for logits that are not numbers.
        """
        cut = 0
        for request in requests:
            prompt, options = request.args
            room = self.max_length - normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            tokens = self.tok_encode(prompt)
            length = len(tokens)
            self._check_tokens(tokens)
            if room < 1:
                raise ValueError(
                    f"Task {request.task_name!r} generates up to {self.max_length - room} tokens (`max_gen_toks`), "
                    f"which leaves no room for a prompt in the model's context of {self.max_length}."
                )
            if not length:
                raise ValueError(f"A prompt of task {request.task_name!r} is empty; there is nothing to go on from.")
            cut += length > room
            if length > room and not self.truncation:
                raise ValueError(
                    f"A prompt of task {request.task_name!r} ({prompt[:40]!r}...) has {length} tokens and may go on "
                    f"for {self.max_length - room} (`max_gen_toks`), together longer than the model's context of "
                    f"{self.max_length}. Show fewer examples, or pass `truncation=True` (--truncation) to cut from "
                    "the left, as `hf` does."
                )
        self.num_truncated += cut
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options) -> torch.Tensor:
        # Special tokens do not show in the text, so a text must end at them here. The harness goes on until every text
        # of the batch has ended, and what came behind such a token would depend on the others.
        special = {token.content: id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        ends += [special[text] for text in stop if text in special]
        options = {"eos_token_id": sorted({*ends, self.eot_token_id})} | options
        processors = LogitsProcessorList([NumbersOnly()])
        return super()._model_generate(context, max_length, stop, logits_processor=processors, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if not requests:
            return []
        self._check_requests(requests)
        found: dict[int, Answer] = {}
        reused = 0
        batches = self._plan_batches(requests)[self.process_index % self.num_processes :: self.num_processes]
        hidden = disable_tqdm or self.process_index != 0
        bar = tqdm(total=sum(map(len, batches)), disable=hidden or None, desc="Scoring requests")
        for batch in batches:
            known = {} if self.answers is None else self.answers.get(batch, requests, self.softmax_dtype)
            reused += len(known)
            rest = [number for number in batch if number not in known]
            if rest:
                # One batch: it was planned as one. What it cuts is counted above.
                with silenced("lm_eval.models.huggingface"):
                    answers = super()._loglikelihood_tokens([requests[number] for number in rest], True, len(rest))
                answers = dict(zip(rest, answers, strict=True))
                if self.answers is not None:
                    self.answers.put(answers, requests, self.softmax_dtype)
                known |= answers
            found |= known
            bar.update(len(batch))
        bar.close()
        if self.num_processes > 1:
            found = {number: answer for part in gather_object([found]) for number, answer in part.items()}
            reused = sum(gather_object([reused]))
        self.num_reused += reused
        return [found[number] for number in range(len(requests))]

    def _check_tokens(self, tokens: list[int]) -> None:
        if tokens and max(tokens) >= self.num_rows:
            token = self.tokenizer.convert_ids_to_tokens(max(tokens))
            raise ValueError(
                f"A text has the token {token!r} with number {max(tokens)}, but `vocab_size` of the model is "
                f"{self.num_rows}; take another tokenizer, or let the model grow (`resize_token_embeddings`)."
            )

    def _check_requests(self, requests: Sequence[TokenRequest]) -> None:
        for texts, context_tokens, continuation in requests:
            self._check_tokens(context_tokens)
            self._check_tokens(continuation)
            if texts is not None and not continuation:
                context, text = texts
                raise ValueError(
                    f"The continuation {text!r} after {context[-40:]!r} has no token of its own: the tokenizer takes "
                    "it for a part of the context's last token. Let the context end where a token does."
                )
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        too_long = sum(length > self.max_length for length in lengths)
        endless = sum(len(continuation) > self.max_length for _, _, continuation in requests)
        if endless or (too_long and not self.truncation):
            raise ValueError(
                f"{too_long} of {len(requests)} requests are longer than the model's context of {self.max_length} "
                f"tokens, the longest has {max(lengths)}. "
                + ("Even their continuations alone are." if endless else "Show fewer examples, or pass")
                + ("" if endless else " `truncation=True` (--truncation) to cut them from the left, as `hf` does.")
            )
        self.num_truncated += too_long

    def _plan_batches(self, requests: Sequence[TokenRequest]) -> list[list[int]]:
        """Numbers of the requests that share a batch, longest first, in the order of the harness's `Collator`.

        Requests that differ in their last token alone need one row of a batch between them.
        """
        rows: dict[object, list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            key = (*context, *continuation[:-1]) if self.logits_cache else number
            rows.setdefault(key, []).append(number)

        def tokens(row: list[int]) -> list[int]:
            _, context, continuation = requests[max(row, key=lambda number: len(requests[number][2]))]
            return context + continuation

        keyed = sorted(((-len(ids), ids, row) for row in rows.values() for ids in [tokens(row)]), key=lambda x: x[:2])
        if self.batch_size == "auto":
            self._budget = self._choose_budget()
        batches, start = [], 0
        while start < len(keyed):
            length = min(-keyed[start][0] - 1, self.max_length)
            size = self._fitting(length) if self.batch_size == "auto" else self.batch_size
            size = min(size, len(keyed) - start)
            self.chosen_batch_sizes.append(size)
            batches.append([number for _, _, row in keyed[start : start + size] for number in row])
            start += size
        return batches

    def _choose_budget(self) -> int:
        budget = self.memory_budget or default_budget(self.device)
        # All processes must plan the same batches.
        return min(gather_object([budget])) if self.num_processes > 1 else budget

    def _fitting(self, length: int) -> int:
        return max(1, min(self._budget // bytes_per_sequence(self.config, length), self.max_batch_size))

    def _detect_batch_size(self, requests: tuple | None = None, pos: int = 0) -> int:
        # For generation. The harness tries sizes until one does not run out of memory; on a CPU that ends the process.
        self._budget = self._choose_budget()
        size = self._fitting(self.max_length)
        self.chosen_batch_sizes.append(size)
        return size


def require_causal(config: PreTrainedConfig, live: bool = False) -> None:
    """Raise a `ValueError` when log-likelihoods from left to right mean nothing for a model of this configuration.

    Args:
        live: whether the model is at hand; else `AutoModelForCausalLM` must know its architecture.
    """
    known = live or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known and hasattr(config, "image_size"):
        raise ValueError(
            f"`model_type` is {config.model_type!r}, which takes images: the tasks need a causal language model. "
            "`sas-hf eval --images` (`evaluate_images`) scores classifiers of images."
        )
    for field, value in (("is_causal", False), ("is_encoder_decoder", True)):
        if getattr(config, field, not value) is value:
            raise ValueError(
                f"`{field}={value}`: the evaluation scores each token given those before it, which needs a causal "
                "decoder; score this model on a task of its own instead, as by `sas-hf eval --masked-text`, `--texts` "
                "or `--pairs`."
            )
    if not known:
        raise ValueError(
            f"`model_type` is {config.model_type!r}, which `AutoModelForCausalLM` does not load: the tasks need a "
            "causal language model."
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, adapter: str | None = None) -> None:
    """Raise a `ValueError` when the tokenizer has ordinary tokens that the model's embedding has not, counting those
    that an adapter brings along. Special ones are refused once a request has them."""
    rows = config.get_text_config().vocab_size
    if adapter is not None and max(tokenizer.get_vocab().values()) >= rows:
        from peft.utils import load_peft_weights

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        rows = embedding_rows(load_peft_weights(adapter, device="cpu"), model) or rows
    if beyond := tokens_beyond(tokenizer, rows):
        raise ValueError(
            f"The tokenizer has {beyond[-1][0] + 1} tokens, but `vocab_size` of the model is {rows}; it belongs to "
            "another model, or to one that has grown since (`resize_token_embeddings`)."
        )


def refuse_not_numbers(values: Iterable[tuple[str, float]]) -> None:
    """Raise a `ValueError` when log-likelihoods, each with its task's name, are not numbers."""
    bad = [name for name, value in values if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"{len(bad)} log-likelihoods of task {bad[0]!r} are not numbers (NaN or infinite): the weights are broken "
            "or overflow in this `dtype`; try 'float32'."
        )


class NumbersOnly(LogitsProcessor):
    """Refuses logits that are not numbers, of which the largest is any."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.isnan().any():
            raise ValueError(
                "Logits of a text generated are not numbers (NaN): the weights are broken or overflow in this "
                "`dtype`; try 'float32'."
            )
        return scores


def to_device(model: PreTrainedModel, device: str | None) -> PreTrainedModel:
    """The model on this device; `None`: on the default one."""
    # Transformers wraps `to`, and by that hides from mypy that it is a method.
    return model.to(device or default_device())  # type: ignore[arg-type]


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
    free = available_memory(device)
    if free is None:  # not known of Apple's and others
        return CPU_BATCH_BYTES * torch.get_num_threads()
    if device.type != "cpu":
        return free // 2
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as accelerate and torchrun set it
    return min(free // 2 // local_processes, CPU_BATCH_BYTES * torch.get_num_threads())


@contextmanager
def _taken_as_it_is(model: torch.nn.Module) -> Iterator[None]:
    """Keeps the harness from warning of a live model, and from tying its weights, which an adapter may have parted."""
    model.tie_weights = lambda: None  # type: ignore[assignment]  # a method is hidden
    try:
        with silenced("lm_eval.models.huggingface"):
            yield
    finally:
        del model.tie_weights


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
