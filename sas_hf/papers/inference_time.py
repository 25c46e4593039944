"""Table 4 of "You Need to Pay Better Attention": seconds of inference for 5,000 samples, by kind and heads."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from ..configurations import named_config
from ..hub.info import describe
from ..modeling import SASEncoderConfig, SASViTConfig
from ..report.figures import label_axes
from ..report.machine import environment
from ..report.tables import PAPER, Grid
from .comparison import Comparison, ItemResult, comparison_grid, result_at
from .items import Place
from .timing import Part, draw_ratios, measure, open_measured, ratio_legend


PAPERS_SAMPLES = 5000
HEADS = (1, 4, 8)
KINDS = ("standard", "optimised", "efficient", "super", "sas")
DATA_SETS = {"mnist": "MNIST", "cifar100": "CIFAR100", "imagenet": "ImageNet", "imdb": "IMDB", "amazon": "Amazon"}
BATCH, ROUNDS = 64, 7


def classifier_config(data_set: str, kind: str, heads: int) -> SASViTConfig | SASEncoderConfig:
    """The paper's model with so many heads; "sas" is ours: three times as many, half as many features again.

    Raises:
        ValueError: for an unknown model, or heads that the width cannot be split into.
    """
    fields = {"num_attention_heads": heads}
    hidden_size = named_config(f"{data_set}-standard").hidden_size
    if heads < 1 or hidden_size % heads:
        raise ValueError(
            f"`heads` holds {heads}, into which the {hidden_size} features of {data_set} cannot be split."
        )
    if kind == "sas":
        width = hidden_size // heads
        fields |= {"head_dim": width, "num_simulated_heads": 3 * heads, "simulated_head_dim": width * 3 // 2}
    return cast(SASViTConfig | SASEncoderConfig, named_config(f"{data_set}-{kind}", **fields))


class Inference:
    """The forward pass of a classifier over all samples, batch by batch."""

    def __init__(self, model: torch.nn.Module, samples: torch.Tensor, batch: int):
        self.model, self.batches = model, samples.split(batch)

    @torch.inference_mode()
    def __call__(self) -> None:
        for batch in self.batches:
            self.model(batch)

    def reset(self) -> None:
        """Nothing is left behind."""


def random_samples(config: SASViTConfig | SASEncoderConfig, count: int) -> torch.Tensor:
    """Images `[count, channels, height, width]`, or texts of the greatest length `[count, T]`, without padding."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(config, SASViTConfig):
        return torch.rand(count, config.num_channels, *config.image_shape, generator=generator)
    shape = (count, config.max_position_embeddings)
    return torch.randint(1, config.vocab_size, shape, generator=generator)  # 0 is padding


def make_jobs(configs: dict[str, Any], samples: int, batch: int) -> dict[str, Inference]:
    """Random models, which take as long as trained ones."""
    inputs, jobs = random_samples(next(iter(configs.values())), samples), {}
    for kind, config in configs.items():
        torch.manual_seed(0)
        images = isinstance(config, SASViTConfig)
        auto_class = AutoModelForImageClassification if images else AutoModelForSequenceClassification
        jobs[kind] = Inference(auto_class.from_config(config).eval(), inputs, batch)
    return jobs


def printed_seconds(place: Place) -> dict[tuple[str, str, int], float]:
    """What the paper prints, by data set, kind and heads."""
    table = place.table
    places = {data_set: table.columns.index(name) for data_set, name in DATA_SETS.items()}
    heads = table.columns.index("heads")
    rows = [(row.model, cast(list[Any], row.values)) for row in table.rows]
    return {(d, model, values[heads]): values[column] for model, values in rows for d, column in places.items()}


