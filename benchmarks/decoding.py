"""One decoding step of one attention layer: without simulation, with the expanded cache and with the base cache.

    python benchmarks/decoding.py --context 1024

The three take turns in one process; medians of milliseconds, ratios to plain attention, cached numbers per token.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from sas_hf import SASGPTConfig, SASGPTModel


FORMS = {
    "plain": {},
    "expanded": {"num_simulated_heads": 36, "simulated_head_dim": 96},
    "base": {"num_simulated_heads": 36, "simulated_head_dim": 96, "simulation_cache": "base"},
}


class Step:
    """The attention layer of a one-layer model at 125M width, with a cache that holds `context` tokens."""

    def __init__(self, form: str, context: int, device: str, dtype: torch.dtype):
        model = SASGPTModel(SASGPTConfig(num_hidden_layers=1, vocab_size=8, **FORMS[form]))
        self.layer = model.layers[0].self_attn.to(device, dtype).eval()
        self.rotary = model.rotary_emb.to(device)
        self.base = form == "base"
        self.cache = DynamicCache()
        self.context = context
        self(context)

    def __call__(self, tokens: int = 1) -> None:
        weight = self.layer.q_proj.weight
        hidden_states = torch.randn(1, tokens, 768, device=weight.device, dtype=weight.dtype)
        past = self.cache.get_seq_length()
        positions = torch.arange(past + tokens, device=weight.device)[None]
        all_keys = self.rotary(hidden_states, positions)
        new = tuple(table[:, past:] for table in all_keys)
        self.layer(hidden_states, new, all_keys if self.base else new, cache=self.cache)

    def cached_numbers(self) -> int:
        layer = self.cache.layers[0]
        return (layer.keys.numel() + layer.values.numel()) // layer.keys.shape[-2]

    def milliseconds(self) -> float:
        start = time.perf_counter()
        self()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        self.cache.crop(-1)
        return 1000 * elapsed


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    steps = {form: Step(form, arguments.context, arguments.device, getattr(torch, arguments.dtype)) for form in FORMS}
    times = {form: [] for form in FORMS}
    for _ in range(arguments.rounds):
        for form, step in steps.items():
            times[form].append(step.milliseconds())
    table = Table(title=f"One decoding step of one layer, C = 768, context {arguments.context}")
    for column in ("cache", "ms (median)", "ms (min to max)", "ratio", "numbers per token"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    plain = statistics.median(times["plain"])
    for form, values in times.items():
        median = statistics.median(values)
        spread = f"{min(values):.2f} to {max(values):.2f}"
        table.add_row(form, f"{median:.2f}", spread, f"{median / plain:.1f}", f"{steps[form].cached_numbers():,}")
    Console().print(table)


if __name__ == "__main__":
    main()
