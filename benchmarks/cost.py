"""What SAS costs beside multi-head attention: training step, prefill, decoding, bytes kept for backward, cache.

    python benchmarks/cost.py --output cost.json --plot cost.png
    python benchmarks/cost.py --models mha sas --layers 2 --lengths 512 1024 2048 --parts train
    python benchmarks/cost.py --device cuda --dtype bfloat16 --batch 8

All models of one run take turns in one process on the same tokens; a figure is the median over the rounds of its ratio
to our plain multi-head attention *in the same round*, with the smallest and the largest. Bytes are counted, not timed.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from sas_hf import SASGPTForCausalLM
from sas_hf.configurations import named_config
from sas_hf.modeling.cache_name import CACHE_NAME
from sas_hf.modeling.positions import rotate_leading_features


def simulated(kernel: int = 1, groups: int = 3, **fields) -> dict:
    return {
        "num_simulated_heads": groups * 12, "simulated_head_dim": 96, "simulation_kernel_size": kernel, **fields
    }  # fmt: skip


MODELS = {
    "mha": {},
    "llama": None,
    "paper": simulated(),
    "sas": simulated(),
    "sas-kept": simulated(recompute_simulation=False),
    "sas-k5": simulated(5),
    "sas-base": simulated(simulation_cache="base"),
    "sas-24": simulated(groups=2),
    "sas-48": simulated(groups=4),
    "gqa-sas": simulated(attention_type="gqa", num_key_value_heads=4),
    "gqa": {"attention_type": "gqa", "num_key_value_heads": 4},
    "mqa": {"attention_type": "mqa"},
    "mla": {"attention_type": "mla"},
    "tpa": {"attention_type": "tpa"},
    "optimised": {"attention_type": "optimised"},
    "efficient": {"attention_type": "efficient"},
    "super": {"attention_type": "super"},
}
DEFAULT = ("mha", "llama", "paper", "sas", "sas-kept", "sas-k5", "sas-base")


class PaperAttention(nn.Module):
    """Appendix L as printed (convolutions, maps, softmax attention, output projection before the mean), with the
    backbone's rotary positions; made of one of our layers, whose parameters it takes."""

    mixes_tokens = rotates_at_use = False  # what the backbone asks of a layer

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **_):
        layer = self.layer
        batch, length = hidden_states.shape[:2]
        query, key, value = layer.project(hidden_states)

        def simulate(simulation, heads):
            x = heads.reshape(batch * length, *heads.shape[2:])
            for maps in simulation:
                x = maps.expansion(x)
                x = maps.residual(F.relu(x)) + x
            return x.reshape(batch, length, -1, x.shape[-1])

        query = rotate_leading_features(simulate(layer.q_simulation, query), position_embeddings).transpose(1, 2)
        key = rotate_leading_features(simulate(layer.k_simulation, key), position_embeddings).transpose(1, 2)
        value = simulate(layer.v_simulation, value).transpose(1, 2)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=layer.scaling
        )
        groups = output.transpose(1, 2).reshape(batch, length, -1, layer.o_proj.in_features)
        return layer.o_proj(groups).mean(dim=-2), None


def make_model(name: str, arguments: argparse.Namespace) -> nn.Module:
    """A random model of 125M width."""
    torch.manual_seed(0)
    positions = max(*arguments.lengths, arguments.context + 1 + arguments.tokens)
    shared = {"num_hidden_layers": arguments.layers, "max_position_embeddings": positions}
    ours = named_config("mha-125m", **shared, **(MODELS[name] or {}))
    if name == "llama":
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "tie_word_embeddings")
        model = LlamaForCausalLM(LlamaConfig(**shared, **{field: getattr(ours, field) for field in names}))
    else:
        model = SASGPTForCausalLM(ours)
    if name == "paper":
        for layer in model.model.layers:
            layer.self_attn = PaperAttention(layer.self_attn)
    return model.to(arguments.device, getattr(torch, arguments.dtype))


def timed(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def train(model: nn.Module, ids: torch.Tensor) -> None:
    """Forward and backward of one step (the optimiser's share does not depend on attention)."""
    model.train()
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor) -> None:
    model.eval()
    model(input_ids=ids, logits_to_keep=1)