def inference_time(
    place: Place,
    folder: Path,
    command: str,
    progress: Callable[[str], None],
    samples: dict[str, int],
    heads: Sequence[int] = HEADS,
    kinds: Sequence[str] = KINDS,
    batch: int = BATCH,
    rounds: int = ROUNDS,
) -> ItemResult:
    """
    Time the inference of the paper's classifiers, float32, on this CPU: all kinds of one data set and number of heads
    take turns in one process.

    Args:
        folder: keeps what is measured, which is not measured again.
        samples: by data set, some of `DATA_SETS`, how many random samples of its shape a turn takes; times are scaled
            to the paper's 5,000.
        heads: of every data set's models.
        kinds: the first is the measure of the others.
        batch: of samples, at most.
        rounds: after one for warming up.

    Raises:
        ValueError: for models that cannot be, or a folder that was measured elsewhere or with other settings.
    """
    for name, value in (("batch", batch), ("rounds", rounds), *((f"samples.{d}", n) for d, n in samples.items())):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    for name, values, known in (("samples", samples, DATA_SETS), ("kinds", kinds, KINDS)):
        if not values or set(values) - set(known):
            raise ValueError(f"`{name}` is {list(values)}; it must be some of {', '.join(known)}.")
    if not heads:
        raise ValueError("`heads` is empty; name at least one number of heads.")

    cpu = torch.device("cpu")
    parts, operations = {}, {}
    configs = {(d, h): {k: classifier_config(d, k, h) for k in kinds} for d in samples for h in heads}
    settings = {"dtype": "float32", "batch": batch, "rounds": rounds, "samples": samples}
    results = open_measured(folder, settings, cpu)
    for (data_set, h), models in configs.items():
        name, count = part_name(data_set, h), samples[data_set]
        operations[name] = {kind: _operations(config) for kind, config in models.items()}
        work = {kind: count * counted for kind, counted in operations[name].items()}
        parts[name] = Part(work, partial(make_jobs, models, count, batch), per=count)
    figures = measure(parts, results, folder, rounds, cpu, progress)

    for name, part in figures.items():  # seconds of a sample become those of 5,000
        for kind, entry in part["models"].items():
            entry["seconds"] = PAPERS_SAMPLES * entry["value"]
            entry["operations_of_a_sample"] = operations[name][kind]
    return _result(place, command, figures, heads, kinds, samples, batch, rounds)


def part_name(data_set: str, heads: int) -> str:
    return f"{DATA_SETS[data_set]}, h = {heads}"


def _operations(config: SASViTConfig | SASEncoderConfig) -> int:
    """Of the forward pass of a sample."""
    info = describe(config)
    return info.forward_flops * info.context


def _result(
    place: Place, command: str, figures: dict, heads, kinds, samples: dict[str, int], batch: int, rounds: int
) -> ItemResult:
    paper, first, data_sets = printed_seconds(place), kinds[0], list(samples)
    comparisons = []
    for data_set in data_sets:
        for h in heads:
            for kind in kinds[1:]:
                entry = figures[part_name(data_set, h)]["models"][kind]
                ratio = _paper_ratio(paper, data_set, kind, first, h)
                if ratio is not None:
                    what = f"{kind} over {first}, {DATA_SETS[data_set]}, h={h}"  # for a line of 80
                    ends = {"low": entry["smallest"], "high": entry["largest"], "n": rounds, "neutral": 1.0}
                    comparisons.append(Comparison(what, "ratio", entry["ratio"], ratio, **ends))
    timed = ", ".join(f"{DATA_SETS[data_set]} {samples[data_set]:,}" for data_set in data_sets)
    scaled = f"Samples timed in a turn: {timed}; seconds are scaled to {PAPERS_SAMPLES:,}. Batches of {batch} at most."
    title = f"Seconds of inference for {PAPERS_SAMPLES:,} samples"
    caption = f"Medians of {rounds} rounds. {scaled}"
    grids = [Grid(title, _header(data_sets), _rows(figures, data_sets, heads, kinds, _seconds_cells, paper), caption)]
    caption = (
        f"Ours: medians over {rounds} rounds of the ratio in the same round. sas is ours, in no table of the paper."
    )
    rows = _rows(figures, data_sets, heads, kinds[1:], _ratio_cells, paper)
    grids.append(Grid(f"The same over {first}'s", _header(data_sets), rows, caption))
    grids.append(comparison_grid(f"Seconds over {first}'s in the same round, and the paper's", comparisons))
    return result_at(
        place,
        None,
        command,
        seconds=sum(part["seconds"] for part in figures.values()),
        environment=environment(torch.device("cpu")),
        grids=grids,
        comparisons=comparisons,
        numbers={"samples_timed": samples, "batch": batch, "rounds": rounds, "parts": figures},
        notes=[
            scaled,
            *([place.at.note] if place.at.note else []),
            "The paper names neither batch size nor precision, threads or warming up; here float32, one round for "
            "warming up, and all kinds of one data set and number of heads in turns, each round in another order.",
            "Time does not depend on what weights and samples hold, so both are random; texts are of the full length.",
            "The models are those of the named configurations with other heads. sas is ours: three times the heads, "
            "half as many features again.",
            "An interval is the smallest and the largest of the rounds' ratios, not of confidence.",
        ],
        figure=_draw(figures, data_sets, heads, kinds, paper),
    )


