"""Does a converted model learn more than its source? Both, fine-tuned on the same batches.

    python benchmarks/fine_tuning.py SOURCE TEXT_DIR OUTPUT --steps 40

SOURCE is a checkpoint that can be converted, TEXT_DIR holds train.txt and validation.txt. Every variant is trained in
a process of its own below OUTPUT; one that is finished is kept, one that was killed goes on, so the command may be
stopped and started again. At the end: a table, `results.json` and the validation curves over tokens and over seconds.
Seconds are processor seconds of the training steps, so that other work on the machine does not count.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments, set_seed

from sas_hf.conversion import ConversionOptions, convert_model
from sas_hf.files import write_atomically
from sas_hf.training import pack_documents
from sas_hf.training.optimizer import RecipeTrainer


# What each differs in: the conversion (none: the source itself), how many times the learning rate the simulation gets,
# and which parameters train at all.
VARIANTS = {
    "source": {"convert": None},
    "sas": {},
    "sas, simulation x10": {"simulation_rate": 10.0},
    "sas, perturbation 0.3": {"convert": {"perturbation": 0.3}},
    "sas, kernel 5": {"convert": {"simulation_kernel_size": 5}},
    "sas, simulation alone": {"trained": ["_simulation."]},
    "sas, simulation alone x10": {"trained": ["_simulation."], "simulation_rate": 10.0},
    "source, attention alone": {"convert": None, "trained": [".self_attn."]},
    "sas, attention alone": {"trained": [".self_attn."]},
}


class ProcessorSeconds(TrainerCallback):
    """Adds up the processor seconds of the training steps, evaluation and saving left out; kept in checkpoints."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        history = [entry["processor_seconds"] for entry in state.log_history if "processor_seconds" in entry]
        total = (history[-1] if history else 0.0) + time.process_time() - self.start
        state.log_history.append({"step": state.global_step, "processor_seconds": total})


def documents(folder: Path, name: str) -> list[str]:
    """The documents of a text: pieces of about 4,000 characters of whole paragraphs."""
    pieces, piece = [], ""
    for paragraph in (folder / f"{name}.txt").read_text(encoding="utf-8").split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) > 4000:
            pieces.append(piece)
            piece = ""
    return pieces


def train(source: str, text: Path, folder: Path, variant: dict, options: argparse.Namespace) -> dict:
    """Fine-tune one variant and return its curve."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if (conversion := variant.get("convert", {})) is not None:
        model = convert_model(model, ConversionOptions(**conversion))
    patterns = variant.get("trained")
    for name, weight in model.named_parameters():
        weight.requires_grad = patterns is None or any(pattern in name for pattern in patterns)
    needed = options.steps * options.sequences * options.length * 8  # characters, with room to spare
    training = documents(text, "train")[:: max(1, 44_000_000 // (4000 * max(1, needed // 4000)))]
    held_out = documents(text, "validation")
    held_out = held_out[:: max(1, len(held_out) // 24)]
    set_seed(options.seed)
    trainer = RecipeTrainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=options.steps,
            per_device_train_batch_size=options.sequences,
            per_device_eval_batch_size=1,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=options.steps // 10,
            eval_strategy="steps",
            eval_steps=options.evaluate_every,
            eval_on_start=True,
            save_steps=options.evaluate_every,
            save_total_limit=1,
            logging_steps=1,
            use_cpu=not torch.cuda.is_available(),
            seed=options.seed,
            report_to="none",
        ),
        train_dataset=pack_documents(training, tokenizer, options.length, seed=options.seed),
        eval_dataset=pack_documents(held_out, tokenizer, options.length).select(range(options.held_out)),
        callbacks=[ProcessorSeconds()],
    )
    if "simulation_rate" in variant:
        trainer.simulation_learning_rate = options.learning_rate * variant["simulation_rate"]
    trainer.train(resume_from_checkpoint=True)
    history = trainer.state.log_history
    seconds = {entry["step"]: entry["processor_seconds"] for entry in history if "processor_seconds" in entry}
    per_step = options.sequences * options.length
    return {
        "parameters": model.num_parameters(),
        "trained": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "curve": [
            {"tokens": step * per_step, "seconds": seconds.get(step, 0.0), "loss": loss}
            for step, loss in {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}.items()
        ],
    }


def show(results: dict[str, dict], folder: Path) -> None:
    """The table, and the curves as a PNG."""
    from matplotlib.figure import Figure

    table = Table(title="Validation loss")
    for column in ("variant", "trained", *(f"{point['tokens']:,}" for point in next(iter(results.values()))["curve"])):
        table.add_column(column, justify="left" if column == "variant" else "right")
    table.add_column("processor seconds per 1,000 tokens", justify="right")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, result in results.items():
        curve = result["curve"]
        losses = [point["loss"] for point in curve]
        cost = 1000 * curve[-1]["seconds"] / curve[-1]["tokens"]
        table.add_row(name, f"{result['trained']:,}", *(f"{loss:.4f}" for loss in losses), f"{cost:.1f}")
        for place, horizontal in zip(axes, ("tokens", "seconds"), strict=True):
            place.plot([point[horizontal] for point in curve], losses, marker=".", label=name)
    for place, label in zip(axes, ("tokens", "processor seconds of training"), strict=True):
        place.set_xlabel(label)
        place.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats per token")
    axes[0].legend(fontsize="small")
    Console().print(table)
    figure.savefig(folder / "curves.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--evaluate_every", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=2, help="per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--held_out", type=int, default=16, help="validation sequences")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one variant, in this process
    options = parser.parse_args()
    if options.only:
        folder = options.output / options.only
        result = train(options.source, options.text, folder, VARIANTS[options.only], options)
        write_atomically(folder / "result.json", json.dumps(result, indent=2).encode())
        return
    results = {}
    for name in options.variants:
        path = options.output / name / "result.json"
        if not path.is_file():
            subprocess.run([sys.executable, *sys.argv, "--only", name], check=True)
        results[name] = json.loads(path.read_text(encoding="utf-8"))
        write_atomically(options.output / "results.json", json.dumps(results, indent=2).encode())
        show(results, options.output)


if __name__ == "__main__":
    main()