class Decoding:
    """Steps of one token after a context, each at the same length."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, tokens: int, static: bool):
        self.model, self.tokens, self.ids = model.eval(), tokens, ids
        length = ids.shape[1] + tokens
        self.cache = StaticCache(config=model.config, max_cache_len=length) if static else DynamicCache()
        with torch.no_grad():
            model(input_ids=ids, **{CACHE_NAME: self.cache}, logits_to_keep=1)

    @torch.no_grad()
    def __call__(self) -> None:
        self.model.eval()
        for _ in range(self.tokens):
            self.model(input_ids=self.ids[:, -1:], **{CACHE_NAME: self.cache})
        self.cache.crop(-self.tokens)

    def numbers(self) -> int:
        """Cached per token and layer."""
        layer = self.cache.layers[0]
        return (layer.keys[0, :, 0].numel()) + (layer.values[0, :, 0].numel())


def bytes_kept(model: nn.Module, length: int) -> float:
    """Bytes per token that the first attention layer keeps for its backward pass, each memory once, parameters and the
    rotary tables (which all layers share) apart."""
    hidden = torch.randn(1, length, 768, device=model.device, dtype=model.dtype, requires_grad=True)
    tables = model.model.rotary_emb(hidden, torch.arange(length, device=model.device)[None])
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *tables)}
    kept = {}

    def count(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model.model.layers[0].self_attn(hidden, position_embeddings=tables, attention_mask=None)
    del output
    return sum(kept.values()) / length


def measure(jobs: dict, arguments: argparse.Namespace, progress: Progress, title: str) -> dict:
    """Seconds of every job in every round; the order turns from round to round."""
    times = {name: [] for name in jobs}
    task = progress.add_task(title, total=arguments.rounds + 1)
    names = list(jobs)
    for turn in range(arguments.rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = timed(jobs[name], arguments.device)
            if turn:  # the first is for warming up
                times[name].append(seconds)
        progress.advance(task)
    reference = times[names[0]]
    return {
        name: {
            "milliseconds": 1000 * statistics.median(seconds),
            "ratio": statistics.median(ratios := [a / b for a, b in zip(seconds, reference, strict=True)]),
            "smallest": min(ratios),
            "largest": max(ratios),
        }
        for name, seconds in times.items()
    }


def show(figures: dict, models: list[str]) -> None:
    table = Table(title=f"Ratios to {models[0]}: median (smallest to largest); then counts")
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    for part, values in figures.items():
        cells = []
        for name in models:
            value = values.get(name)
            if isinstance(value, dict):
                cells.append(f"{value['ratio']:.2f} ({value['smallest']:.2f}-{value['largest']:.2f})")
            else:
                cells.append("" if value is None else f"{value:,.0f}")
        table.add_row(part, *cells)
    Console(width=200).print(table)


def plot(figures: dict, models: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed_parts = {part: values for part, values in figures.items() if isinstance(next(iter(values.values())), dict)}
    figure, axes = pyplot.subplots(1, len(timed_parts), figsize=(3.2 * len(timed_parts), 3.2), squeeze=False)
    for axis, (part, values) in zip(axes[0], timed_parts.items(), strict=True):
        names = [name for name in models if name in values]
        ratios = [values[name]["ratio"] for name in names]
        spread = [
            [ratio - values[name]["smallest"] for name, ratio in zip(names, ratios, strict=True)],
            [values[name]["largest"] - ratio for name, ratio in zip(names, ratios, strict=True)],
        ]
        axis.barh(names, ratios, xerr=spread)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(part, fontsize=9)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(DEFAULT), help="the first is the measure")
    parser.add_argument("--parts", nargs="+", choices=("train", "prefill", "decode", "bytes"), default=None)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512], help="of training steps and prefills")
    parser.add_argument("--context", type=int, default=1024, help="of decoding")
    parser.add_argument("--tokens", type=int, default=4, help="decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="image file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts = arguments.parts or ["bytes", "train", "prefill", "decode"]

    models = {name: make_model(name, arguments) for name in arguments.models}
    vocabulary = next(iter(models.values())).config.vocab_size
    figures = {}
    with Progress(transient=True) as progress:
        for length in arguments.lengths:
            ids = torch.randint(vocabulary, (arguments.batch, length), device=arguments.device)
            if "bytes" in parts:
                figures[f"bytes kept per token, {length}"] = {n: bytes_kept(m, length) for n, m in models.items()}
            for part, function in (("train", train), ("prefill", prefill)):
                if part in parts:
                    jobs = {n: partial(function, m, ids) for n, m in models.items()}
                    figures[f"{part}, {length}"] = measure(jobs, arguments, progress, part)
                for model in models.values():
                    model.zero_grad(set_to_none=True)
        if "decode" in parts:
            ids = torch.randint(vocabulary, (arguments.batch, arguments.context), device=arguments.device)
            for form in ("static", "dynamic"):
                able = {n: m for n, m in models.items() if n != "paper"}  # which has no cache
                jobs = {n: Decoding(m, ids, arguments.tokens, form == "static") for n, m in able.items()}
                figures[f"decode, {arguments.context}, {form}"] = measure(jobs, arguments, progress, form)
            figures["cached numbers per token and layer"] = {n: job.numbers() for n, job in jobs.items()}

    show(figures, arguments.models)
    settings = {name: str(value) for name, value in vars(arguments).items()} | {"torch": torch.__version__}
    if arguments.output:
        arguments.output.write_text(json.dumps({"settings": settings, "figures": figures}, indent=2) + "\n")
    if arguments.plot:
        plot(figures, arguments.models, arguments.plot)


if __name__ == "__main__":
    main()
