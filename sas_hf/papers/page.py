"""The page of all items (docs/papers.md), made of the declarations and of the results that the package keeps."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from ..report.files import write_atomically
from ..report.printed import printed
from ..report.tables import Grid
from .comparison import AGREEMENTS, RESULT_NAME, Comparison, ItemResult, read_result
from .items import PAPERS, find_place, item_names, load_item
from .run import has_run
from .training import drawn_again


RESULTS = files(__package__) / "results"
PICTURES = ("figure", "beside")  # that an item may have
INTRODUCTION = """# The papers, item by item

<!-- Written by `python -m sas_hf.papers.page`: change the declarations in sas_hf/papers, not this page. -->

Every table and figure of *Simulated Attention Score* (`sas`) and *You Need to Pay Better Attention* (`better`) is one
command:

    sas-hf paper                               # what there is, what it needs, what has been run
    sas-hf paper sas table7 --data FOLDER      # our rows beside the paper's; the same again goes on where it stopped
    sas-hf paper sas table7 --size paper --data FOLDER --dry-run

At `--size cpu` models are small and other data stand in for the paper's; every heading names them, and our numbers are
never printed under the name of data that they were not made on. `--size paper` is declared completely, with the
paper's models; data come from the Hub or from a folder of yours, and training is [distributed](distributed.md) as any
recipe's. Trainings are shared: Table 3 and Table 7 train MHA once. Differences are paired by
seed, with 95 % intervals by Student's t and no correction for several comparisons.
"""

NEXT = """## What to do next

