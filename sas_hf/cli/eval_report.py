"""`sas-hf eval-report`: [`~sas_hf.eval.Report`] of saved results."""

from pathlib import Path
from typing import Annotated

import typer

from ..report.files import one_at_a_time
from .shared import PaperSizes, explain_errors, show_report, split_names


@explain_errors
@one_at_a_time("report", in_place=True)
def eval_report(
    results: Annotated[list[Path], typer.Argument(help="JSON files that `sas-hf eval --output` wrote.")],
    report: Annotated[Path, typer.Option(help="Folder for the report: Markdown, JSON, plots.")],
    paper_sizes: PaperSizes = None,
) -> None:
    """Put saved results into one report, for instance of the checkpoints of a training."""
    from .. import eval as evaluation

    loaded = [evaluation.EvaluationResult.load(path) for path in results]
    show_report(evaluation.Report(loaded, split_names(paper_sizes or "")), report)
