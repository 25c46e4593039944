"""Table 4 of the SAS paper, Appendix F: what one training step takes, by attention and size."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..configurations import SIZES, named_config
from ..modeling import SASGPTConfig, SASGPTForCausalLM
from ..report.figures import label_axes
from ..report.machine import available_memory, environment
from ..report.tables import Grid
from ..training.memory import keep_freed_memory
from .comparison import Comparison, ItemResult, comparison_grid, result_at
from .items import Place
from .timing import Part, draw_ratios, is_measured, measure, open_measured, ratio_legend


MODELS = ("mha", "gqa", "mqa", "mla", "tpa", "sas", "sas-k5")
ALIGNED = 64  # numbers; PyTorch begins every tensor at a multiple of 64 bytes
DTYPES = ("float32", "bfloat16", "float16")


def step_config(model: str, size: str) -> SASGPTConfig:
    """
    The named configuration of one of `MODELS` at a size of `SIZES`; "sas" simulates heads by kernels of 1, "sas-k5" of
    5.

    Raises:
        ValueError: for an unknown model or size.
    """
    if size not in SIZES:
        raise ValueError(f"`sizes` holds {size!r}; it must be some of {', '.join(SIZES)}.")
    if model not in MODELS:
        raise ValueError(f"`models` holds {model!r}; it must be some of {', '.join(MODELS)}.")
    kernel = {"simulation_kernel_size": 5} if model == "sas-k5" else {}
    return cast(SASGPTConfig, named_config(f"{model.partition('-')[0]}-{size}", **kernel))


class TrainingStep:
    """Forward and backward pass of a language model, without the optimiser."""

    def __init__(self, model: nn.Module, ids: torch.Tensor):
        self.model, self.ids = model.train(), ids

    def __call__(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()

    def reset(self) -> None:
        """Gradients go, so that only one model's are there."""
        self.model.zero_grad(set_to_none=True)


def make_jobs(
    configs: dict[str, SASGPTConfig], batch: int, length: int, device: torch.device, dtype: str
) -> dict[str, TrainingStep]:
    """Random models, which take as long as trained ones. As they take turns, and time does not depend on what weights
    hold, the weights of all lie in the same memory."""
    torch.manual_seed(0)
    ids = torch.randint(next(iter(configs.values())).vocab_size, (batch, length), device=device)
    with torch.device("meta"):
        most = max(_places(SASGPTForCausalLM(config))[-1] for config in configs.values())
    memory = torch.empty(most, device=device, dtype=getattr(torch, dtype)).normal_(std=0.02)
    jobs = {}
    for name, config in configs.items():
        with device:
            # Transformers wraps `to`, and by that hides from mypy that it is a method.
            model = SASGPTForCausalLM(config).to(memory.dtype)  # type: ignore[arg-type]
        for weight, place in zip(model.parameters(), _places(model), strict=False):
            weight.data = memory[place : place + weight.numel()].view_as(weight)
        jobs[name] = TrainingStep(model, ids)
    return jobs


