"""The report of one evaluation or several: tables for the terminal and in Markdown, JSON, and plots.

A run's numbers stand beside the printed rows of the papers' tables for models of its size, which are marked as such.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Group
from rich.markup import escape

from ..report.figures import require_matplotlib
from ..report.files import one_at_a_time, write_atomically
from ..report.printed import PaperRow, PaperTable, printed, rows_of_size
from ..report.tables import Grid
from .comparison import METHOD, PairedDifference, compare
from .results import EvaluationResult, Metric, TaskResult, chance_of, finite, is_translation, perplexities, save_json
from .suites import ASKED


SHOWN = 10  # translations of each model
# What of the SAS paper a suite repeats.
TABLE_OF_SUITE = {"sas_table1": "table1", "sas_table8": "table8"}


class Report:
    """
    What results say together.

    Args:
        results: of one model or several; those after the first are compared with the first.
        paper_sizes: whose printed rows to show, such as "350M"; by default those of about the models' sizes.

    Raises:
        ValueError: for no results, or a size that the papers print no row of.
    """

    def __init__(self, results: Sequence[EvaluationResult], paper_sizes: Sequence[str] = ()):
        if not results:
            raise ValueError("There are no results to report.")
        self.results = list(results)
        check_paper_sizes(paper_sizes, [name for result in results for name in result.suites])
        self.paper_sizes = list(paper_sizes)
        self.labels = _labels(self.results)
        self.comparisons: dict[str, list[PairedDifference]] = {}
        self.not_compared: dict[str, str] = {}
        for label, result in list(zip(self.labels, self.results, strict=True))[1:]:
            try:
                self.comparisons[label] = compare(self.results[0], result)
            except ValueError as error:
                self.not_compared[label] = str(error)

    def grids(self) -> list[Grid]:
        """All tables: suites, other tasks, perplexities, differences, every number with its circumstances, runs."""
        suites = dict.fromkeys(name for result in self.results for name in result.suites)
        found = [self._suite(name) for name in suites]
        labels = dict.fromkeys(
            label for result in self.results for suite in result.suites.values() for label in suite.columns
        )
        asked = [[label, ASKED[label]] for label in labels if label in ASKED]
        found += [Grid("What is asked", ["", ""], asked, text_columns=2)] if asked else []
        found += [self._translations()] if self._translated() else []
        found += [self._perplexities()] if any(perplexities(result) for result in self.results) else []
        found += [self._differences(label) for label, differences in self.comparisons.items() if differences]
        return [*found, self._numbers(), self._runs()]

    def rich(self) -> Group:
        """For `rich.print`."""
        notes = [f"[yellow]not compared:[/yellow] {escape(text)}" for text in self.not_compared.values()]
        return Group(*(grid.rich() for grid in self.grids()), *notes)

    def markdown(self, plots: Sequence[str] = ()) -> str:
        """The report as a Markdown document.

        Args:
            plots: file names of pictures to show.
        """
        parts = [f"# Evaluation of {', '.join(self.labels)}\n"]
        parts += [f"![{Path(name).stem}]({name})\n" for name in plots]
        parts += [grid.markdown() for grid in self.grids()]
        parts += [self._gallery()] if self._translated() else []
        parts += [f"Not compared: {text}\n" for text in self.not_compared.values()]
        return "\n".join(parts)

    def to_dict(self) -> dict:
        """Results, differences, and the papers' rows shown, ready for JSON."""
        papers = {
            name: [asdict(row) for row in self.paper_rows(name)]
            for name in dict.fromkeys(name for result in self.results for name in result.suites)
        }
        return {
            "results": [result.to_dict() for result in self.results],
            "comparisons": {
                "with": self.labels[0],
                "method": METHOD,
                "differences": finite({k: [asdict(d) for d in v] for k, v in self.comparisons.items()}),
                "not_compared": self.not_compared,
            },
            "papers": papers,
        }

    @one_at_a_time("folder", in_place=True)
    def save(self, folder: str | Path) -> list[Path]:
        """
        Write `report.md`, `report.json` and plots, as PNG and SVG, into a folder, and translations, where there are.

        Returns:
            the files written.

        Raises:
            ImportError: without matplotlib, before anything is written.
            BlockingIOError: when another process writes a report there.
        """
        require_matplotlib()
        from .plots import draw

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plots = draw(self, folder)
        document = self.markdown([path.name for path in plots if path.suffix == ".png"])
        write_atomically(folder / "report.md", document.encode())
        save_json(folder / "report.json", self.to_dict())
        return [folder / "report.md", folder / "report.json", *self._save_translations(folder), *plots]

    def _save_translations(self, folder: Path) -> list[Path]:
        """A text file for each model that translated, a translation on each line, as sacrebleu reads them."""
        files = []
        for number, (_, task) in enumerate(self._translated(), 1):
            lines = [" ".join(sample["hypothesis"].split()) for sample in task.samples or ()]
            files.append(folder / f"translations-{number}.txt")
            write_atomically(files[-1], "".join(f"{line}\n" for line in lines).encode())
        return files

    @staticmethod
    def paper_table(suite: str) -> PaperTable | None:
        """The printed table that the suite repeats, `None` where there is none."""
        return printed("sas")[TABLE_OF_SUITE[suite]] if suite in TABLE_OF_SUITE else None

    def paper_rows(self, suite: str) -> list[PaperRow]:
        """The printed rows of the suite's table: of the sizes asked for, else of those of the models that ran it."""
        table = self.paper_table(suite)
        if table is None:
            return []
        if self.paper_sizes:
            return [row for row in table.rows if row.size in self.paper_sizes]
        sizes = [result.num_parameters for result in self.results if suite in result.suites]
        return list({id(row): row for size in sizes for row in rows_of_size(table, size)}.values())

    def chance(self, suite: str) -> dict[str, float | None]:
        """By column of the suite, the accuracy of who guesses, where it is known."""
        found: dict[str, float | None] = {}
        for result in self.results:
            for label, column in result.suites[suite].columns.items() if suite in result.suites else ():
                chance = chance_of(result.tasks[task] for task in column.tasks)
                found[label] = found.get(label) if chance is None else chance
        return found

    def _suite(self, name: str) -> Grid:
        having = [(label, result.suites[name]) for label, result in self._labelled() if name in result.suites]
        columns = list(dict.fromkeys(column for _, suite in having for column in suite.columns))
        rows = []
        for label, suite in having:
            cells = [_percent(suite.columns[c].score) if c in suite.columns else "" for c in columns]
            rows.append([label, *cells, _percent(suite.average)])
        chance = self.chance(name)
        if any(value is not None for value in chance.values()):
            cells = ["" if (value := chance[c]) is None else f"{100 * value:.2f}" for c in columns]
            known = [value for value in chance.values() if value is not None]
            rows.append(
                ["chance", *cells, f"{100 * sum(known) / len(known):.2f}" if len(known) == len(columns) else ""]
            )
        table, paper_rows = self.paper_table(name), self.paper_rows(name)
        for row in paper_rows:
            values = dict(zip(table.columns if table else (), row.values, strict=True))
            average = "" if row.average is None or set(columns) != set(values) else f"{row.average:.2f}"
            rows.append([row.label, *(f"{values[c]:.2f}" for c in columns), average])
        metrics = {column: suite.columns[column].metric for _, suite in having for column in suite.columns}
        notes = ["per cent ± standard error; " + ", ".join(f"{c} {m}" for c, m in metrics.items())]
        if any(not suite.complete for _, suite in having):
            notes.append("not all columns of the suite: the average is not the paper's")
        if table is None:
            notes.append("the paper prints no table of this suite")
        elif not paper_rows:
            sizes = ", ".join(dict.fromkeys(row.size for row in table.rows if row.size is not None))
            notes.append(f"the paper's {table.source.partition(',')[0]} has no model of about this size, but {sizes}")
        else:
            notes.append(f"paper: printed in {table.source.partition(',')[0]} of {table.paper}")
        return Grid(name, ["model", *columns, "average"], rows, "; ".join(notes) + ".")

    def _translated(self) -> list[tuple[str, TaskResult]]:
        """What was translated, by whom."""
        return [
            (label, task)
            for label, result in self._labelled()
            for task in result.tasks.values()
            if is_translation(task)
        ]

    def _translations(self) -> Grid:
        rows: list[list[str]] = []
        notes: dict[str, None] = {}
        for label, task in self._translated():
            cells = [
                f"{score.value:.2f}" + ("" if score.stderr is None else f" ± {score.stderr:.2f}")
                for score in (task.metrics["bleu"], task.metrics["chrf"])
            ]
            cells += [_percent(task.metrics["token_accuracy"]), _number(task.metrics["loss"])]
            rows.append([label, *cells, str(task.details["num_beams"])])
            for metric, signature in task.details["signatures"].items():
                notes.setdefault(f"{metric} {signature}")
        header = ["model", "BLEU", "chrF", "token accuracy, %", "loss", "beams"]
        return Grid("Translations", header, rows, "; ".join(notes) + ".")

    def _gallery(self) -> str:
        """The first pairs of the first model's, and what each model that translated the same made of them."""
        (_, first), *_ = found = self._translated()
        alike = [(label, task) for label, task in found if task.questions == first.questions]
        lines = ["## What was translated\n"]
        for place, pair in enumerate((first.samples or [])[:SHOWN]):
            texts = {"source": pair["source"], "reference": pair["reference"]}
            texts |= {label: task.samples[place]["hypothesis"] for label, task in alike if task.samples}
            said = [f"**{_line(name)}**: {_line(text)}" for name, text in texts.items()]
            lines.append(f"{place + 1}. " + "  \n   ".join(said))
        return "\n".join(lines) + "\n"

    def _perplexities(self) -> Grid:
        lengths = sorted({length for result in self.results for length in perplexities(result)})
        rows, notes = [], []
        for label, result in self._labelled():
            tasks = perplexities(result)
            for metric in ("perplexity", "bits_per_byte"):
                cells = [_number(tasks[length].metrics[metric]) if length in tasks else "" for length in lengths]
                rows.append([label, metric, *cells])
            for task in list(tasks.values())[:1]:
                details = task.details
                windows = "disjoint windows" if details["windows"] == "disjoint" else "sliding windows"
                stride = "" if details["windows"] == "disjoint" else f" of stride {details['stride']}"
                notes.append(f"{label}: {details['tokens']:,} tokens of {task.data}, {windows}{stride}")
        header = ["model", "per token", *(f"{length:,}" for length in lengths)]
        return Grid("Perplexity by context length", header, rows, "; ".join(notes) + ".", text_columns=2)

    def _differences(self, label: str) -> Grid:
        rows = []
        for each in self.comparisons[label]:
            # Points are per cent of one; bits per byte differ in the fourth decimal.
            scale, places, unit = {"share": (100, 2, "points"), "of 100": (1, 2, "points")}.get(
                each.unit, (1, 5, each.unit)
            )
            difference, stderr, low, high = (
                "" if value is None else f"{scale * value:+.{places}f}"
                for value in (each.difference, each.stderr, each.low, each.high)
            )
            rows.append(
                [
                    each.name,
                    difference,
                    stderr.removeprefix("+"),
                    low and f"[{low}, {high}]",
                    unit,
                    f"{each.num_samples:,}",
                    ("yes" if each.significant else "no")
                    + ("" if each.p_value is None else f" (p {each.p_value:.3f})"),
                ]
            )
        header = ["", "difference", "± stderr", "95 % interval", "in", "questions or windows", "significant at 95 %"]
        return Grid(f"{label} minus {self.labels[0]}", header, rows, f"Paired: {METHOD}.")

    def _numbers(self) -> Grid:
        rows: list[list[str]] = []

        def add(label: str, name: str, metrics: dict[str, Metric], *circumstances: str) -> None:
            for metric, score in metrics.items():
                stderr = "" if score.stderr is None else f"{score.stderr:.4f}"
                rows.append([label, name, metric, f"{score.value:.4f}", stderr, *circumstances])

        notes: dict[str, list[str]] = {}  # names of tasks by what is said of them
        for label, result in self._labelled():
            run = (result.dtype, _batches(result))
            for name, task in result.tasks.items():
                shots = "" if task.num_fewshot is None else str(task.num_fewshot)
                shots += f" ({task.fewshot_split})" if task.fewshot_split else ""
                count = f"{task.num_samples:,}"
                count += "" if task.num_samples == task.num_available else f" of {task.num_available:,}"
                add(
                    label,
                    name,
                    task.metrics,
                    task.split,
                    count,
                    shots,
                    *run,
                    "" if task.version is None else str(task.version),
                )
                for note in task.notes:
                    notes.setdefault(note, []).append(name)
            for name, metrics in result.groups.items():
                add(label, name, metrics, "", "", "", *run, "")
        said = [f"{', '.join(dict.fromkeys(names))}: {note}" for note, names in notes.items()]
        if any(result.limit is not None for result in self.results):
            said.append("the first samples of each task only, where `samples` says so")
        header = ["model", "task", "metric", "value", "± stderr"]
        header += ["split", "samples", "shots", "dtype", "batch size", "version"]
        caption = "; ".join(said) + ("." if said else "")
        return Grid("Every number", header, rows, caption, text_columns=2, compact=True)

    def _runs(self) -> Grid:
        rows = []
        for label, result in self._labelled():
            start = result.beginning_of_text
            when = "before every text" if start and start["always"] else "before a text without context"
            facts = {
                "model": result.model,
                "parameters": f"{result.num_parameters:,}",
                "adapter": result.adapter,
                "dtype and device": f"{result.dtype} on {result.device}",
                "batch size": f"{_batches(result)} (asked for: {result.batch_size['requested']})",
                "beginning of text": start and f"{start['token']} {when}",
                "context": result.max_length and f"{result.max_length:,}",
                "requests cut to the context": result.num_truncated or None,
                "weights that the model does not use": ", ".join(result.unused_weights),
                "limit": result.limit and f"{int(result.limit) if result.limit >= 1 else result.limit}",
                "processes": result.num_processes,
                "answers kept by an earlier run": result.num_reused or None,
                "seconds": f"{result.seconds:.0f}",
                "versions": ", ".join(f"{name} {number}" for name, number in result.versions.items()),
            }
            rows += [[label, fact, str(value)] for fact, value in facts.items() if value]
        return Grid("Runs", ["model", "", ""], rows, text_columns=3, compact=True)

    def _labelled(self):
        return zip(self.labels, self.results, strict=True)


