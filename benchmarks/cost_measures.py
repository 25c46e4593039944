"""What benchmarks/cost.py measures: the parts, the jobs that are timed, and what is counted instead."""

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig, DynamicCache, StaticCache

from sas_hf.hub.info import describe
from sas_hf.modeling.cache_name import CACHE_NAME
from sas_hf.modeling.fused_simulation import simulate


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        title, unit: of what is measured.
        along: "lengths" (tokens of a step or prefill), "contexts" (tokens before the decoded one) or "" for neither.
        job: what is timed; `count`: gives the number instead, from a model, its configuration, tokens `[B, T]`.
        paper: whether it is known of the paper's module, which has no cache and is not among our configurations.
    """

    title: str
    unit: str
    along: str
    job: Callable | None = None
    count: Callable | None = None
    paper: bool = True


class Training:
    """Forward and backward pass of one step (the optimiser's share does not depend on attention)."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, tokens: int = 1):
        self.model, self.ids = model, ids

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def __call__(self) -> None:
        self.model.train()
        self.loss().backward()

    def reset(self) -> None:
        """Take away, untimed, what a call leaves behind."""
        self.model.zero_grad(set_to_none=True)


class Prefill:
    """The forward pass over a prompt, with the cache that it fills."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, tokens: int = 1):
        self.model, self.ids = model, ids

    @torch.no_grad()
    def __call__(self) -> None:
        self.model.eval()
        self.model(input_ids=self.ids, logits_to_keep=1)

    def reset(self) -> None:
        pass


class Forward(Prefill):
    """The same without a cache."""

    @torch.no_grad()
    def __call__(self) -> None:
        self.model.eval()
        self.model(input_ids=self.ids, logits_to_keep=1, use_cache=False)


class Decoding:
    """Steps of one token after a context."""

    static = False

    def __init__(self, model: nn.Module, ids: torch.Tensor, tokens: int):
        self.model, self.ids, self.tokens = model.eval(), ids, tokens
        length = ids.shape[1] + tokens
        self.cache = StaticCache(config=model.config, max_cache_len=length) if self.static else DynamicCache()
        with torch.no_grad():
            model(input_ids=ids, **{CACHE_NAME: self.cache}, logits_to_keep=1)

    @torch.no_grad()
    def __call__(self) -> None:
        self.model.eval()
        for _ in range(self.tokens):
            self.model(input_ids=self.ids[:, -1:], **{CACHE_NAME: self.cache})

    def reset(self) -> None:
        self.cache.crop(-self.tokens)


class StaticDecoding(Decoding):
    static = True


class CompiledDecoding(StaticDecoding):
    """By what `generate` compiles where it has a static cache: on a GPU with CUDA graphs."""

    @torch.no_grad()
    def __call__(self) -> None:
        self.model.eval()
        step = self.model.get_compiled_call(CompileConfig())
        for _ in range(self.tokens):
            step(input_ids=self.ids[:, -1:], **{CACHE_NAME: self.cache})


class GraphDecoding(StaticDecoding):
    """By one CUDA graph, captured once: what is left when nothing waits for Python."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, tokens: int):
        if not ids.is_cuda:
            raise ValueError(f"A CUDA graph needs a GPU, and the model is on {ids.device}.")
        super().__init__(model, ids, tokens)
        token, stream, self.graph = ids[:, -1:].clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.no_grad():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                model(input_ids=token, **{CACHE_NAME: self.cache})  # what is made once
            torch.cuda.current_stream().wait_stream(stream)
            self.cache.crop(-1)
            with torch.cuda.graph(self.graph):
                self.written = token, model(input_ids=token, **{CACHE_NAME: self.cache}).logits

    def __call__(self) -> None:
        for _ in range(self.tokens):
            self.graph.replay()


def first_layer_call(model: nn.Module, function: Callable) -> tuple[nn.Module, torch.Tensor, dict]:
    """The first attention layer, and the hidden states and other arguments that it gets when `function` runs."""
    layer, calls = model.model.layers[0].self_attn, []

    def record(_, arguments, keywords):
        calls.append((arguments, keywords))

    handle = layer.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        function()
    handle.remove()
    (arguments, keywords), *_ = calls
    keywords = keywords | ({"hidden_states": arguments[0]} if arguments else {})
    return layer, keywords.pop("hidden_states").detach(), keywords


class LayerTraining:
    """Forward and backward pass of the first attention layer alone."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, tokens: int = 1):
        model.train()
        self.layer, hidden, self.keywords = first_layer_call(model, lambda: model(input_ids=ids, use_cache=False))
        self.model, self.hidden = model, hidden.clone().requires_grad_()
        self.direction = torch.randn_like(hidden)

    def __call__(self) -> None:
        self.model.train()
        self.layer(hidden_states=self.hidden, **self.keywords)[0].backward(self.direction)

    def reset(self) -> None:
        self.layer.zero_grad(set_to_none=True)
        self.hidden.grad = None


class Simulating:
    """The simulation of the first layer's queries, keys and values alone, rotation included."""

    trains = False

    def __init__(self, model: nn.Module, ids: torch.Tensor, tokens: int = 1):
        model.train()
        layer, hidden, keywords = first_layer_call(model, lambda: model(input_ids=ids, use_cache=False))
        with torch.no_grad():
            key, value = layer.expand(*layer.project_state(hidden))
            heads = [tensor.contiguous() for tensor in (layer.project_queries(hidden), key, value)]
        angles = keywords["position_embeddings"]
        simulations = layer.q_simulation, layer.k_simulation, layer.v_simulation
        sides = zip(simulations, heads, (angles, angles, None), strict=True)
        self.sides = [(simulation, base.requires_grad_(self.trains), turn) for simulation, base, turn in sides]
        self.layer, self.directions = layer, None

    def __call__(self) -> None:
        with torch.set_grad_enabled(self.trains):
            results = [simulate(*side) for side in self.sides]
        if self.trains:
            self.directions = self.directions or [torch.randn_like(result) for result in results]
            torch.autograd.backward(results, self.directions)

    def reset(self) -> None:
        self.layer.zero_grad(set_to_none=True)
        for _, heads, _ in self.sides:
            heads.grad = None


class SimulatingInTraining(Simulating):
    trains = True


class LayerDecoding(Decoding):
    """Steps of one token in the first attention layer alone, each at the same length; the cache is dynamic."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, tokens: int):
        super().__init__(model, ids, 1)
        self.layer, self.hidden, self.keywords = first_layer_call(model, super().__call__)
        super().reset()
        self.steps = tokens

    @torch.no_grad()
    def __call__(self) -> None:
        self.model.eval()
        for _ in range(self.steps):
            self.layer(hidden_states=self.hidden, **self.keywords)
            self.cache.layers[0].crop(-1)

    def reset(self) -> None:
        pass


def bytes_saved(model: nn.Module, config, ids: torch.Tensor) -> float:
    """Bytes per token that the first attention layer saves for its backward pass, counted by saved-tensor hooks, each
    memory once; parameters and what all layers share (rotary tables, masks) apart."""
    job = LayerTraining(model, ids)
    shared = [tensor for value in job.keywords.values() for tensor in (value if isinstance(value, tuple) else [value])]
    shared = [tensor for tensor in shared if isinstance(tensor, torch.Tensor)]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *shared)}
    kept = {}

    def count(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = job.layer(hidden_states=job.hidden, **job.keywords)
    del output
    return sum(kept.values()) / ids.numel()


@contextmanager
def silence():
    """Kineto writes a line to the error stream at the start and the end of every profile."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def allocated(function: Callable, device: torch.device) -> tuple[int, int]:
    """The most bytes that PyTorch's allocator held while `function` ran, and what it holds at the end while the result
    lives, both above what it held before.

    On a CPU the profiler's record of every allocation is added up, so that both are exact and without noise; what a
    matrix library allocates by itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        peak, end = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del result
        return peak - before, end - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with silence():
        profiler.start()
    result = function()
    with silence():
        profiler.stop()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held


def peak_memory(job) -> float:
    """MiB of one call after another; gradients are in it, parameters are not."""
    job()
    job.reset()
    peak, _ = allocated(job, job.model.device)
    job.reset()
    return peak / 2**20


def bytes_held(model: nn.Module, config, ids: torch.Tensor) -> float:
    """Bytes per token that the allocator holds for the first attention layer between its forward and backward pass,
    its input and output apart. Sees also what hooks do not: what checkpointing keeps."""
    job = LayerTraining(model, ids)
    _, held = allocated(lambda: job.layer(hidden_states=job.hidden, **job.keywords)[0], model.device)
    return (held - job.hidden.nbytes) / ids.numel()


def cached_numbers(model: nn.Module, config, ids: torch.Tensor) -> int:
    """Per token and layer, in a real cache."""
    layer = Decoding(model, ids[:1, :8], 1).cache.layers[0]
    return layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel()


def parameters(model: nn.Module, config, ids: torch.Tensor) -> int:
    return sum(weight.numel() for weight in model.model.layers[0].self_attn.parameters())


def simulation_parameters(model: nn.Module, config, ids: torch.Tensor) -> int:
    named = model.model.layers[0].self_attn.named_parameters()
    return sum(weight.numel() for name, weight in named if "_simulation." in name)


def operations(model: nn.Module, config, ids: torch.Tensor) -> float:
    """Millions, forward, of a token that sees as many as `ids` holds."""
    return describe(config, ids.shape[1]).forward_flops / 1e6


PARTS = {
    "train": Part("training step", "ms", "lengths", Training),
    "prefill": Part("prefill", "ms", "lengths", Prefill),
    "forward": Part("forward pass without a cache", "ms", "lengths", Forward),
    "decode-static": Part("decoded token, static cache", "ms", "contexts", StaticDecoding, paper=False),
    "decode-graph": Part("decoded token, one CUDA graph", "ms", "contexts", GraphDecoding, paper=False),
    "decode-compiled": Part(
        "decoded token, as `generate` compiles it", "ms", "contexts", CompiledDecoding, paper=False
    ),
    "decode-dynamic": Part("decoded token, dynamic cache", "ms", "contexts", Decoding, paper=False),
    "layer": Part("attention layer alone, forward and backward", "ms", "lengths", LayerTraining),
    "layer-decode": Part("decoded token, attention layer alone", "ms", "contexts", LayerDecoding, paper=False),
    "bytes": Part("saved for backward by a layer", "bytes per token", "lengths", count=bytes_saved),
    "held": Part("held by a layer, input and output apart", "bytes per token", "lengths", count=bytes_held),
    "memory-train": Part(
        "peak memory of a training step", "MiB", "lengths", count=lambda m, _, ids: peak_memory(Training(m, ids))
    ),
    "memory-prefill": Part(
        "peak memory of a prefill", "MiB", "lengths", count=lambda m, _, ids: peak_memory(Prefill(m, ids))
    ),
    "cache": Part("cached per token and layer", "numbers", "", count=cached_numbers, paper=False),
    "parameters": Part("parameters of an attention layer", "numbers", "", count=parameters),
    "simulation": Part("of these simulation", "numbers", "", count=simulation_parameters),
    "operations": Part(
        "operations of a token that sees the context, cached as attention reads it",
        "millions",
        "contexts",
        count=operations,
        paper=False,
    ),
    "operations-mean": Part(
        "operations of a token that sees half of them",
        "millions",
        "lengths",
        count=lambda m, config, ids: operations(m, config, ids[:, : ids.shape[1] // 2]),
        paper=False,
    ),
}