def _places(model: nn.Module) -> list[int]:
    """Where each weight begins, as aligned as by itself, and where all end."""
    sizes = (-(-weight.numel() // ALIGNED) * ALIGNED for weight in model.parameters())
    return list(accumulate(sizes, initial=0))


@dataclass(frozen=True)
class Need:
    """What a model of a comparison needs: parameters, operations of a step, numbers kept for the backward pass."""

    parameters: int
    operations: int
    kept: int


def count_need(config: SASGPTConfig, batch: int, length: int) -> Need:
    """Counted on the meta device, on which nothing that is kept is computed again instead: at most so much is. Of one
    layer and of two, for every other adds as much."""
    one, two = (_count_need(config, layers, batch, length) for layers in (1, 2))
    more = config.num_hidden_layers - 1
    return Need(*(first + more * (second - first) for first, second in zip(astuple(one), astuple(two), strict=True)))


def _count_need(config: SASGPTConfig, layers: int, batch: int, length: int) -> Need:
    with torch.device("meta"):
        model = SASGPTForCausalLM(type(config)(**config.to_diff_dict() | {"num_hidden_layers": layers})).train()
        ids = torch.empty(batch, length, dtype=torch.long)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (
                storage.nbytes() // tensor.itemsize,
                storage,
            )  # held, so that no other has its place
        return tensor

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Need(parameters, counter.get_total_flops(), sum(numbers for numbers, _ in kept.values()))


def check_fits(size: str, needs: dict[str, Need], device: torch.device, dtype: str) -> None:
    """Raise a ValueError where the largest model of a size and what one step keeps are more than is free."""
    number = getattr(torch, dtype).itemsize
    weights = number * max(need.parameters for need in needs.values())
    step = number * max(need.parameters + need.kept for need in needs.values())
    free = available_memory(device)
    if free is not None and weights + step > free:
        total, of_weights, of_step, left = (number / 2**30 for number in (weights + step, weights, step, free))
        raise ValueError(
            f"`sizes` holds {size!r}: its models, one at a time and in {dtype}, need about {total:,.1f} GiB "
            f"({of_weights:,.1f} of weights, {of_step:,.1f} of gradients and activations), and {left:,.1f} GiB are "
            f"free on {device}."
        )


def step_time(
    place: Place,
    folder: Path,
    command: str,
    progress: Callable[[str], None],
    sizes: Sequence[str],
    models: Sequence[str] = MODELS,
    length: int = 512,
    batch: int = 1,
    rounds: int = 5,
    device: str | None = None,
    dtype: str = "float32",
) -> ItemResult:
    """
    Time training steps (forward and backward) of language models that have as many parameters each: all of one size
    take turns in one process, with weights in the same memory and the gradients of one at a time.

    Args:
        folder: keeps what is measured, which is not measured again.
        sizes: of `SIZES`.
        models: of `MODELS`; the first is the measure of the others.
        length, batch: tokens and sequences of a step.
        rounds: after one for warming up.
        device: the first GPU, where there is one, when `None`.

    Raises:
        ValueError: for models that cannot be or do not fit into memory, or a folder that was measured elsewhere or
            with other settings.
    """
    for name, value in (("length", length), ("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    if not sizes or not models:
        raise ValueError("`sizes` and `models` must not be empty.")
    used = _device(device)
    configs = {each: {model: step_config(model, each) for model in models} for each in sizes}
    longest = min(config.max_position_embeddings for of_size in configs.values() for config in of_size.values())
    if length > longest:
        raise ValueError(f"`length` is {length}; these models read at most {longest} tokens.")

    kept = used.type == "cpu" and keep_freed_memory()
    settings = {"dtype": dtype, "length": length, "batch": batch, "rounds": rounds}
    results = open_measured(folder, settings | {"freed_memory_kept": kept}, used)
    parts, needs = {}, {}
    for each, of_size in configs.items():
        progress(f"{each}: counting")
        needs[each] = {model: count_need(config, batch, length) for model, config in of_size.items()}
        work = {model: need.operations for model, need in needs[each].items()}
        parts[each] = Part(work, partial(make_jobs, of_size, batch, length, used, dtype))
        if not is_measured(each, parts[each], results):
            check_fits(each, needs[each], used, dtype)
    figures = measure(parts, results, folder, rounds, used, progress)
    for each, part in figures.items():
        for model, entry in part["models"].items():
            need, config = needs[each][model], configs[each][model]
            entry["parameters"], entry["operations"] = need.parameters, need.operations
            entry["heads"] = config.num_simulated_heads or config.num_attention_heads
    return _result(place, command, figures, sizes, models, length, batch, rounds, used, dtype, kept)


def _device(name: str | None) -> torch.device:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` is {name!r}, which cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def printed_times(place: Place) -> dict[tuple[str, str], float]:
    """What the paper prints, by size and model, in a unit that it does not name."""
    columns = [name.lower() for name in place.table.columns]
    rows = [(row.model.lower(), cast(list[float], row.values)) for row in place.table.rows]
    return {(size, model): v for model, values in rows for size, v in zip(columns, values, strict=True)}


def _paper_ratio(paper: dict, size: str, model: str, first: str) -> float | None:
    """Of both our SAS rows the paper's one, whose kernel size it does not say."""
    ours, measure_of = (paper.get((size, name.partition("-")[0])) for name in (model, first))
    return None if ours is None or measure_of is None or model == first else ours / measure_of


def _result(
    place: Place, command: str, figures: dict, sizes, models, length, batch, rounds, device, dtype, kept: bool
) -> ItemResult:
    paper, first, grids, comparisons = printed_times(place), models[0], [], []
    for each in sizes:
        rows = []
        for model, entry in figures[each]["models"].items():
            ratio = _paper_ratio(paper, each, model, first)
            spread = f"{entry['smallest']:.3f}-{entry['largest']:.3f}"
            cells = [str(entry["heads"]), f"{entry['parameters'] / 1e6:,.1f}", f"{1000 * entry['value']:,.0f}"]
            cells += ["", ""] if model == first else [f"{entry['ratio']:.3f}", spread]
            operations = entry["operations"] / figures[each]["models"][first]["operations"]
            cells += [f"{operations:.3f}", "" if ratio is None else f"{ratio:.3f}"]
            rows.append([model, *cells])
            if ratio is not None:
                ends = {"low": entry["smallest"], "high": entry["largest"], "n": rounds, "neutral": 1.0}
                what = f"{model} over {first}, {each}"
                comparisons.append(Comparison(what, "ratio", entry["ratio"], ratio, **ends))
        header = ["model", "heads", "M param.", "ms", f"over {first}", "spread", "operations", "paper"]
        caption = (
            f"Forward and backward pass, {length} tokens, batch {batch}, {dtype}, {device}; medians of {rounds} "
            f"rounds, ratios in the same round. Operations: counted, over {first}'s. Heads of sas: those simulated."
        )
        grids.append(Grid(f"Time of one training step, {each.upper()}", header, rows, caption))
    if comparisons:
        grids.append(comparison_grid(f"Time of a step over {first}'s in the same round, and the paper's", comparisons))
    notes = [
        *([place.at.note] if place.at.note else []),
        "A step is the forward and backward pass. The optimiser is left out: its time goes with the parameters, which "
        "are matched, so that with it all ratios would come a little nearer to 1.",
        "The paper does not say which kernel SAS has in this table: sas has 1, as its models of FineWeb-Edu here, "
        "sas-k5 has 5, as its Table 7 has on MHA; both are set beside its one row.",
        "Neither unit, precision, device nor implementation are printed: ratios are compared, not times.",
        "Weights and tokens are random, and the weights of all models of a size lie in the same memory, by turns.",
        "Table 2 prints heads at 125M and 350M alone; those of the baselines at 2.7B and above are ours, as many as "
        "come nearest to MHA's parameters.",
        "An interval is the smallest and the largest of the rounds' ratios, not of confidence.",
    ]
    if kept:
        notes.append("Freed memory was kept for the next step, as `sas-hf train` does (docs/cost.md).")
    return result_at(
        place,
        None,
        command,
        seconds=sum(part["seconds"] for part in figures.values()),
        environment=environment(device),
        grids=grids,
        comparisons=comparisons,
        numbers={"length": length, "batch": batch, "dtype": dtype, "rounds": rounds, "sizes": figures},
        notes=notes,
        figure=_draw(figures, sizes, first, paper),
    )


def _draw(figures: dict, sizes, first: str, paper: dict):
    """A panel per size: ratios to the first model, ours and the paper's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 3 * len(sizes), 2.8), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, each in zip(panels, sizes, strict=True):
        others = {model: entry for model, entry in figures[each]["models"].items() if model != first}
        rows = [(model, entry, _paper_ratio(paper, each, model, first)) for model, entry in others.items()]
        ends = [entry["largest"] for _, entry, _ in rows] + [ratio for _, _, ratio in rows if ratio is not None]
        draw_ratios(axes, rows, max(ends, default=1.0))
        label_axes(axes, f"time of a step over {first}'s", "", each.upper())
    ratio_legend(figure)
    return figure
