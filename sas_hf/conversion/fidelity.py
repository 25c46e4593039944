"""How far a converted model is from its source: logits on text, and whether every simulated head can learn."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from ..modeling.attention import SASAttention
from ..report.progress import bar


MINIMUM_TOKENS = 32
TOLERANCE = 1e-5  # of max |logit|, in float32
ROWS_AT_ONCE = 64  # that are compared: a vocabulary may be large
# Of models, the telling ones first: of the first row whose first is there, all that are.
OUTPUTS = (
    ("logits",),
    ("start_logits", "end_logits"),
    ("reconstruction",),
    ("last_hidden_state", "pooler_output", "encoder_last_hidden_state"),
)
WEIGHTS_AT_ONCE = 2**24  # of a linear map that are widened

# A window [1, T] of token ids, a batch [B, channels, height, width] of images, or a model's inputs by name.
Batch = dict[str, torch.Tensor]
Sample = torch.Tensor | Batch


@dataclass
class Fidelity:
    """Outputs of two models on the same tokens; see [`compare_models`]."""

    max_abs_difference: float
    max_abs_output: float
    mean_kl: float | None
    argmax_agreement: float | None
    source_eager_sdpa_difference: float
    tokens: int
    images: int
    perplexity_source: float | None = None
    perplexity: float | None = None
    compared: tuple[str, ...] = ()

    @property
    def tolerance(self) -> float:
        """The difference up to which the outputs count as equal."""
        return TOLERANCE * self.max_abs_output

    @property
    def is_exact(self) -> bool:
        """Whether the outputs agree to `TOLERANCE` times their largest value."""
        return self.max_abs_difference <= self.tolerance

    def to_dict(self) -> dict:
        """As reports hold it: all attributes, `tolerance`, and `is_exact` as "exact"."""
        return asdict(self) | {"compared": list(self.compared), "tolerance": self.tolerance, "exact": self.is_exact}


def text_windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> list[torch.Tensor]:
    """`count` windows `[1, length]` of token ids, evenly spread over `text`; fewer when the text is shorter.

    Raises:
        ValueError: for a text of fewer than `MINIMUM_TOKENS` tokens, on which agreement would say little.
    """
    ids = tokenizer(text[: 64 * length * count], return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < MINIMUM_TOKENS:
        raise ValueError(f"`text` has {len(ids)} tokens; comparing models needs at least {MINIMUM_TOKENS}.")
    length = min(length, len(ids))
    starts = torch.linspace(0, len(ids) - length, min(count, max(1, len(ids) // max(1, length)))).long()
    return [ids[start : start + length][None] for start in starts]


@torch.no_grad()
def compare_models(
    source: PreTrainedModel,
    converted: PreTrainedModel,
    samples: Iterable[Sample],
    rounded_to: torch.dtype | None = None,
) -> Fidelity:
    """Run both models on every sample and measure the difference of their outputs, but for padding. A sample is a
    window `[1, T]` of token ids, a batch `[B, channels, height, width]` of images, or a model's inputs by name.

    The outputs are logits, or for other models hidden states (pooled ones too, and an encoder's) or reconstructed
    images; of logits that stand for a distribution, the KL divergence and the agreement of their largest are measured
    too, of causal language models the perplexity. The source's own difference between its eager and SDPA attention
    is measured on the same samples as a yardstick. Weights of less than float32 are used as they are, but computed
    with in float32.

    Args:
        rounded_to: the source's weights are rounded to this dtype as they are used.

    Raises:
        ValueError: if an output is not finite.
    """
    difference = largest = yardstick = divergence = loss_source = loss = 0.0
    agreements = positions = tokens = images = followed = 0
    compared: dict[str, None] = {}
    predicts, writes = _predicts(source), type(source).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    for sample in bar(samples, "Comparing"):
        expected = _outputs(source, sample, "sdpa", rounded_to)
        eager = _outputs(source, sample, "eager", rounded_to)
        actual = _outputs(converted, sample, "sdpa")
        for name, parts in expected.items():
            compared[name] = None
            for p, q, other in zip(parts, actual[name], eager[name], strict=True):
                yardstick = max(yardstick, (other - p).abs().max().item())
                if not (p.isfinite().all() and q.isfinite().all()):
                    raise ValueError(
                        "The outputs are not finite (NaN or infinite); the weights of the source may be damaged."
                    )
                positions += p[..., 0].numel()
                rows = (outputs.flatten(0, -2).split(ROWS_AT_ONCE) for outputs in (p, q))
                for p, q in zip(*rows, strict=True):
                    difference = max(difference, (q - p).abs().max().item())
                    largest = max(largest, p.abs().max().item())
                    if predicts:
                        agreements += (q.argmax(-1) == p.argmax(-1)).sum().item()
                        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
                        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        if isinstance(sample, Mapping):
            tokens += sum(int(mask.sum()) for mask in _masks(sample).values())
        elif sample.is_floating_point():  # pixels
            images += len(sample)
        else:
            tokens += sample.numel()
        if writes and isinstance(sample, torch.Tensor):
            ((logits,), (own,)) = expected["logits"], actual["logits"]
            loss_source, loss = loss_source + _loss(logits, sample), loss + _loss(own, sample)
            followed += sample[:, 1:].numel()
    return Fidelity(
        max_abs_difference=difference,
        max_abs_output=largest,
        mean_kl=divergence / positions if predicts else None,
        argmax_agreement=agreements / positions if predicts else None,
        source_eager_sdpa_difference=yardstick,
        tokens=tokens,
        images=images,
        perplexity_source=_perplexity(loss_source, followed),
        perplexity=_perplexity(loss, followed),
        compared=tuple(compared),
    )


def _predicts(model: PreTrainedModel) -> bool:
    """Whether its outputs stand for distributions: they do not without a head, nor where they are images, numbers, or
    labels that each hold or not."""
    name = type(model).__name__
    if model is model.base_model or name.endswith("ForMaskedImageModeling"):
        return False
    classifies = name.endswith(("ForSequenceClassification", "ForImageClassification"))
    problem = getattr(model.config, "problem_type", None)
    return not classifies or ((model.config.num_labels or 0) > 1 and problem in (None, "single_label_classification"))


def gradient_differences(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[str, float]:
    """How much the copies of one head differ in what they learn from one batch `[B, T]`, per side of attention.

    For the head expansions' weight gradients, grouped as PEAA groups the heads, the share is
    ‖g - mean over groups of g‖ / ‖g‖ (Frobenius, all layers): 0 when the copies of every head receive the same
    gradient, so that they would stay copies for ever. Gradients of `model` are cleared.

    Args:
        model: a language model with simulated heads in all of its layers.
        input_ids: `[B, T]`, the labels as well.

    Returns:
        the share, 0 to 1, of "query", "key" and "value".
    """
    model.zero_grad()
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    shares = {}
    layers = [layer for layer in model.modules() if isinstance(layer, SASAttention)]
    for side in ("query", "key", "value"):
        differing = total = 0.0
        for layer in layers:
            gradient = getattr(layer, f"{side[0]}_simulation").heads.expansion.weight.grad
            groups = gradient.unflatten(0, (-1, layer.num_heads))
            differing += (groups - groups.mean(dim=0)).pow(2).sum().item()
            total += gradient.pow(2).sum().item()
        shares[side] = (differing / total) ** 0.5
    model.zero_grad()
    return shares


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention implementation for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def outputs_in_own_dtype(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    """What `model` gives for a sample as it is, computing in the dtype of its weights; all numbers in one row."""
    if isinstance(sample, torch.Tensor) and sample.is_floating_point():
        sample = sample.to(model.dtype)
    return _in_one_row(_telling(model(**_inputs(model, sample)), sample))


@torch.no_grad()
def outputs_in_float32(model: PreTrainedModel, sample: Sample, rounded_to: torch.dtype | None = None) -> torch.Tensor:
    """What `model` gives for a sample in float32, with its weights as they are or rounded; all numbers in one row."""
    return _in_one_row(_outputs(model, sample, "sdpa", rounded_to))


@contextmanager
def computing_in_float32(model: nn.Module, rounded_to: torch.dtype | None = None) -> Iterator[None]:
    """Let `model` compute in float32 for a while, without gradients and without a float32 copy of it.

    Weights of less than float32 become float32 while their module runs (a convolution's for the whole while), those of
    a linear map (the head may be half of a small model) some rows at a time, and embeddings after they were looked up,
    unless their module does more than that. Marian's table of positions is what it would be in float32.

    Args:
        rounded_to: weights of any dtype are rounded to this one first.
    """

    def wide(weight):
        return (weight if rounded_to is None else weight.to(rounded_to)).float()

    def widen(module, _):
        for weight in _stored(module):
            narrow[weight] = weight.data
            weight.data = wide(weight.data)

    def widen_sinusoids(module, _):
        widen(module, _)
        module.weight.data = module.create_weight()

    def restore(module, *_):
        for weight in _stored(module):
            weight.data = narrow.pop(weight)

    narrow: dict[nn.Parameter | torch.Tensor, torch.Tensor] = {}
    with torch.no_grad(), ExitStack() as hooks:
        for module in model.modules():
            dtypes = {weight.dtype for weight in _stored(module)}
            if not any(dtype.itemsize < 4 or rounded_to not in (None, dtype) for dtype in dtypes):
                continue
            if isinstance(module, nn.Conv2d):  # small, and models of images cast pixels to its dtype before it runs
                widen(module, None)
                hooks.callback(restore, module)
            elif isinstance(module, MarianSinusoidalPositionalEmbedding):  # never stored, and so never rounded
                hooks.enter_context(module.register_forward_pre_hook(widen_sinusoids))
                hooks.enter_context(module.register_forward_hook(restore, always_call=True))
            elif type(module).forward is nn.Embedding.forward:
                hooks.enter_context(module.register_forward_hook(lambda module, _, embedded: wide(embedded)))
            elif isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                module.forward = partial(  # type: ignore[method-assign]  # taken back below
                    _linear_in_float32, module, wide
                )
                hooks.callback(delattr, module, "forward")
            else:
                hooks.enter_context(module.register_forward_pre_hook(widen))
                hooks.enter_context(module.register_forward_hook(restore, always_call=True))
        yield


def _stored(module: nn.Module) -> list[torch.Tensor]:
    """What checkpoints hold of a module itself: its parameters, and buffers such as BART's `final_logits_bias`."""
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
    persistent = [buffer for name, buffer in buffers.items() if name not in module._non_persistent_buffers_set]
    return [*module.parameters(recurse=False), *(buffer for buffer in persistent if buffer.is_floating_point())]


def _linear_in_float32(linear: nn.Linear, wide: Callable, inputs: torch.Tensor) -> torch.Tensor:
    outputs = inputs.new_empty(*inputs.shape[:-1], linear.out_features)
    rows = max(1, WEIGHTS_AT_ONCE // linear.in_features)
    for part, weight in zip(outputs.split(rows, dim=-1), linear.weight.split(rows), strict=True):
        part.copy_(nn.functional.linear(inputs, wide(weight)))
    return outputs if linear.bias is None else outputs + wide(linear.bias)


def _perplexity(loss: float, tokens: int) -> float | None:
    """`None` without tokens, and where it is larger than any number."""
    return math.exp(loss / tokens) if tokens and loss / tokens < 700 else None


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Sum of the negative log-likelihoods of the tokens after the first."""
    targets = ids[:, 1:].flatten().to(logits.device)
    rows = zip(logits[:, :-1].flatten(0, 1).split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
    return sum(nn.functional.cross_entropy(part.double(), goal, reduction="sum").item() for part, goal in rows)


def _outputs(
    model: PreTrainedModel, sample: Sample, implementation: str, rounded_to: torch.dtype | None = None
) -> dict[str, list[torch.Tensor]]:
    with attention_implementation(model, implementation), computing_in_float32(model, rounded_to):
        return _telling(model(**_inputs(model, sample)), sample)


def _inputs(model: PreTrainedModel, sample: Sample) -> dict:
    settings = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    named = sample if isinstance(sample, Mapping) else {model.main_input_name: sample}
    return {name: values.to(model.device) for name, values in named.items()} | settings


def _telling(outputs, sample: Sample) -> dict[str, list[torch.Tensor]]:
    """What is compared of a model's outputs, by name: tensors `[..., n]`, without padding."""
    names = next(group for group in OUTPUTS if group[0] in outputs)
    found = {name: outputs[name] for name in names if outputs.get(name) is not None}
    masks = _masks(sample) if isinstance(sample, Mapping) else {}
    return {name: _without_padding(name, values, masks) for name, values in found.items()}


def _masks(sample: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Which tokens are real `[B, T]`: of the input, and of an encoder-decoder's target."""
    masks = {"input": sample["attention_mask"] != 0}
    if "labels" in sample:
        masks["target"] = sample["labels"] != -100
    elif "decoder_attention_mask" in sample:
        masks["target"] = sample["decoder_attention_mask"] != 0
    return masks


def _without_padding(name: str, values: torch.Tensor, masks: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    mask = masks.get("input") if name == "encoder_last_hidden_state" else masks.get("target", masks.get("input"))
    if mask is not None and name in ("start_logits", "end_logits"):  # the distribution is over the tokens of a text
        return [row[real.to(row.device)][None] for row, real in zip(values, mask, strict=True)]
    if mask is None or values.shape[:-1] != mask.shape:  # one row for a whole text
        return [values]
    return [values[mask.to(values.device)]]


def _in_one_row(outputs: Mapping[str, Iterable[torch.Tensor]]) -> torch.Tensor:
    return torch.cat([values.flatten() for parts in outputs.values() for values in parts])
