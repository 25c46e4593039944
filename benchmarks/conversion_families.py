"""The tables of docs/conversion.md: every family of text models, converted from a small random source.

python benchmarks/conversion_families.py
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
from pathlib import Path

import torch
import transformers
from conversion_memory import resident
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig

from sas_hf.conversion import ConversionOptions, compare_models, convert_checkpoint, convert_model
from sas_hf.conversion.convert import FAMILIES
from sas_hf.conversion.samples import verification_samples
from sas_hf.modeling import SASEncoderForMaskedLM, SASGPTForCausalLM, SASSeq2SeqForConditionalGeneration


SIZE = {
    "vocab_size": 16384,
    "hidden_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,  # attention far from uniform
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GQA = {"num_key_value_heads": 2, "intermediate_size": 1024}
SEQ2SEQ = {
    "d_model": 384,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "init_std": 0.06,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 2,
}
LAYERED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
OWN_NAMES = {"distilbert", "bart", "mbart", "marian"}  # whose sizes have other names than SIZE's
SOURCES = {  # fields beside SIZE
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 1536},
    "helium": GQA | {"head_dim": 64},
    "llama": GQA,
    "mistral": GQA | {"head_dim": 48, "sliding_window": None},
    "qwen2": GQA,
    "qwen3": GQA | {"head_dim": 96},
    "smollm3": GQA,
    "olmo2": GQA,
    "phi": {"intermediate_size": 1536},
    "bert": {"intermediate_size": 1536, "pad_token_id": 0},
    "roberta": {"intermediate_size": 1536, "pad_token_id": 1, "max_position_embeddings": 514},
    "distilbert": {"dim": 384, "n_layers": 5, "n_heads": 6, "hidden_dim": 1536, "pad_token_id": 0},
    "bart": SEQ2SEQ,
    "mbart": SEQ2SEQ | {"scale_embedding": True},
    "marian": SEQ2SEQ | {"scale_embedding": True},
}
HEADS = (SASGPTForCausalLM, SASEncoderForMaskedLM, SASSeq2SeqForConditionalGeneration)
COLUMNS = (
    "family",
    "options",
    "max difference, max logit (float64)",
    "max difference, max logit (float32)",
    "source eager - SDPA (float32)",
    "seconds",
    "source MB",
    "peak MB",
)


def make_source(family: str) -> torch.nn.Module:
    """A random model with a head for tokens, biases and norms off their zeros and ones."""
    torch.manual_seed(0)
    architectures = FAMILIES[family].architectures
    name = next(name for name, sas_class in architectures.items() if sas_class in HEADS)
    size = {name: value for name, value in SIZE.items() if family not in OWN_NAMES or not name.endswith(LAYERED)}
    model = getattr(transformers, name)(AutoConfig.for_model(family, **size | SOURCES[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def save_and_compare_in_float64(family: str, folder: Path, options: ConversionOptions, results) -> None:
    source = make_source(family)
    source.save_pretrained(folder)
    source = source.double()
    converted = convert_model(source, options)
    windows, _ = verification_samples(type(converted), converted.config, None, None, None, 2, 256, seed=0)
    results.put(compare_models(source, converted, windows).to_dict())


def convert(folder: Path, options: ConversionOptions, results) -> None:
    before, _ = resident()
    report = convert_checkpoint(folder, folder.with_name("sas"), options, windows=4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    results.put(report | {"peak": peak, "size": size})


def in_a_process(function, *arguments):
    """Call it in a fresh process, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    result = results.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SOURCES, nargs="+", default=list(SOURCES))
    parser.add_argument("--kernel-size", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()

    options = ConversionOptions(simulation_kernel_size=arguments.kernel_size)
    rows = []
    for family in track(arguments.family, "Families"):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            wide = in_a_process(save_and_compare_in_float64, family, source, options)
            report = in_a_process(convert, source, options)
        narrow, simulation = report["fidelity"], report["simulation"]
        heads, width = simulation["num_simulated_heads"], simulation["simulated_head_dim"]
        values = (
            family,
            f"{SIZE['num_attention_heads']} -> {heads}, {width * 2 // 3} -> {width}, {arguments.kernel_size}",
            f"{wide['max_abs_difference']:.1e}, {wide['max_abs_output']:.3g}",
            f"{narrow['max_abs_difference']:.1e}, {narrow['max_abs_output']:.3g}",
            f"{narrow['source_eager_sdpa_difference']:.1e}",
            f"{report['seconds']}",
            f"{report['size'] / 1e6:.0f}",
            f"{report['peak'] / 1e6:.0f}",
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))

    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.values())
    Console(width=160).print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
