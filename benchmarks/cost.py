r"""What SAS costs beside multi-head attention: time, bytes kept for backward, peak memory, cache, operations.

    python benchmarks/cost.py --output cost.json --plot cost.png
    python benchmarks/cost.py --models mha sas paper --parts layer bytes --lengths 512 1024 2048 4096 --layers 1
    python benchmarks/cost.py --models mha sas-x2 sas sas-x4 sas-x6 --parts train memory-train --layers 2
    python benchmarks/cost.py --models sas sas-plain sas-kept sas-no_blocks sas-no_mean --parts train bytes
    python benchmarks/cost.py --models mha mha-compiled llama llama-compiled sas sas-compiled --parts train \
        --width 256 --layers 4 --vocabulary 4096 --batch 4 --lengths 256
    python benchmarks/cost.py --device cuda --dtype bfloat16 --batch 8

All models of one run take turns in one process on the same tokens; a timed figure is the median over the rounds of the
ratio to the first model *in the same round*, with the smallest and the largest. What is counted has no spread.

The file of `--output` is written after every figure. The same command again keeps what is there, and other parts,
lengths, contexts or models of the same machine and shape are added to it. Names of models: cost_rivals.py.
"""

import argparse
import time
from pathlib import Path

import torch
from cost_measures import PARTS
from cost_report import plot, show
from cost_rivals import backbone, make_config, make_model, parse
from rich.console import Console
from rich.progress import Progress

from sas_hf.configurations import SIZES
from sas_hf.report.files import check_writable
from sas_hf.report.kept import keep_figures, kept_figures
from sas_hf.report.turns import beside_first, take_turns


MODELS = ("mha", "llama", "paper", "sas", "sas-kept", "sas-k5", "sas-base")
PICTURES = (".png", ".svg", ".pdf")
DEFAULT_PARTS = ("bytes", "cache", "memory-train", "train", "prefill", "decode-static", "decode-dynamic")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def device(text: str) -> torch.device:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(text)


def arguments_of(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="the first is the measure of the others")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(DEFAULT_PARTS))
    parser.add_argument("--lengths", type=positive, nargs="+", default=[512], help="tokens of a step or prefill")
    parser.add_argument("--contexts", type=positive, nargs="+", default=[1024], help="tokens before the decoded one")
    parser.add_argument("--rounds", type=positive, default=5, help="after one for warming up")
    parser.add_argument("--tokens", type=positive, default=4, help="decoded in a round")
    parser.add_argument("--size", choices=SIZES, default="125m", help="whose width and heads the backbone has")
    parser.add_argument(
        "--width", type=positive, help="of the backbone instead, a multiple of 64: heads of 64 features"
    )
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--vocabulary", type=positive, default=50304)
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--device", type=device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), default="float32")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="image file")
    arguments = parser.parse_args(command)
    if (arguments.width or 64) % 64:
        parser.error(f"--width is {arguments.width}; it must be a multiple of 64")
    try:
        for name in arguments.models:
            make_config(name, arguments.size, **shared_fields(arguments))
        for name in ("output", "plot"):
            check_file(f"--{name}", getattr(arguments, name))
        arguments.results = results_so_far(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def check_file(option: str, path: Path | None) -> None:
    """Raise a ValueError or an OSError where no such file can be written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file.")
    if option == "--plot" and path.suffix not in PICTURES:
        raise ValueError(f"{option} {path}: a picture's name ends in {', '.join(PICTURES)}.")
    check_writable(path.parent, f"{option} is {str(path)!r}")


def shared_fields(arguments: argparse.Namespace) -> dict:
    positions = max(*arguments.lengths, *arguments.contexts) + arguments.tokens + 1
    return backbone(arguments.layers, arguments.vocabulary, positions, arguments.width)


def results_so_far(arguments: argparse.Namespace) -> dict:
    """What the output file holds, or nothing yet.

    Raises:
        ValueError: if it was measured with other settings, or is no such file.
    """
    names = ("size", "width", "layers", "vocabulary", "batch", "threads", "device", "dtype")
    settings = {name: getattr(arguments, name) for name in names} | {"measure": arguments.models[0]}
    settings |= {"device": str(arguments.device), "torch": torch.__version__}
    return kept_figures(arguments.output, settings, f"--output {arguments.output}")


def figures_of(name: str, place: int | None, models: dict, arguments: argparse.Namespace, progress: Progress) -> dict:
    """One part at one length or context, for every model."""
    part, start = PARTS[name], time.perf_counter()
    able = {model: made for model, made in models.items() if part.paper or parse(model)[0] != "paper"}
    ids = torch.randint(arguments.vocabulary, (arguments.batch, place or 8), device=arguments.device)
    title = f"{part.title}, {place:,}" if place else part.title
    task = progress.add_task(title, total=len(able) * (1 if part.count else arguments.rounds + 1))

    def now(model: str, turn: int | None = None) -> None:
        state = "" if turn is None else f"round {turn} of {arguments.rounds}" if turn else "warming up"
        progress.update(task, description=f"{title}: {model} {state}", advance=1)

    progress.update(task, completed=-1)  # `now` is called before a model runs
    if part.count:
        counts = {}
        for model, made in able.items():
            now(model)
            counts[model] = part.count(made, make_config(model, arguments.size, **shared_fields(arguments)), ids)
        first = next(iter(counts.values()))
        figures = {m: {"value": count, "ratio": count / first if first else None} for m, count in counts.items()}
    else:
        jobs = {model: part.job(made, ids, arguments.tokens) for model, made in able.items()}
        calls = arguments.tokens if part.along == "contexts" else 1
        times = take_turns(jobs, arguments.rounds, now, arguments.device)
        figures = beside_first({m: [1000 * seconds / calls for seconds in rounds] for m, rounds in times.items()})
    progress.remove_task(task)
    progress.console.print(f"{title}: {time.perf_counter() - start:.0f} s", highlight=False)
    return figures


def main() -> None:
    arguments = arguments_of()
    torch.set_num_threads(arguments.threads)
    results, models = arguments.results, {}
    with Progress(console=Console(stderr=True)) as progress:
        for name in arguments.parts:
            for place in getattr(arguments, PARTS[name].along, [None]):
                held = results["figures"].setdefault(name, {})
                wanted = {m for m in arguments.models if PARTS[name].paper or parse(m)[0] != "paper"}
                if wanted <= held.get(str(place or ""), {}).keys():
                    continue
                models = models or {
                    model: make_model(model, arguments.size, **shared_fields(arguments)).to(
                        arguments.device, getattr(torch, arguments.dtype)
                    )
                    for model in arguments.models
                }
                measured = figures_of(name, place, models, arguments, progress)
                held[str(place or "")] = held.get(str(place or ""), {}) | measured  # others' ratios stay true
                keep_figures(arguments.output, results)
    show(results)
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
