"""`sas-hf eval-report`: [`~sas_hf.eval.Report`] of saved results."""

from pathlib import Path
from typing import Annotated

import typer

from ..report.files import one_at_a_time
from .shared import explain_errors, show_report


@explain_errors
@one_at_a_time("report", in_place=True)
def eval_report(
    results: Annotated[list[Path], typer.Argument(help="JSON files that `sas-hf eval --output` wrote.")],
    report: Annotated[Path, typer.Option(help="Folder for the report: Markdown, JSON, plots.")],
) -> None:
    """Put saved results into one report, for instance of the checkpoints of a training."""
    from .. import eval as evaluation

    show_report(evaluation.Report([evaluation.EvaluationResult.load(path) for path in results]), report)