def check_paper_sizes(sizes: Sequence[str], suites: Sequence[str]) -> None:
    """Raise a `ValueError` for a size that the papers' tables of these suites have no row of."""
    tables = [printed("sas")[TABLE_OF_SUITE[name]] for name in suites if name in TABLE_OF_SUITE]
    known = dict.fromkeys(row.size for table in tables for row in table.rows if row.size)
    for size in sizes:
        if size not in known:
            rows = (
                f"the papers' tables of these suites have {', '.join(known)}" if known else "no suite has printed rows"
            )
            raise ValueError(f"`paper_sizes` has {size!r}; {rows}.")


def _labels(results: list[EvaluationResult]) -> list[str]:
    """As much of each model's path, from its end, as tells them apart; a number for equal ones."""
    for parts in range(1, 5):
        short = ["/".join(Path(result.model).parts[-parts:]) for result in results]
        if len(set(short)) == len(short):
            return short
    names = [result.model for result in results]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def _line(text: str) -> str:
    """On one line, with what Markdown would take for its own marked as text."""
    return re.sub(r"([\\`*_<>\[\]#|])", r"\\\1", " ".join(text.split()))


def _percent(score: Metric) -> str:
    return f"{100 * score.value:.2f}" + ("" if score.stderr is None else f" ± {100 * score.stderr:.2f}")


def _number(score: Metric) -> str:
    return f"{score.value:#.4g}" + ("" if score.stderr is None else f" ± {score.stderr:#.2g}")


def _batches(result: EvaluationResult) -> str:
    smallest, largest = result.batch_size.get("smallest"), result.batch_size.get("largest")
    return str(largest) if smallest == largest else f"{smallest} to {largest}"