def _paper_ratio(paper: dict, data_set: str, kind: str, first: str, heads: int) -> float | None:
    ours, measure_of = (paper.get((data_set, name, heads)) for name in (kind, first))
    return None if ours is None or measure_of is None else ours / measure_of


def _header(data_sets) -> list[str]:
    return ["model", "h", *(DATA_SETS[data_set] for data_set in data_sets)]


def _rows(figures: dict, data_sets, heads, kinds, cells: Callable, paper: dict) -> list[list[str]]:
    """Kinds, heads within them, and below each the paper's row, if there is one."""
    rows = []
    for kind in kinds:
        for h in heads:
            pairs = [cells(figures, paper, data_set, kind, h) for data_set in data_sets]
            rows.append([kind, str(h), *(ours for ours, _ in pairs)])
            if any(theirs for _, theirs in pairs):
                rows.append([PAPER + kind, str(h), *(theirs for _, theirs in pairs)])
    return rows


def _seconds_cells(figures: dict, paper: dict, data_set: str, kind: str, heads: int) -> tuple[str, str]:
    seconds = figures[part_name(data_set, heads)]["models"][kind]["seconds"]
    theirs = paper.get((data_set, kind, heads))
    return amount(seconds), "" if theirs is None else amount(theirs)


def _ratio_cells(figures: dict, paper: dict, data_set: str, kind: str, heads: int) -> tuple[str, str]:
    models = figures[part_name(data_set, heads)]["models"]
    theirs = _paper_ratio(paper, data_set, kind, next(iter(models)), heads)
    return f"{models[kind]['ratio']:.3f}", "" if theirs is None else f"{theirs:.3f}"


def amount(seconds: float) -> str:
    """Three digits."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:#.3g}"


def _draw(figures: dict, data_sets, heads, kinds, paper: dict):
    """A panel per data set: ratios to the first kind, ours and the paper's."""
    from matplotlib.figure import Figure

    first, others = kinds[0], kinds[1:]
    every = [entry for part in figures.values() for kind, entry in part["models"].items() if kind in others]
    figure = Figure(
        figsize=(2.1 + 2.3 * len(data_sets), 1.4 + 0.24 * len(heads) * (len(others) + 1)), layout="constrained"
    )
    panels = figure.subplots(1, len(data_sets), sharey=True, squeeze=False)[0]
    # Where sas is far off, it must not press the others, which differ by a few per cent, into one line.
    near = [entry["largest"] for entry in every if entry["ratio"] < 1.3]
    low = min([0.84, *(entry["smallest"] for entry in every)]) - 0.02
    high = max([1.1, *near]) + 0.02
    for axes, data_set in zip(panels, data_sets, strict=True):
        rows = []
        for h in heads:
            for kind in others:
                entry = figures[part_name(data_set, h)]["models"][kind]
                rows.append((f"{kind}, h = {h}", entry, _paper_ratio(paper, data_set, kind, first, h)))
            rows.append(("", None, None))
        draw_ratios(axes, rows[:-1], high)
        axes.set_xlim(low, high)
        label_axes(axes, f"seconds over {first}'s", "", DATA_SETS[data_set])
    ratio_legend(figure)
    return figure
