"""How exact a conversion is on real text, and whether it can learn: the figures of docs/conversion.md.

sas-hf convert SOURCE CONVERTED
python benchmarks/conversion.py SOURCE CONVERTED --text FILE
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from sas_hf.conversion import compare_models, convert_model, gradient_differences
from sas_hf.conversion.fidelity import text_windows
from sas_hf.data.text_files import read_whole


TIE = 1e-3  # of two logits; a first difference in greedy text beyond it would be a defect


@torch.no_grad()
def same_greedy_text(source, converted, prompts: list[torch.Tensor], new_tokens: int) -> tuple[int, float]:
    """How many prompts `[1, T]` continue the same way, and the largest gap between the two candidates elsewhere."""
    same, largest_gap = 0, 0.0
    for prompt in track(prompts, "Greedy continuations"):
        settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        expected = source.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0]
        actual = converted.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0]
        if torch.equal(expected, actual):
            same += 1
            continue
        first = (expected != actual).nonzero()[0].item()
        logits = source(expected[None, :first]).logits[0, -1]
        largest_gap = max(largest_gap, (logits[expected[first]] - logits[actual[first]]).abs().item())
    return same, largest_gap


@torch.no_grad()
def layer_difference_in_float64(source, converted, ids: torch.Tensor) -> float:
    """Largest difference of the first layer's attention output in float64, on the source's own hidden states."""
    source, converted = source.double(), converted.double()
    hidden_states = source.model.layers[0].input_layernorm(source.model.embed_tokens(ids))
    rotary = source.model.rotary_emb(hidden_states, torch.arange(ids.shape[1])[None])
    expected, _ = source.model.layers[0].self_attn(hidden_states, rotary)
    actual, _ = converted.model.layers[0].self_attn(hidden_states, rotary)
    return (actual - expected).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("converted")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()

    source = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32)
    converted = AutoModelForCausalLM.from_pretrained(arguments.converted, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    text = read_whole(arguments.text)

    fidelity = compare_models(source, converted, text_windows(text, tokenizer, 512, 8))
    prompts = text_windows(text, tokenizer, 32, arguments.prompts)
    same, gap = same_greedy_text(source, converted, prompts, arguments.new_tokens)
    # A fresh conversion, as at step one: CONVERTED may have been trained.
    shares = gradient_differences(convert_model(source), torch.cat(text_windows(text, tokenizer, 256, 2)))
    figures = {
        "max |logit difference|": fidelity.max_abs_difference,
        "max |logit|": fidelity.max_abs_output,
        "allowed, 1e-5 of it": 1e-5 * fidelity.max_abs_output,
        "source, eager against SDPA": fidelity.source_eager_sdpa_difference,
        "mean KL divergence": fidelity.mean_kl,
        "arg-max agreement": fidelity.argmax_agreement,
        f"same greedy {arguments.new_tokens} tokens, of {len(prompts)} prompts": same,
        "largest logit gap where they part": gap,
        "parameters added": converted.num_parameters() / source.num_parameters() - 1,
        "share of gradient that differs between copies, queries": shares["query"],
        "share of gradient that differs between copies, keys": shares["key"],
        "one attention layer in float64, max |difference|": layer_difference_in_float64(source, converted, prompts[0]),
    }
    table = Table(title=f"{arguments.converted} against {arguments.source}, {fidelity.tokens} tokens")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
