r"""Whether sentence-transformers gives a converted encoder's sentences the source's embeddings, and can train it: the
figures of docs/conversion.md. Needs sentence-transformers 6, which sas_hf does not ask for.

sas-hf convert SOURCE CONVERTED
python benchmarks/sentence_embeddings.py SOURCE CONVERTED --sentences FILE
python benchmarks/sentence_embeddings.py SOURCE CONVERTED --sentences PAIRS.parquet --columns en es --fine-tune 200 \
    --batch-size 8 --max-length 24
"""

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import sas_hf  # noqa: F401  registers the architecture
from sas_hf.data.text_files import documents_in


HELD_OUT = 500  # pairs, on which fine-tuning is measured


def read_columns(file: Path, columns: list[str], count: int | None = None) -> list[list[str]]:
    """The texts of each column, the first `count` of them; a text file's lines are its one column."""
    if file.suffix in (".txt", ".md"):
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [lines[:count]]
    return [list(islice(documents_in(file, column), count)) for column in columns]


def embedding_figures(source, converted, sentences: list[str]) -> dict[str, float]:
    expected, found = (model.encode(sentences, batch_size=32).astype(np.float64) for model in (source, converted))
    cosines = (expected * found).sum(-1) / np.linalg.norm(expected, axis=-1) / np.linalg.norm(found, axis=-1)
    return {
        "sentences": len(sentences),
        "max |difference| of an embedding's number": np.abs(expected - found).max().item(),
        "max |number|": np.abs(expected).max().item(),
        "1 - smallest cosine of source and conversion": 1 - cosines.min().item(),
    }


def found_pairs(model: SentenceTransformer, pairs: list[list[str]]) -> float:
    """Share of the first column's texts whose nearest of the second column is their own."""
    first, second = (model.encode(texts, batch_size=32, normalize_embeddings=True) for texts in pairs)
    return ((first @ second.T).argmax(-1) == np.arange(len(first))).mean().item()


def fine_tune(name: str, pairs: list[list[str]], options: argparse.Namespace) -> dict[str, float]:
    """Train on pairs by sentence-transformers' own trainer, save, load again."""
    held_out, training = [texts[:HELD_OUT] for texts in pairs], [texts[HELD_OUT:] for texts in pairs]
    steps, model = options.fine_tune, SentenceTransformer(name)
    model.max_seq_length = options.max_length or model.max_seq_length
    before, started = found_pairs(model, held_out), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=steps // 10,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        dataset = Dataset.from_dict(dict(zip(("anchor", "positive"), training, strict=True)))
        loss = MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=dataset, loss=loss)
        trainer.train()
        seconds = time.monotonic() - started
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        model.save_pretrained(f"{folder}/saved")
        again = SentenceTransformer(f"{folder}/saved")
        difference = np.abs(model.encode(held_out[0]) - again.encode(held_out[0])).max().item()
    tenth = max(1, steps // 10)
    return {
        "loss, first tenth of the steps": float(np.mean(history[:tenth])),
        "loss, last tenth": float(np.mean(history[-tenth:])),
        f"pairs found before, of {len(held_out[0])}": before,
        "pairs found after": found_pairs(model, held_out),
        "max |difference| after saving and loading": difference,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("converted")
    parser.add_argument("--sentences", type=Path, required=True, help="text (a sentence on each line) or table")
    parser.add_argument("--columns", nargs="+", default=["text"], help="of a table; two hold pairs")
    parser.add_argument("--count", type=int, default=1000, help="of sentences that are compared")
    parser.add_argument("--fine-tune", type=int, default=0, metavar="STEPS", help="on pairs; a lone text is its own")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, help="of training texts, in tokens; by default the model's own")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()

    console = Console()
    columns = read_columns(arguments.sentences, arguments.columns)
    models = [SentenceTransformer(name) for name in (arguments.source, arguments.converted)]
    figures = embedding_figures(*models, columns[0][: arguments.count])
    table = Table(title=f"{arguments.converted} against {arguments.source}: {arguments.sentences}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.8g}")
    console.print(table)
    if arguments.fine_tune:
        pairs = [columns[0], columns[-1]]
        names = (arguments.source, arguments.converted)
        tuned = {name: fine_tune(name, pairs, arguments) for name in names}
        figures["fine-tuned"] = tuned
        table = Table(title=f"{arguments.fine_tune} steps of {arguments.batch_size} pairs")
        table.add_column("figure")
        for name in tuned:
            table.add_column(name, justify="right")
        for name in tuned[arguments.converted]:
            table.add_row(name, *(f"{values[name]:.4g}" for values in tuned.values()))
        console.print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
