"""The whole path in a few minutes: convert a checkpoint, verify it, fine-tune source and SAS model on the same
batches, evaluate both, and show a table and the loss curves. `make demo` runs it.
"""

import argparse
import json
import os
import shutil
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sas_hf.cli import conversion_table, explain_errors
from sas_hf.conversion import convert_checkpoint, find_source
from sas_hf.data import python_reference, read_whole, split_text, train_tokenizer
from sas_hf.eval import PerplexityText, evaluate


console = Console()
STAGES = ("before", "after")
CONTEXT, MEASURED = 128, 20_000  # tokens: of a window, and of the held-out text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint folder or Hub id [default: a small one is trained first]")
    parser.add_argument("--text", type=Path, help="text to train and evaluate on [default: the Python reference]")
    parser.add_argument("--steps", type=int, help="fine-tuning steps [default: 80, or 20 for your own checkpoint]")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    arguments = parser.parse_args()
    out = arguments.output
    unfinished = out / "unfinished"  # marks a run of ours that was interrupted and may be thrown away
    if out.exists() and any(out.iterdir()) and not unfinished.exists():
        parser.error(f"{out} is not empty, perhaps an earlier run; choose another folder (make: OUT=...) or remove it")
    if arguments.text is not None and not arguments.text.is_file():
        parser.error(f"--text {arguments.text} is not a file")
    if arguments.model is not None:
        find_source(arguments.model)
    if unfinished.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    unfinished.touch()

    text = python_reference() if arguments.text is None else read_whole(arguments.text)
    training_text, held_out = split_text(text)
    held_out_file = out / "held-out.txt"
    held_out_file.write_text(held_out, encoding="utf-8")

    source = arguments.model
    if source is None:
        console.print("This takes about three minutes on two CPU cores.")
        torch.set_num_threads(1)  # a second thread gains little on so small a model, and waits long on a busy machine
        console.rule("A small Llama, trained on the text")
        source = str(out / "source")
        make_source(training_text, held_out, Path(source))

    console.rule("Source to SAS")
    converted = out / "sas"
    console.print(conversion_table(convert_checkpoint(source, converted, text=held_out)))

    steps = arguments.steps or (20 if arguments.model else 80)
    rate = 1e-4 if arguments.model else 1e-3
    curves, scores = {}, {}
    for name, checkpoint in (("source", source), ("SAS", str(converted))):
        console.rule(f"Fine-tuning the {name} model")
        tuned = out / f"{name.lower()}-tuned"
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        curves[name] = train(model, AutoTokenizer.from_pretrained(checkpoint), training_text, held_out, steps, rate)
        model.save_pretrained(tuned)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tuned)
        for stage, folder in zip(STAGES, (checkpoint, str(tuned)), strict=True):
            measured = PerplexityText(held_out_file, context_lengths=(CONTEXT,), max_tokens=MEASURED)
            scores[name, stage] = evaluate(folder, perplexity=measured).tasks[f"perplexity@{CONTEXT}"]

    show(curves, scores, out)
    unfinished.unlink()


class Blocks(Dataset):
    """A text as consecutive blocks of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, length: int = 128):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
        self.blocks = ids[: len(ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def make_source(training_text: str, held_out: str, folder: Path) -> None:
    """Train a byte-level tokenizer and a Llama of 1.2 million parameters and save them as a checkpoint."""
    tokenizer = train_tokenizer(training_text)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=144,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    train(model, tokenizer, training_text, held_out, steps=400, learning_rate=3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(model, tokenizer, training_text: str, held_out: str, steps: int, learning_rate: float) -> dict[int, float]:
    """Train in place with the stock Trainer; returns the held-out loss by step. The same batches for every model."""
    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.1,
        eval_strategy="steps",
        eval_steps=max(1, steps // 6),
        eval_on_start=True,
        logging_steps=max(1, steps // 6),
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    held_out_set = torch.utils.data.Subset(held_out := Blocks(tokenizer, held_out), range(min(48, len(held_out))))
    trainer = Trainer(model, arguments, train_dataset=Blocks(tokenizer, training_text), eval_dataset=held_out_set)
    trainer.train()
    return {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}


def show(curves: dict, scores: dict, out: Path) -> None:
    """The table on the terminal, the same figures as JSON, and the loss curves as a picture."""
    table = Table(title=f"On held-out text, {CONTEXT} tokens at once")
    columns = ("bits per byte before", "after", "perplexity before", "after")
    table.add_column("model")
    for column in columns:
        table.add_column(column, justify="right")
    figures = {}
    for name, curve in curves.items():
        measured = {stage: scores[name, stage].metrics for stage in STAGES}
        figures[name] = {
            "loss": curve,
            **{stage: {k: m.value for k, m in measured[stage].items()} for stage in STAGES},
        }
        bits = [measured[stage]["bits_per_byte"] for stage in STAGES]
        table.add_row(
            name,
            *(f"{score.value:.4f} ± {score.stderr:.4f}" for score in bits),
            *(f"{measured[stage]['perplexity'].value:.2f}" for stage in STAGES),
        )
    console.print(table)
    console.print(
        "[dim]Before fine-tuning both compute the same; after it they differ a little, by which is no comparison of "
        "the two: that takes seeds and tokens (docs/when.md).[/dim]"
    )
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n")

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(6, 4))
    for (name, curve), style in zip(curves.items(), ("o-", "s--"), strict=True):
        axes.plot(list(curve), list(curve.values()), style, label=name)
    axes.set(xlabel="fine-tuning step", ylabel="held-out loss", title="The same batches, source and SAS")
    low, high = axes.get_ylim()
    if high - low < 0.1:  # a difference that small should look small
        axes.set_ylim((low + high) / 2 - 0.05, (low + high) / 2 + 0.05)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=150)
    shutil.rmtree(out / "unused", ignore_errors=True)
    console.print(f"Loss curves: {out / 'loss.png'}, figures: {out / 'results.json'}")


if __name__ == "__main__":
    explain_errors(main)()
