"""How far the lossy conversions move a language model, and what a short fine-tune recovers: docs/conversion.md.

python benchmarks/lossy_conversion.py SOURCE --calibration train.txt --text validation.txt --output OUT.json

Every conversion, and the source itself, is fine-tuned by the stock Trainer on the same batches of the calibration
text (behind what the conversion was fitted on) and measured on windows of the other.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from sas_hf.conversion import ConversionOptions, compare_models, convert_model
from sas_hf.conversion.fidelity import text_windows
from sas_hf.data.text_files import read_whole


def methods(config) -> dict[str, ConversionOptions | None]:
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    fewer = next(count for count in range(kv_heads - 1, 0, -1) if kv_heads % count == 0)
    return {
        "source": None,
        "optimised": ConversionOptions(lossy="optimised"),
        "efficient": ConversionOptions(lossy="efficient"),
        f"gqa, {fewer} of {kv_heads}": ConversionOptions(lossy="gqa", num_key_value_heads=fewer),
        "mla": ConversionOptions(lossy="mla"),
    }


class Batches(Dataset):
    """Windows `[1, T]` of token ids, in order."""

    def __init__(self, windows: list[torch.Tensor]):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index][0], "labels": self.windows[index][0]}


def fine_tune(model, windows: list[torch.Tensor], learning_rate: float) -> None:
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=len(windows),
            per_device_train_batch_size=1,
            learning_rate=learning_rate,
            warmup_steps=max(1, len(windows) // 10),
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=Batches(windows)).train()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source")
    parser.add_argument("--calibration", type=Path, required=True, help="text to fit and fine-tune on")
    parser.add_argument("--text", type=Path, required=True, help="held-out text to measure on")
    parser.add_argument("--methods", nargs="+", help="first words of rows; all by default")
    parser.add_argument("--windows", type=int, default=64, help="of the calibration")
    parser.add_argument("--measured-windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=30, help="of fine-tuning, one window each")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    source = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32).eval()
    text = read_whole(arguments.calibration)[: 16 * arguments.length * (arguments.windows + arguments.steps)]
    share = len(text) * arguments.windows // (arguments.windows + arguments.steps)
    calibration = text_windows(text[:share], tokenizer, arguments.length, arguments.windows)
    training = text_windows(text[share:], tokenizer, arguments.length, arguments.steps)
    held_out = text_windows(read_whole(arguments.text), tokenizer, arguments.length, arguments.measured_windows)

    results = []
    for name, options in methods(source.config).items():
        if arguments.methods and name.split(",")[0] not in arguments.methods:
            continue
        started = time.monotonic()
        if options is None:
            model = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32).eval()
        else:
            model = convert_model(source, options, calibration)
        row = {"method": name, "parameters": model.num_parameters(), "seconds": time.monotonic() - started}
        for when in ("at once", "fine-tuned"):
            if when == "fine-tuned":
                fine_tune(model, training, arguments.learning_rate)
            found = compare_models(source, model, held_out).to_dict()
            row[when] = {key: found[key] for key in ("mean_kl", "argmax_agreement", "perplexity", "perplexity_source")}
            assert all(math.isfinite(value) for value in row[when].values())
        results.append(row)
        print(json.dumps(row), flush=True)
        if arguments.output is not None:
            settings = {key: str(value) for key, value in vars(arguments).items()}
            arguments.output.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")
        del model

    table = Table(title=f"Lossy conversions of {arguments.source}, then {len(training)} steps")
    columns = (
        "method",
        "parameters",
        "KL",
        "agreement",
        "perplexity",
        "KL tuned",
        "agreement tuned",
        "ppl tuned",
        "s",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in results:
        measures = []
        for when in ("at once", "fine-tuned"):
            found = row[when]
            measures += [
                f"{found['mean_kl']:.3f}",
                f"{found['argmax_agreement']:.1%}",
                f"{found['perplexity']:,.1f}",
            ]
        table.add_row(row["method"], f"{row['parameters']:,}", *measures, f"{row['seconds']:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
