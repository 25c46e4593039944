"""Peak memory of converting a large bfloat16 source, against the size of its weights.

python benchmarks/conversion_memory.py                                  # a Llama of about 1B parameters
python benchmarks/conversion_memory.py --hidden-size 1024 --layers 12   # about 0.2B
python benchmarks/conversion_memory.py --family gpt2                    # whose weights must be transposed
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sas_hf.conversion import convert_checkpoint


def make_source(folder: Path, arguments: argparse.Namespace) -> None:
    """A random language model in shards; the Llama has the proportions of Llama 3.2 1B."""
    torch.manual_seed(0)
    own = {"intermediate_size": 4 * arguments.hidden_size, "num_key_value_heads": arguments.hidden_size // 256}
    config = AutoConfig.for_model(
        arguments.family,
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden_size // 64,
        tie_word_embeddings=True,
        **own if arguments.family == "llama" else {},
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")


def resident() -> tuple[int, int]:
    """Bytes of this process in memory now, and without pages of files, which the system could drop."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["RssAnon"].split()[0]) * 1024


def convert(folder: Path, windows: int, results: multiprocessing.Queue) -> None:
    """Convert in this process, watching its memory."""
    before, own_before = resident()
    peaks, stage, done = {}, "Checking", threading.Event()

    def watch():
        while not done.wait(0.02):
            whole, own = resident()
            peaks[stage] = max(peaks.get(stage, (0, 0)), (whole - before, own - own_before))

    def progress(message):
        nonlocal stage
        stage = message.split()[0]

    threading.Thread(target=watch, daemon=True).start()
    start = time.monotonic()
    report = convert_checkpoint(folder / "source", folder / "sas", windows=windows, progress=progress)
    seconds = time.monotonic() - start
    done.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    results.put({"peak": peak, "peaks": peaks, "seconds": seconds, "report": report})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--hidden-size", type=int, default=2048, help="a multiple of 256")
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the temporary checkpoints go")
    arguments = parser.parse_args()

    context = multiprocessing.get_context("spawn")  # fresh processes: their peaks are their own
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        maker = context.Process(target=make_source, args=(folder / "source", arguments))
        maker.start()
        maker.join()
        shards = [file.stat().st_size for file in (folder / "source").glob("*.safetensors")]
        results = context.Queue()
        converter = context.Process(target=convert, args=(folder, arguments.windows, results))
        converter.start()
        measured = results.get()
        converter.join()

    size, report = sum(shards), measured["report"]
    print(f"source: {report['parameters_source']:,} parameters, {size / 1e9:.2f} GB in {len(shards)} shards")
    print(f"exact: {report['fidelity']['exact']}, saved as {report['dtype_saved']}, {measured['seconds']:.0f} seconds")
    for stage, (whole, own) in measured["peaks"].items():
        print(f"  {stage:10} {whole / 1e9:.2f} GB ({whole / size:.2f} x), without file pages {own / 1e9:.2f} GB")
    print(f"peak resident memory: {measured['peak'] / 1e9:.2f} GB = {measured['peak'] / size:.2f} x the source")
    print(json.dumps({"size": size, "peak": measured["peak"], "ratio": round(measured["peak"] / size, 3)}))


if __name__ == "__main__":
    main()
