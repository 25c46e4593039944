r"""What quantisers cost a converted model, beside its source: the table of docs/serving.md.

sas-hf convert SOURCE CONVERTED
python benchmarks/quantisation.py SOURCE CONVERTED --text FILE --output JSON

Perplexity of the text in disjoint windows, of each model quantised by each library on a CPU, from float32. A third
column has the simulation quantised, too, where the library would do that if it were let. What can be saved is saved,
loaded again, and compared. A JSON file that is there already is added to. Needs `sas_hf[quantisation]`; GPTQ needs
gptqmodel and optimum.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sas_hf  # noqa: F401  registers the architecture
from sas_hf.modeling.quantisation import QuantisableMixin


def torchao(bits: int) -> Callable:
    def config():
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        if bits == 8:
            return TorchAoConfig(Int8WeightOnlyConfig())
        # torchao's `Int4WeightOnlyConfig` packs for GPUs; these are the same numbers, a byte each.
        return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))

    return config


def bitsandbytes(**fields) -> Callable:
    def config():
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**fields)

    return config


def quanto(weights: str) -> Callable:
    def config():
        from transformers import QuantoConfig

        return QuantoConfig(weights=weights)

    return config


BY_CONFIGURATION = {
    "torchao int8": torchao(8),
    "torchao int4, groups of 32": torchao(4),
    "bitsandbytes int8": bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "quanto int8": quanto("int8"),
    "quanto int4": quanto("int4"),
}
DYNAMIC, GPTQ = "PyTorch quantize_dynamic int8", "gptqmodel int4, groups of 32"
QUANTISERS = ["float32", *BY_CONFIGURATION, DYNAMIC, GPTQ]
SIMULATION_TOO = ("torchao int8", "torchao int4, groups of 32", "quanto int8", "quanto int4")  # these would


def quantised(folder: str, name: str, calibration: list[str], work: Path) -> PreTrainedModel:
    keywords = {"dtype": torch.float32, "device_map": "cpu"}
    if name == GPTQ:
        from gptqmodel import GPTQModel, QuantizeConfig

        model = GPTQModel.load(folder, QuantizeConfig(bits=4, group_size=32, offload_to_disk=False), dtype="float32")
        model.quantize(calibration, batch_size=1)
        model.save(str(work))
        return AutoModelForCausalLM.from_pretrained(work, **keywords).eval()
    config = BY_CONFIGURATION[name]() if name in BY_CONFIGURATION else None
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **keywords).eval()
    if name == DYNAMIC:
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    return model


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    losses = [model(window[None], labels=window[None], use_cache=False).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


def measure(folder: str, name: str, windows: torch.Tensor, calibration: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        model = quantised(folder, name, calibration, work / "gptq")
        figures = {"perplexity": perplexity(model, windows)}
        if name in BY_CONFIGURATION:
            with torch.no_grad():
                logits = model(windows[:1]).logits
            try:
                model.save_pretrained(work / "saved")
            except ValueError as error:
                return figures | {"saved": f"refused: {error}"}
            again = AutoModelForCausalLM.from_pretrained(work / "saved", dtype=torch.float32, device_map="cpu").eval()
            with torch.no_grad():
                same = torch.equal(again(windows[:1]).logits, logits)
            figures |= {"saved": "loads, equal" if same else "loads, other numbers"}
        saved = work / ("gptq" if name == GPTQ else "saved")
        if saved.is_dir():
            figures["megabytes"] = sum(file.stat().st_size for file in saved.glob("*.safetensors")) / 1e6
    return figures


@contextmanager
def simulation_too():
    """Lets quantisers take the simulation as they take other linear maps."""
    kept = QuantisableMixin._keep_in_fp32_modules
    QuantisableMixin._keep_in_fp32_modules = []
    try:
        yield
    finally:
        QuantisableMixin._keep_in_fp32_modules = kept


def print_table(figures: dict) -> None:
    table = Table(title="Perplexity; MB saved")
    for column in ("quantiser", "source", "converted", "simulation quantised, too", "saved and loaded"):
        table.add_column(column, justify="left" if column == "quantiser" else "right")

    def cell(found: dict | None) -> str:
        if found is None:
            return "–"
        size = f"; {found['megabytes']:.0f}" if "megabytes" in found else ""
        return f"{found['perplexity']:.4f}{size}" if "perplexity" in found else found["error"][:60]

    for name in QUANTISERS:
        if name in figures:
            of = figures[name]
            columns = (cell(of.get(column)) for column in ("source", "converted", "simulation too"))
            table.add_row(name, *columns, of.get("converted", {}).get("saved", "–")[:30])
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("converted")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="of a window, in tokens")
    parser.add_argument("--quantisers", nargs="+", choices=QUANTISERS, default=QUANTISERS)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    text = arguments.text.read_text(encoding="utf-8")
    count = arguments.windows * arguments.length
    tokens = tokenizer(text[: 20 * count], return_tensors="pt").input_ids[0]
    windows = tokens[:count].view(arguments.windows, arguments.length)
    behind = tokens[count : 2 * count].view(-1, arguments.length)  # GPTQ is calibrated on what comes after
    calibration = [tokenizer.decode(window) for window in behind]

    figures = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.quantisers:
        of = figures.setdefault(name, {})
        for column, folder in (
            ("source", arguments.source),
            ("converted", arguments.converted),
            ("simulation too", arguments.converted),
        ):
            if column in of or (column == "simulation too" and name not in SIMULATION_TOO):
                continue
            try:
                if column == "simulation too":
                    with simulation_too():
                        of[column] = measure(folder, name, windows, calibration)
                else:
                    of[column] = measure(folder, name, windows, calibration)
            except ImportError as error:
                of[column] = {"error": str(error)}
            arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
            print(name, column, of[column], flush=True)
    print_table(figures)


if __name__ == "__main__":
    main()