- [Declare a comparison](studies.md) of your own.
- [Add a table or figure](../CONTRIBUTING.md#a-table-or-figure-of-a-paper) that is missing.
"""


def kept_result(paper: str, name: str) -> ItemResult | None:
    """An item's result that comes with the package."""
    path = Path(str(RESULTS)) / f"{paper}-{name}.json"
    return read_result(path) if path.is_file() else None


def kept_results() -> dict[tuple[str, str], ItemResult]:
    """All of them, by paper and item."""
    found = {(paper, name): kept_result(paper, name) for paper in PAPERS for name in item_names(paper)}
    return {key: result for key, result in found.items() if result is not None}


def needs(paper: str, name: str, size: str) -> str:
    """The folders in the user's that an item needs; with a star, where it can do without."""
    if size not in load_item(paper, name).sizes:
        return "no"
    parts = [part for part in find_place(paper, name, size).parts if part.at.grid is not None]
    found = [f"{file.partition('/')[0]}/{'*' if part.grid.instead else ''}" for part in parts for file in part.files]
    return " ".join(dict.fromkeys(found)) or "-"


def state(paper: str, name: str, runs: Path) -> str:
    """Where an item has been run: here, or by us."""
    sizes = load_item(paper, name).sizes
    told = [f"here, {size}" for size in sizes if has_run(find_place(paper, name, size), runs)]
    if (result := kept_result(paper, name)) is not None:
        told.append(f"by us, {result.size}")
    return "; ".join(told) or "-"


def write_page(path: Path, figures: str = "figures/papers") -> None:
    """
    Args:
        path: of the page.
        figures: where its pictures are, from there.
    """
    write_atomically(path, page(figures).encode())


def page(figures: str = "figures/papers") -> str:
    """The page as Markdown."""
    results = kept_results()
    parts = [INTRODUCTION, _meanings()]
    for paper in PAPERS:
        parts.append(_overview(paper, results).markdown())
    parts.append(_unseen(results))
    for paper in PAPERS:
        parts += [_section(results[paper, name], figures) for name in item_names(paper) if (paper, name) in results]
    return "\n".join([*parts, NEXT])


def _meanings() -> str:
    told = [f"- **{name}**: {meaning}" for name, meaning in AGREEMENTS.items()]
    return "\n".join(["Agreement with what is printed:", "", *told, ""])


def name_of(paper: str, item: str) -> str:
    """Such as "Table 7, Appendix J"."""
    return printed(paper)[load_item(paper, item).printed].source


def anchor(paper: str, item: str) -> str:
    """Of an item's section on the page."""
    return f"{paper}-{item.replace('.', '')}"


def _overview(paper: str, results: dict[tuple[str, str], ItemResult]) -> Grid:
    rows = []
    for name in item_names(paper):
        item, result = load_item(paper, name), results.get((paper, name))
        link = f"[{name_of(paper, name)}](#{anchor(paper, name)})" if result else name_of(paper, name)
        row = [link, item.title, f"`sas-hf paper {paper} {name}`", ", ".join(item.sizes)]
        if result is None:
            rows.append([*row, "no", "-", "-", "-"])
            continue
        main = _main(result)
        ours = "-" if main is None else f"{main.what}: {main.row()[1]} {main.unit}".rstrip()
        theirs = "-" if main is None else f"{main.row()[2]} {main.unit}".rstrip()
        rows.append(
            [*row, f"{result.size}: {result.stand_in or 'as printed'}", ours, theirs, _counted(result.comparisons)]
        )
    header = ["item", "compares", "command", "sizes", "run", "ours", "the paper's", "agreement of all comparisons"]
    return Grid(f"{PAPERS[paper]} (`{paper}`)", header, rows, text_columns=8)


def _main(result: ItemResult) -> Comparison | None:
    """The comparison that an item is about: that of SAS, or the last."""
    ours = [comparison for comparison in result.comparisons if comparison.what.startswith("sas ")]
    if ours:
        return ours[0]
    return result.comparisons[-1] if result.comparisons else None


def _counted(comparisons: Iterable[Comparison]) -> str:
    counts = Counter(comparison.agreement for comparison in comparisons)
    return ", ".join(f"{name} {counts[name]}" for name in AGREEMENTS if counts[name]) or "-"


def _unseen(results: dict[tuple[str, str], ItemResult]) -> str:
    """What the papers claim and our runs do not show."""
    lines = ["## What the papers claim and these runs do not show", ""]
    for paper in PAPERS:
        for name in item_names(paper):
            if (result := results.get((paper, name))) is None:
                continue
            unseen = [c for c in result.comparisons if c.agreement in ("contradicts", "smaller")]
            other = sum(comparison.agreement == "differs" for comparison in result.comparisons)
            told = [f"{c.what}: {c.row()[1]}, printed {c.row()[2]} {c.unit} ({c.agreement})" for c in unseen]
            told += [f"{other} printed numbers come out otherwise"] if other else []
            if told:
                where = (
                    f"[{name_of(paper, name)}](#{anchor(paper, name)}) ({paper}), {result.stand_in or 'as printed'}"
                )
                lines.append(f"- {where}: {'; '.join(told)}.")
    return "\n".join([*lines, ""])


def _section(result: ItemResult, figures: str) -> str:
    paper, name = result.paper, result.item
    item = load_item(paper, name)
    lines = [
        f'<a id="{anchor(paper, name)}"></a>',
        "",
        f"## {name_of(paper, name)} ({paper}): {result.heading}",
        "",
    ]
    lines += [f"The paper: {item.claim}", "", f"    {result.command}", "", result.told(), ""]
    lines += [grid.markdown().replace("## ", "### ", 1) for grid in result.grids]
    lines += [f"- {note}" for note in result.notes]
    lines += ["", *(f"![{result.title}]({figures}/{paper}-{name}-{picture}.png)" for picture in result.pictures), ""]
    return "\n".join(lines)


def keep(folder: Path, figures: Path) -> list[str]:
    """
    Take the results of a folder of items (`runs/papers/cpu`) into the package, their pictures into the documentation.

    Returns:
        what was taken.
    """
    taken = []
    for path in sorted(folder.glob(f"*/{RESULT_NAME}")):
        result = read_result(path)
        name = f"{result.paper}-{result.item}"
        shutil.copyfile(path, Path(str(RESULTS)) / f"{name}.json")
        _take_pictures(path.parent, figures, name)
        taken.append(name)
    return taken


def draw(figures: Path) -> list[str]:
    """
    Draw the pictures of trained items again, from the results that the package keeps.

    Returns:
        what was drawn.
    """
    drawn = []
    for (paper, name), result in kept_results().items():
        if load_item(paper, name).kind == "training":
            with tempfile.TemporaryDirectory() as folder:
                replace(result, figure=drawn_again(result), drawn=[]).save(Path(folder))
                _take_pictures(Path(folder), figures, f"{paper}-{name}")
            drawn.append(f"{paper}-{name}")
    return drawn


def _take_pictures(folder: Path, figures: Path, name: str) -> None:
    figures.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        if (drawn := folder / f"{picture}.png").is_file():
            shutil.copyfile(drawn, figures / f"{name}-{picture}.png")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Write docs/papers.md.")
    parser.add_argument("--keep", type=Path, help="folder of items whose results and pictures are taken first")
    parser.add_argument("--draw", action="store_true", help="draw the pictures of what was trained again")
    arguments = parser.parse_args()
    docs = Path("docs")
    if arguments.keep is not None:
        print("taken:", ", ".join(keep(arguments.keep, docs / "figures" / "papers")))
    if arguments.draw:
        print("drawn:", ", ".join(draw(docs / "figures" / "papers")))
    write_page(docs / "papers.md")
