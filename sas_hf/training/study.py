"""A study: the same training for every variant, data set and seed of a grid, and what the runs say together.

Declared as YAML, resumable run by run. What it says in the end is in `study_report.py`.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from accelerate import PartialState

from ..report.figures import require_matplotlib
from ..report.files import check_writable, locked, write_atomically, writing
from ..report.quantities import time_text
from .arguments import training_arguments
from .fields import build, check_names, find_yaml, read_fields, read_yaml, shipped_names
from .folders import differences, flat, has_ended, has_trained, holds
from .recipe import TrainingRecipe, load_recipe, merge
from .recipe_checks import check_recipe
from .run import RECIPE_NAME, check_folder, train
from .sizes import check_fits
from .study_matched import RATIO_NAME, Match, Timing, at_steps, at_width, check_matched, check_steps, fit_width
from .study_rates import RATE_SEED, RateChoice, at_rate, best_rate, final_value, try_rate
from .study_report import REPORT_NAME, StudyReport
from .study_results import FinishedRun
from .study_time import seconds_left
from .tasks import Metric, Task, find_task


# What a study was declared as: beside its runs, so that another one does not mix with them.
STUDY_NAME = "declaration.yaml"
STUDIES = files(__package__) / "studies"
# Fields of a recipe that every study sets itself, and where they are given to it.
DECIDED = {"training.seed": "as `seeds` or --seeds", "training.output_dir": "as `output`, --output or `runs`"}
NAME = re.compile(r"\w[\w.+-]*")  # names become folders


@dataclass
class Study:
    """
    A grid of trainings.

    Args:
        recipe: what they share: a recipe of the package, a file (beside the study's), or a recipe's fields.
        variants: by name, the fields that each changes, as in a recipe that has a `base`. The others are compared with
            the first.
        matched: by name, further variants, each another one with a third's cost: `{variant: V, to: W, by: parameters}`
            is V with the widest feed-forward layers with which it has no more parameters than W; by `seconds` it is V
            with as many steps as take the time of W's, and a warm-up in proportion. Steps of both are timed
            side by side before its first run, and their ratio is kept in `NAME/ratio.json`. It has V's learning rate.
            V and W may be matched by parameters themselves, above it.
        seeds: of each.
        learning_rates: that each variant is first trained with on each data set, by a seed that does not count
            (1,000,000, in `VARIANT/rate-R`); with the one that ends best, in the study's metric, its seeds are
            trained. `minimum_learning_rate` and `simulation_learning_rate` keep their share of the recipe's
            `training.learning_rate`. One alone: it is every variant's. None: as the recipe says.
        data: by name, the fields of the recipe's `data` to change: every variant is trained on each. None: as the
            recipe says.
        output: folder of the study: its declaration, report and runs. A run's is `VARIANT/seed-N` in it, below the
            data's name where there are several.
        runs: folder of the runs, where several studies share them: what one has trained another takes as it is, and a
            study of fewer or other variants leaves the rest alone. None: `output`.
        metric: of the task's, such as "accuracy", by which variants are compared and which is drawn. None: the task's
            first, which is the validation loss of language models.
        figure: "curves": the metric over tokens (steps, where the task does not count tokens); "curves-over-time": and
            over seconds of training; "bars": where it ended; "sweep": that over `variable`.
        variable: of a sweep: a number that every variant sets, such as `model.overrides.num_attention_heads`.
    """

    recipe: str | dict[str, Any] | None = None
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    matched: dict[str, dict[str, str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: str | None = None
    runs: str | None = None
    metric: str | None = None
    figure: Literal["curves", "curves-over-time", "bars", "sweep"] = "curves"
    variable: str | dict[str, float] | None = None
    variable_label: str | None = None


@dataclass(frozen=True)
class Run:
    """
    One training of a study.

    Attributes:
        variant, data, seed: place in the grid; `data` is "" where the recipe's own is used.
        recipe: of which, where there are `searches` or a `timing`, the learning rate or the steps are theirs to find.
        rate: that this training tries; `None`: it is one that counts.
        searches: the trainings that try rates for this one.
        match: what it has of other variants, where it is a matched one.
        timing: of one that is matched by seconds.
    """

    variant: str
    data: str
    seed: int
    recipe: TrainingRecipe
    rate: float | None = None
    searches: tuple["Run", ...] = ()
    match: Match | None = None
    timing: Timing | None = None

    @property
    def folder(self) -> Path:
        return Path(self.recipe.training["output_dir"])

    @property
    def name(self) -> str:
        what = f"seed {self.seed}" if self.rate is None else f"rate {self.rate:g}"
        return ", ".join(filter(None, (self.data, self.variant, what)))

    @property
    def is_open(self) -> bool:
        """Whether other runs, or a ratio of times, decide a part of its recipe."""
        return bool(self.searches) or self.timing is not None

    def found(self, metric: Metric) -> RateChoice | None:
        """What its searches found; `None`: they have not all ended.

        Raises:
            FloatingPointError: where all diverged.
        """
        if not self.searches or not all(has_ended(search.folder) for search in self.searches):
            return None
        tried = {cast(float, search.rate): final_value(search.folder, metric) for search in self.searches}
        if (rate := best_rate(tried, metric)) is None:
            raise FloatingPointError(
                f"Run {self.name}: the trainings with all `learning_rates` ({', '.join(map(str, tried))}) diverged; "
                "name lower ones, and another folder."
            )
        return RateChoice(self.variant, self.data, rate, tried)

    def at(self, rate: float) -> "Run":
        return replace(self, recipe=at_rate(self.recipe, rate))

    def settled(self, metric: Metric) -> "Run | None":
        """With the rate that its searches found and the steps of its ratio; `None`: those have not all ended, or that
        is not known. Raises as [`found`]."""
        run = self
        if self.searches:
            if (choice := self.found(metric)) is None:
                return None
            run = run.at(choice.rate)
        if self.timing is not None:
            if (steps := self.timing.steps()) is None:
                return None
            run = replace(run, recipe=at_steps(run.recipe, steps), match=replace(cast(Match, self.match), steps=steps))
        return run


def study_names() -> list[str]:
    """The studies that come with the package."""
    return shipped_names(STUDIES)


def load_study(source: str | Path, output: str | Path | None = None, seeds: list[int] | None = None) -> Study:
    """
    Read a study.

    Args:
        source: a YAML file, or the name of a study that comes with the package.
        output, seeds: in the place of the study's.

    Raises:
        FileNotFoundError: where there is neither such a file nor such a study.
        ValueError: for an unknown or misspelt field (with the nearest known one), a name given twice, a value of
            another type, or an empty grid.
    """
    path = find_yaml(source, STUDIES, "study")
    fields = read_fields(path)
    if fields.keys() & {"base", "model", "training"}:
        raise ValueError(f"{path} is a recipe, not a study; run it by `sas-hf train`.")
    study = build(Study, fields, kind="no field of a study")
    if isinstance(study.recipe, str):
        study.recipe = _beside(path, study.recipe)
    elif study.recipe is not None and isinstance(study.recipe.get("base"), str):
        study.recipe["base"] = _beside(path, study.recipe["base"])
    study.output = study.output if output is None else str(output)
    study.seeds = study.seeds if seeds is None else seeds
    _check(study)
    return study


def _beside(path: Path, recipe: str) -> str:
    """The recipe beside a study's file, or that of the package."""
    return str(path.parent / recipe) if (path.parent / recipe).is_file() else recipe


def plan_runs(study: Study, overrides: list[str] | tuple[str, ...] = (), needs_data: bool = True) -> list[Run]:
    """
    The study's trainings: those that try learning rates, then seed by seed, so that the first results compare all
    variants.

    Args:
        overrides: fields of every recipe, as of [`load_recipe`].
        needs_data: likewise.

    Raises:
        ValueError, FileNotFoundError: for a recipe that cannot be run, or an override of what the variants differ in.
    """
    _check_overrides(study, overrides)
    searches: dict[tuple[str, str], tuple[Run, ...]] = {}
    data_sets = list(study.data) or [""]
    for data, variant in itertools.product(data_sets, study.variants if len(study.learning_rates) > 1 else ()):
        run = _plan_run(study, data, variant, RATE_SEED, overrides, needs_data)
        searches[data, variant] = tuple(_trying(rate, run) for rate in study.learning_rates)
    runs = [run for tried in searches.values() for run in tried]
    first: dict[tuple[str, str], Run] = {}
    for seed, data in itertools.product(study.seeds, data_sets):
        planned: dict[str, Run] = {}
        for variant in study.variants:
            run = _plan_run(study, data, variant, seed, overrides, needs_data)
            if len(study.learning_rates) == 1:
                run = run.at(study.learning_rates[0])
            planned[variant] = replace(run, searches=searches.get((data, variant), ()))
            first.setdefault((data, variant), planned[variant])
        for name in study.matched:
            planned[name] = _plan_matched(study, name, planned, first)
            first.setdefault((data, name), planned[name])
        runs += planned.values()
    for name, value in _variables(study).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            field = study.variable if isinstance(study.variable, str) else "variable"
            raise ValueError(f"Variant {name!r} has {value!r} as `{field}`; a sweep needs a number.")
    _check_task(study, runs)
    return runs


def _decided(study: Study) -> dict[str, str]:
    """Fields of a recipe that this study sets itself, and where they are given to it."""
    return DECIDED | ({"training.learning_rate": "as `learning_rates`"} if study.learning_rates else {})


def _check_overrides(study: Study, overrides: list[str] | tuple[str, ...]) -> None:
    changed = {name for fields in study.variants.values() for name in flat(fields)}
    changed |= {f"data.{name}" for fields in study.data.values() for name in flat(fields)}
    for override in overrides:
        name = override.partition("=")[0]
        if name in (decided := _decided(study)):
            raise ValueError(f"{override!r} sets what the study decides; give it {decided[name]}.")
        if clash := [
            other for other in changed if f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.")
        ]:
            raise ValueError(f"{override!r} changes `{clash[0]}`, in which the study's runs differ; leave it out.")


def _plan_run(
    study: Study, data: str, variant: str, seed: int, overrides: list[str] | tuple[str, ...], needs_data: bool
) -> Run:
    base = study.recipe if isinstance(study.recipe, dict) else {"base": study.recipe}
    folder = Path(study.runs or cast(str, study.output), data, variant, f"seed-{seed}")
    ours = {"data": study.data.get(data, {}), "training": {"seed": seed, "output_dir": str(folder)}}
    try:
        recipe = load_recipe(merge(merge(base, study.variants[variant]), ours), overrides, needs_data)
        for rate in study.learning_rates:
            check_recipe(at_rate(recipe, rate), needs_data)
    except ValueError as error:
        raise ValueError(f"Variant {variant!r}: {error}") from error
    return Run(variant, data, seed, recipe)


def _plan_matched(study: Study, name: str, planned: dict[str, Run], first: dict[tuple[str, str], Run]) -> Run:
    """Of the same seed's runs of the variants; `first`: the first seed's by data and variant."""
    of, to, by = (study.matched[name][field] for field in ("variant", "to", "by"))
    run, other = planned[of], planned[to]
    match = Match(name, run.data, of, to, by)
    run = replace(run, variant=name, match=match)
    folder = run.folder.parent.with_name(name) / run.folder.name
    try:
        if by == "parameters":
            known = first.get((run.data, name))
            known_width = None if known is None or known.match is None else known.match.width
            width = fit_width(run.recipe, other.recipe) if known_width is None else known_width
            run = replace(run, recipe=at_width(run.recipe, width), match=replace(match, width=width))
        else:
            for recipe in (run.recipe, other.recipe):
                check_steps(recipe)
            timing = Timing(of, to, folder.with_name(RATIO_NAME), run.recipe, other.recipe)
            run = replace(run, timing=timing)
    except ValueError as error:
        raise ValueError(f"`matched.{name}`, {of} with the {by} of {to}: {error}.") from error
    return replace(run, recipe=replace(run.recipe, training=run.recipe.training | {"output_dir": str(folder)}))


def _trying(rate: float, run: Run) -> Run:
    """The training that tries a rate for a run's variant."""
    tried = at_rate(run.recipe, rate)
    folder = str(run.folder.with_name(f"rate-{float(rate)}"))
    return replace(run, rate=rate, recipe=replace(tried, training=tried.training | {"output_dir": folder}))


def _variables(study: Study) -> dict[str, Any]:
    """Of a sweep, what each variant has."""
    if study.variable is None:
        return {}
    names = [*study.variants, *study.matched]
    if isinstance(study.variable, dict):
        return {name: study.variable.get(name) for name in names}
    return {name: flat(study.variants.get(name, {})).get(study.variable) for name in names}


def _check_task(study: Study, runs: list[Run]) -> None:
    if len(tasks := {run.recipe.task for run in runs}) > 1:
        raise ValueError(f"The runs have the tasks {', '.join(sorted(tasks))}; only runs of one task can be compared.")
    task = find_task(runs[0].recipe.task)
    _check_metric(study, task, _shared(task.possible_metrics, runs))
    if study.figure == "curves-over-time" and task.tokens_per_sequence(runs[0].recipe) is None:
        raise ValueError(
            f"`figure` is {study.figure!r}, but runs of the task {task.name} do not count tokens per second; take "
            "curves."
        )


def _shared(metrics_of: Callable[[TrainingRecipe], Sequence[Metric]], runs: list[Run]) -> list[Metric]:
    """Of the first run's metrics, those that runs with other benchmarks have, too."""
    kinds: dict[tuple[str, ...], TrainingRecipe] = {}
    for run in runs:
        kinds.setdefault(tuple(run.recipe.evaluation.tasks), run.recipe)
    first, *others = map(metrics_of, kinds.values())
    return [metric for metric in first if all(metric in metrics for metrics in others)]


def _check_metric(study: Study, task: Task, metrics: Sequence[Metric]) -> None:
    if study.metric is not None:
        check_names([study.metric], [metric.name for metric in metrics], kind=f"no `metric` of the task {task.name}")


def study_metrics(study: Study, runs: list[Run]) -> tuple[list[Metric], Metric]:
    """Those that all runs have, and the study's own. Raises a ValueError where that is none of them."""
    task = find_task(runs[0].recipe.task)
    metrics = _shared(task.metrics_of, runs)
    _check_metric(study, task, metrics)
    return metrics, next((metric for metric in metrics if metric.name == study.metric), metrics[0])


def run_study(
    study: Study, overrides: list[str] | tuple[str, ...] = (), progress: Callable[[str], None] = lambda message: None
) -> StudyReport:
    """
    Train what is not trained yet, and report. All runs are checked before the first is begun.

    Args:
        overrides: fields of every recipe, as of [`load_recipe`].
        progress: is told of each run, and about how long the whole study still takes, once a run has ended.

    Returns:
        the report, which is also in the study's folder: `study.md`, `study.json` and the figure.

    Raises:
        ValueError, FileNotFoundError, ImportError: as [`plan_runs`] and `train`.
        FileExistsError: where the folder holds something else than a part of this study, or a run's another recipe's.
        BlockingIOError: where another process is at work in it.
        PermissionError: where nothing can be written.
        InterruptedError, KeyboardInterrupt: after SIGTERM or SIGHUP, after Ctrl-C; the same study goes on from there.
    """
    _check(study)
    require_matplotlib()
    runs = plan_runs(study, overrides)
    output = Path(cast(str, study.output))  # which `_check` asks for
    with locked(output, f"`output` is {study.output!r}", in_place=True), writing(output):
        return _run_all(study, runs, _declaration(study, overrides), progress)


def check_runs(study: Study, runs: list[Run]) -> None:
    """Raise what models, data and folders of planned trainings give cause for, as [`run_study`] does at first."""
    for run in runs:
        if not run.is_open:
            check_run_folder(run)
        if run.seed == study.seeds[0]:  # the others differ in nothing else
            _check_run(run)


def _run_all(study: Study, runs: list[Run], declared: dict[str, Any], progress: Callable[[str], None]) -> StudyReport:
    folder = Path(cast(str, study.output))
    _check_folder(folder, declared)
    if study.runs is not None and Path(study.runs).is_file():
        raise FileExistsError(f"`runs` is {study.runs!r}, a file; name a folder.")
    check_writable(runs[0].folder, f"`runs` is {study.runs or study.output!r}")
    check_runs(study, runs)
    finished = []
    metrics, metric = study_metrics(study, runs)
    for run in runs:
        if run.is_open:
            _check_possible_folder(run, metric)
    if PartialState().is_main_process:
        write_atomically(folder / STUDY_NAME, yaml.safe_dump(declared, sort_keys=False).encode())
    matches: dict[tuple[str, str], Match] = {}
    for number, run in enumerate(runs, 1):
        if run.timing is not None and run.timing.steps() is None:
            progress(f"steps of {run.timing.of} and of {run.timing.to} are timed side by side")
            run.timing.measure()
        known: list[str] = []
        run = cast(Run, run.settled(metric))  # those that it waits for stand before it
        if run.is_open:
            check_run_folder(run)
        if run.searches:
            known.append(f"learning rate {run.recipe.training['learning_rate']:g}")
        if run.match is not None:
            matches[run.data, run.variant] = run.match
            known.append(f"{run.match.of} with {run.match.gets}")
        known += ["has ended, kept"] if has_ended(run.folder) else []
        left = seconds_left([((each.variant, each.data), each.folder) for each in runs])
        known += [] if left is None else [f"about {time_text(left)} left"]
        progress(f"run {number} of {len(runs)}: {run.name}" + (f" ({'; '.join(known)})" if known else ""))
        if run.rate is not None:
            try_rate(run.recipe)
            continue
        results = train(run.recipe)
        finished.append(FinishedRun.read(run.variant, run.data, run.seed, run.folder, results, metrics))
    rates = _choices(runs, metric)
    report = report_of(study, runs, finished, metrics, metric, declared, rates, list(matches.values()))
    if PartialState().is_main_process:
        report.save(folder)
    return report


def report_of(
    study: Study,
    runs: list[Run],
    finished: Sequence[FinishedRun],
    metrics: Sequence[Metric],
    metric: Metric,
    declared: dict[str, Any] | None = None,
    rates: Sequence[RateChoice] = (),
    matches: Sequence[Match] = (),
) -> StudyReport:
    """What runs say together that have ended; the arguments are those of [`StudyReport`]."""
    recipe = runs[0].recipe
    across = "steps" if find_task(recipe.task).tokens_per_sequence(recipe) is None else "tokens"
    variables = _variables(study)
    return StudyReport(finished, declared, study.figure, variables, metrics, metric, across, rates, matches)


def _choices(runs: list[Run], metric: Metric) -> list[RateChoice]:
    """The rates that were found, once for each variant and data set."""
    searched = {(run.data, run.variant): run for run in runs if run.searches and run.match is None}
    return [found for run in searched.values() if (found := run.found(metric)) is not None]


def _declaration(study: Study, overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """What `declaration.yaml` and `study.json` say of a study."""
    return asdict(study) | {"overrides": list(overrides)}


def _check_folder(folder: Path, declared: dict[str, Any]) -> None:
    """
    Raise a FileExistsError unless the folder is free or holds this study, which may have grown since; one with neither
    a report nor a checkpoint counts as free. A PermissionError where nothing can be written.

    Of runs in a folder of their own it may be any part: nothing becomes a stranger there.
    """
    where = f"`output` is {str(folder)!r}"
    if not holds(folder, STUDY_NAME, where, "study"):
        return
    shared = Path(declared["runs"] or folder).resolve()
    trained = [run.parent for run in folder.resolve().rglob(RECIPE_NAME) if has_trained(run.parent)]
    if shared != folder.resolve():
        trained = [run for run in trained if not run.is_relative_to(shared)]
    if not trained and not (folder / REPORT_NAME).is_file():
        return
    there = read_yaml((folder / STUDY_NAME).read_text(encoding="utf-8"))
    if listed := differences(_shared_fields(there), _shared_fields(declared)):
        raise FileExistsError(f"{where}, which holds another study ({listed}); name another folder.")
    for kind in ("variants", "matched", "data", "seeds") if trained else ():
        held, wanted = (as_dict(study.get(kind) or {}) for study in (there, declared))
        if other := [name for name in held if name not in wanted or held[name] != wanted[name]]:
            raise FileExistsError(
                f"{where}, which holds a study with more or other `{kind}` ({', '.join(map(str, other))}); a study "
                "may grow in its folder, not shrink or change: name another folder."
            )


def as_dict(entries: dict | list) -> dict:
    return entries if isinstance(entries, dict) else dict.fromkeys(entries)


def _shared_fields(declared: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a study share, by name: its recipe's fields, the rates to be tried and the overrides."""
    shared = flat({"recipe": declared["recipe"], "learning_rates": declared.get("learning_rates") or []})
    return shared | dict(override.split("=", 1) for override in declared["overrides"])


def check_run_folder(run: Run) -> None:
    """Raise a FileExistsError where a run's folder holds something else than the run, or a part of it."""
    try:
        check_folder(run.folder, run.recipe)
    except FileExistsError as error:
        raise FileExistsError(f"Run {run.name}: {error}") from error


def _check_possible_folder(run: Run, metric: Metric) -> None:
    """As [`check_run_folder`], of an open run: while its rate is not known, it may have any of those to be tried. One
    whose steps are not known is looked at when they are."""
    if (settled := run.settled(metric)) is not None:
        check_run_folder(settled)
        return
    errors = []
    for rate in [cast(float, search.rate) for search in run.searches] if run.timing is None else ():
        try:
            check_run_folder(run.at(rate))
        except FileExistsError as error:
            errors.append(error)
    if errors and len(errors) == len(run.searches):
        raise errors[0]


def _check(study: Study) -> None:
    if study.recipe is None:
        raise ValueError("`recipe` is not given; name a recipe or a file, or write its fields.")
    if not study.output:
        raise ValueError("`output` is not given; name the folder of the study.")
    if study.runs == "":
        raise ValueError("`runs` is ''; name the folder of the runs, or leave it out.")
    for name in ("variants", "seeds"):
        if not getattr(study, name):
            raise ValueError(f"`{name}` is empty; a study needs at least one, and two of each to compare.")
    if len(set(study.seeds)) < len(study.seeds):
        raise ValueError(f"`seeds` is {study.seeds}; each must be there once.")
    if min(study.seeds) < 0 or max(study.seeds) >= 2**32:
        raise ValueError(f"`seeds` is {study.seeds}; a seed is 0 or more, and less than 2**32.")
    rates = study.learning_rates
    if len(set(rates)) < len(rates) or not all(0 < rate < 10 for rate in rates):
        raise ValueError(f"`learning_rates` is {rates}; each must be positive, and there once.")
    if len(rates) > 1 and RATE_SEED in study.seeds:
        raise ValueError(f"`seeds` has {RATE_SEED}, on which the `learning_rates` are tried; take another.")
    variants = list(study.variants.items())
    for number, (name, fields) in enumerate(variants):
        if same := [other for other, theirs in variants[:number] if theirs == fields]:
            raise ValueError(f"Variants {same[0]!r} and {name!r} are the same; leave one out.")
    for kind in ("variants", "matched", "data"):
        for name in getattr(study, kind):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(f"`{kind}` has the name {name!r}; a name is text of letters, digits, _ . + and -.")
    for name, fields in study.variants.items():
        for taken in (*_decided(study), "base"):
            if taken in flat(fields):
                raise ValueError(f"Variant {name!r} sets `{taken}`, which the study decides; leave it out.")
    check_matched(study.matched, list(study.variants))
    if (study.figure == "sweep") != (study.variable is not None):
        raise ValueError(
            f"`variable` is {study.variable!r} and `figure` is {study.figure!r}; a sweep needs a variable."
        )
    if isinstance(study.variable, dict):
        check_names(study.variable, [*study.variants, *study.matched], "variable.", "no variant of the study")
        if not study.variable_label:
            raise ValueError("`variable_label` is not given; say what the numbers of `variable` are.")
    elif study.variable_label is not None and study.variable is None:
        raise ValueError(f"`variable_label` is {study.variable_label!r}, but there is no sweep; leave it out.")


def _check_run(run: Run) -> None:
    """What `train` would refuse, or could not be compared."""
    recipe, task = run.recipe, find_task(run.recipe.task)
    try:
        if not task.is_validated(recipe):
            raise ValueError("`data` has nothing to validate on; give `data.validation` or one of its like.")
        check_fits(recipe, training_arguments(recipe))
        task.check_sources(recipe)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"Run {run.name}: {error}") from error
