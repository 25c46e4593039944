"""What benchmarks/gpu.py measures, in a process of its own: a kernel that crashes, hangs or spoils the device takes
this one down, and another goes on with the rest.
"""

import contextlib
import gc
import importlib.metadata
import os
import re
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from cost_measures import PARTS, Simulating, SimulatingInTraining, Training, silence
from cost_profile import best_rate
from cost_rivals import backbone, make_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from sas_hf.configurations import SIZES
from sas_hf.modeling import attention_kernels, fused_simulation
from sas_hf.modeling.attention_kernels import AS_THEY_ARE, PADDED, UNMEASURED, Choice
from sas_hf.report.machine import environment
from sas_hf.report.turns import beside_first, take_turns


HALF = {torch.float16, torch.bfloat16}
ROUNDS, SECONDS = (3, 9), 4.0  # the fewest and the most rounds of a cell, and how long they may take all together
DECODED = 4  # tokens of a round
VOCABULARY = 1024  # of the models whose numbers are compared with the CPU's


class Scale(NamedTuple):
    """
    Attributes:
        sizes: of models.
        vocabulary: `None`: that of the paper.
        lengths: tokens of a row; the cells that come first are measured at the second.
        tokens: of a step or a prefill, in as many rows as they fill.
        cached: tokens before the decoded ones, of all rows.
        layers: of the models whose numbers are compared with the CPU's; all others are as deep as their size.
        checked: tokens of these.
    """

    sizes: tuple[str, ...]
    vocabulary: int
    lengths: tuple[int, ...]
    tokens: int
    cached: int
    layers: int
    checked: int


SCALES = {
    "paper": Scale(("125m", "350m"), 50304, (512, 1024, 4096), 8192, 4096, 2, 256),
    "tiny": Scale(("cpu",), 1024, (32, 64), 128, 64, 2, 32),
}


class Function(NamedTuple):
    """A way to compute attention: `attn_implementation`, which of PyTorch's kernels, and what becomes of values that
    are narrower than keys (`None`: as attention_kernels.py says)."""

    name: str
    kernel: SDPBackend | None = None
    values: str | None = None

    def prepare(self, model: nn.Module) -> None:
        """Raise an error where Transformers refuses it."""
        before = model.config._attn_implementation
        model.set_attn_implementation(self.name)
        model.config._attn_implementation = before

    @contextlib.contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Attention of `model` is computed so."""
        before, rows = model.config._attn_implementation, len(attention_kernels.CHOICES)
        if self.values is not None:
            dtypes = (torch.float32, *HALF)
            row = Choice((self.name,), model.device.type, None, dtypes, 1, "as asked for", self.values, UNMEASURED)
            attention_kernels.CHOICES.insert(0, row)
        try:
            model.config._attn_implementation = self.name
            with sdpa_kernel(self.kernel) if self.kernel is not None else contextlib.nullcontext():
                yield
        finally:
            model.config._attn_implementation = before
            del attention_kernels.CHOICES[: len(attention_kernels.CHOICES) - rows]


CHOSEN = Function("sdpa")
FUNCTIONS = {
    "flash": Function("sdpa", SDPBackend.FLASH_ATTENTION, AS_THEY_ARE),
    "flash-padded": Function("sdpa", SDPBackend.FLASH_ATTENTION, PADDED),
    "cudnn": Function("sdpa", SDPBackend.CUDNN_ATTENTION, AS_THEY_ARE),
    "cudnn-padded": Function("sdpa", SDPBackend.CUDNN_ATTENTION, PADDED),
    "efficient": Function("sdpa", SDPBackend.EFFICIENT_ATTENTION, AS_THEY_ARE),
    "efficient-padded": Function("sdpa", SDPBackend.EFFICIENT_ATTENTION, PADDED),
    "fa4": Function("flash_attention_4", values=AS_THEY_ARE),
    "fa4-padded": Function("flash_attention_4", values=PADDED),
    "fa3": Function("flash_attention_3", values=PADDED),
    "fa2": Function("flash_attention_2", values=PADDED),
    "flex": Function("flex_attention"),
    "math": Function("sdpa", SDPBackend.MATH, AS_THEY_ARE),
    "eager": Function("eager"),
}
COMPILED_FUNCTIONS = ("flex",)  # by `torch.compile` when first called
FLASH = {"fa2": is_flash_attn_2_available, "fa3": is_flash_attn_3_available, "fa4": is_flash_attn_4_available}
PACKAGES = ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "kernels", "bitsandbytes")
KERNELS_OF_A_CPU = ("flash", "flash-padded", "flex", "math", "eager")


def functions_here(device: torch.device) -> list[str]:
    """Names of [`FUNCTIONS`] that are installed; whether they serve is another matter."""
    names = [name for name in FUNCTIONS if name[:3] not in FLASH or FLASH[name[:3]]()]
    return names if device.type == "cuda" else [name for name in names if name in KERNELS_OF_A_CPU]


def half_type(device: torch.device) -> torch.dtype:
    """bfloat16, or float16 on a card that knows no bfloat16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def surroundings(device: torch.device) -> dict:
    """The card and the versions; figures of others are not put beside them (`settings`), and the rest."""
    made = environment(device)
    versions = {"torch": made["torch"], "transformers": made["transformers"], "sas_hf": made["sas_hf"]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    rest = {name: made[name] for name in ("cores", "threads", "python")}
    rest |= {"functions": functions_here(device), "dtype": str(half_type(device)).removeprefix("torch.")}
    if device.type == "cuda":
        card, (free, total) = torch.cuda.get_device_properties(device), torch.cuda.mem_get_info(device)
        versions |= {"cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version()}
        rest |= {"capability": f"{card.major}.{card.minor}", "multiprocessors": card.multi_processor_count}
        rest |= {"memory_gib": round(total / 2**30, 1), "used_by_others_gib": round((total - free) / 2**30, 1)}
        rest["cards"] = torch.cuda.device_count()
    return {"settings": {"card": made["device"], **versions}, "rest": rest}


class Bench:
    """Measures cells, and holds the models of the size that it is at."""

    def __init__(self, scale: Scale, device: torch.device, tell: Callable[..., None]):
        self.scale, self.device, self.tell = scale, device, tell
        self.half = half_type(device)
        self.size, self.models = None, {}

    def measure(self, cell: dict) -> dict[str, dict]:
        """
        Args:
            cell: `part`, `size`, `length`, `variants`, the one of them that is the `measure` of the others, and the
                `seconds` that are left.

        Returns:
            by variant: its figures, or `{"failed": reason}`.
        """
        if self.size != cell["size"]:
            self.size = cell["size"]
            self.models.clear()
            torch._dynamo.reset()
            self.free()
        self.seconds, self.first = cell.pop("seconds"), cell.pop("measure")
        return getattr(self, f"measure_{cell['part'].replace('-', '_')}", self.measure_part)(**cell)

    # --- models ---

    def model(self, name: str, dtype: torch.dtype | None = None) -> nn.Module:
        key = name, dtype or self.half
        if key not in self.models:
            positions = max(self.scale.lengths) + DECODED + 1
            shared = backbone(SIZES[self.size][1], self.scale.vocabulary, positions)
            with self.device:
                self.models[key] = make_model(name, self.size, **shared).to(self.device, key[1])
        return self.models[key]

    def ids(self, length: int, tokens: int) -> torch.Tensor:
        rows = max(1, tokens // length)
        return torch.randint(self.scale.vocabulary, (rows, length), device=self.device)

    def free(self) -> None:
        """What a failure may have left in memory."""
        for model in self.models.values():
            model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- one after another ---

    def each(self, variants: list[str], function: Callable[[str], object]) -> tuple[dict[str, object], dict]:
        """What `function` gives of every variant, and the failures of the others."""
        found, failed = {}, {}
        for variant in variants:
            self.tell("now", variant)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                try:
                    found[variant] = function(variant)
                    continue
                except Exception as error:
                    failed[variant] = {"failed": reason_of(error, [str(warning.message) for warning in told])}
            self.tell("found", {variant: failed[variant]})
            self.free()
            self.wait()  # where the device is spoilt, this is the end of the process
        return found, failed

    # --- what is timed ---

    def measure_part(self, part: str, size: str, length: int, variants: list[str]) -> dict:
        """One of cost_measures.py: timed or counted."""
        if any(variant.partition("@")[2] in COMPILED_FUNCTIONS for variant in variants):
            torch._dynamo.reset()  # so that it compiles for this length, as where there is no other
        decodes, kind = PARTS[part].along == "contexts", PARTS[part]
        ids = self.ids(length, self.scale.cached if decodes else self.scale.tokens)

        def count(variant: str) -> float:
            name, function = parts_of(variant)
            with function.within(self.model(name)):
                return kind.count(self.model(name), None, ids)

        if kind.count:
            return self.counted(variants, count)

        def make(variant: str):
            name, function = parts_of(variant)
            return Within(kind.job, self.model(name), ids, function)

        return self.timed(variants, make, DECODED if decodes else 1)

    def measure_train_autocast(self, part, size, length, variants) -> dict:
        """Weights in float32, operations in half: as the Trainer has it with `bf16`."""
        ids = self.ids(length, self.scale.tokens)

        def make(variant: str):
            return Within(AutocastTraining, self.model(variant, torch.float32), ids, CHOSEN)

        return self.timed(variants, make)

    def measure_simulation(self, part, size, length, variants, job=Simulating) -> dict:
        """Of a layer, beside the time that writing its result takes."""
        ids = self.ids(length, self.scale.tokens)

        def make(variant: str):
            if variant != "write":
                return Within(job, self.model(variant), ids, CHOSEN)
            layer = self.model("sas").model.layers[0].self_attn
            heads = layer.num_heads * layer.num_simulated_groups
            numbers = heads * (2 * layer.config.simulated_head_dim + layer.value_head_dim)
            return Write(numbers * ids.numel(), self.device, self.half)

        return self.timed(variants, make)

    def measure_simulation_train(self, **cell) -> dict:
        return self.measure_simulation(**cell, job=SimulatingInTraining)

    def timed(self, variants: list[str], make: Callable, calls: int = 1) -> dict:
        """Each alone at first, which compiles what is compiled, then all in turns."""
        first = {}

        def begin(variant: str):
            start = time.perf_counter()
            job = make(variant)
            job()
            self.wait()
            if "fused" in variant and fused_simulation.simulate_compiled.failed:
                raise RuntimeError("compiling the simulation failed, so that it ran uncompiled: worker.log")
            first[variant] = time.perf_counter() - start
            job.reset()
            start = time.perf_counter()
            job()
            self.wait()
            lasts[variant] = time.perf_counter() - start
            job.reset()
            return job

        lasts, running = {}, ""
        jobs, failed = self.each(variants, begin)

        def now(variant: str, turn: int) -> None:
            nonlocal running
            running = variant
            self.tell("now", variant)

        while jobs:
            allowed = min(SECONDS, self.seconds / 2) / sum(lasts[name] for name in jobs) - 1
            try:
                times = take_turns(jobs, max(ROUNDS[0], min(ROUNDS[1], int(allowed))), now, self.device)
                break
            except Exception as error:  # memory was enough for one at a time
                failed[running] = {"failed": reason_of(error, [])}
                del jobs[running]
                self.free()
                self.wait()
        if not jobs:
            return failed
        figures = beside_first({m: [1000 * took / calls for took in rounds] for m, rounds in times.items()})
        if self.first not in jobs:  # nothing to be measured by
            figures = {name: entry | {"ratio": None} for name, entry in figures.items()}
        return {name: entry | {"first_s": round(first[name], 3)} for name, entry in figures.items()} | failed

    # --- what is counted ---

    def counted(self, variants: list[str], count: Callable[[str], float]) -> dict:
        found, failed = self.each(variants, count)
        measure = found.get(self.first)
        ratios = {name: value / measure if measure else None for name, value in found.items()}
        return {name: {"value": value, "ratio": ratios[name]} for name, value in found.items()} | failed

    def measure_rates(self, part, size, length, variants) -> dict:
        """What the card does at best: operations a second of a product of matrices, bytes a second written."""
        large = self.device.type == "cuda"

        def rate(variant: str) -> float:
            if variant == "write":
                job = Write(2**28 if large else 2**22, self.device, self.half)
                rounds = take_turns({"write": job}, 8, lambda *_: None, self.device)["write"]
                return job.tensor.nbytes / statistics.median(rounds)
            dtype = self.half if variant == "product, half" else torch.float32
            return best_rate(8192 if large else 256, self.device, dtype)

        found, failed = self.each(variants, rate)
        return {name: {"value": value} for name, value in found.items()} | failed

    # --- whether it is right ---

    def measure_correct(self, part, size, length, variants, dtype: torch.dtype) -> dict:
        """Distance of logits and of all gradients from the definition's in float64 on the CPU, relative to their size;
        weights are the same, rounded to `dtype`."""
        ids = torch.randint(VOCABULARY, (1, self.scale.checked))
        direction = torch.randn(*ids.shape, VOCABULARY, dtype=torch.float64)
        models, expected = {}, {}

        def compare(variant: str) -> tuple[float, float]:
            name, function = parts_of(variant)
            plain = name.removesuffix("-regional")
            if plain not in expected:
                definition = telling(plain, size, self.scale).to(dtype).double()
                definition.config._attn_implementation = "eager"
                expected[plain] = step(definition, ids, direction)
            if name not in models:
                models[name] = telling(name, size, self.scale).to(self.device, dtype)
            function.prepare(models[name])
            with function.within(models[name]):
                found = step(models[name], ids, direction)
            names = {"logits"}, expected[plain].keys() - {"logits"}
            return tuple(distance(found, expected[plain], some) for some in names)

        found, failed = self.each(variants, compare)
        measure = found.get(self.first)
        return {
            name: {"value": logits, "gradients": rest, "ratio": rest / measure[1] if measure else None}
            for name, (logits, rest) in found.items()
        } | failed

    def measure_correct_float32(self, **cell) -> dict:
        return self.measure_correct(**cell, dtype=torch.float32)

    def measure_correct_half(self, **cell) -> dict:
        return self.measure_correct(**cell, dtype=self.half)

    # --- where the time goes ---

    def measure_profile(self, part, size, length, variants) -> dict:
        """Of a training step: the ten kernels (on a CPU, operations) that take longest."""
        ids, cuda = self.ids(length, self.scale.tokens), self.device.type == "cuda"

        def look(name: str) -> dict:
            job = Training(self.model(name), ids)
            for _ in range(2):
                job()
                job.reset()
            self.wait()
            profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
            with silence():
                profiler.start()
            start = time.perf_counter()
            job()
            self.wait()
            whole = 1000 * (time.perf_counter() - start)
            with silence():
                profiler.stop()
            job.reset()
            kernels = {}
            for event in profiler.key_averages():
                on_device = event.device_type == torch.autograd.DeviceType.CUDA
                took = event.self_device_time_total if cuda else event.self_cpu_time_total
                if on_device == cuda and not event.is_user_annotation and took:
                    kernels[event.key] = [took / 1000, event.count]
            ten = sorted(kernels.items(), key=lambda item: -item[1][0])[:10]
            return {
                "value": whole,
                "busy_ms": sum(took for took, _ in kernels.values()),
                "kernels": sum(count for _, count in kernels.values()),
                "rows": [[name, took, count] for name, (took, count) in ten],
            }

        found, failed = self.each(variants, look)
        return found | failed


def parts_of(variant: str) -> tuple[str, Function]:
    """`sas@cudnn`: the model and how attention is computed."""
    name, _, function = variant.partition("@")
    return name, FUNCTIONS[function] if function else CHOSEN


class Within:
    """A job of cost_measures.py, by some attention function."""

    def __init__(self, kind: Callable, model: nn.Module, ids: torch.Tensor, function: Function):
        self.model, self.function = model, function
        function.prepare(model)
        with function.within(model):
            self.job = kind(model, ids, DECODED)

    def __call__(self) -> None:
        with self.function.within(self.model):
            self.job()

    def reset(self) -> None:
        self.job.reset()


class AutocastTraining(Training):
    def loss(self) -> torch.Tensor:
        with torch.autocast(self.ids.device.type, dtype=half_type(self.ids.device)):
            return super().loss()


class Write:
    """So many numbers are written, and nothing else."""

    def __init__(self, numbers: int, device: torch.device, dtype: torch.dtype):
        self.tensor = torch.empty(numbers, device=device, dtype=dtype)

    def __call__(self) -> None:
        self.tensor.fill_(1)

    def reset(self) -> None:
        pass


def telling(name: str, size: str, scale: Scale) -> nn.Module:
    """A model, on the CPU, whose simulation changes much; at first it changes little."""
    model = make_model(name, size, **backbone(scale.layers, VOCABULARY, scale.checked))
    generator = torch.Generator().manual_seed(1)
    for place, parameter in model.named_parameters():
        if "_simulation" in place:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.train()


def step(model: nn.Module, ids: torch.Tensor, direction: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and the gradients of their product with `direction`, in float64 on the CPU."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    model.zero_grad()
    (logits.double() * direction.to(model.device)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    found = {name.replace("_orig_mod.", ""): tensor for name, tensor in (found | {"logits": logits}).items()}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], names: set[str]) -> float:
    """Of all these tensors together, relative to their size; infinite where one is missing."""
    if found.keys() != expected.keys():
        return float("inf")
    missed = sum((found[name] - expected[name]).square().sum() for name in names).sqrt()
    return float(missed / sum(expected[name].square().sum() for name in names).sqrt())


def reason_of(error: Exception, told: list[str]) -> str:
    """One line. PyTorch says by warnings why a kernel of its refuses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {lines[0] if lines else ''}"
    if "No available kernel" in said:
        told = [re.sub(r"\s*\(Triggered internally.*", "", line) for line in told]
        reasons = [line for line in told if "not used because" not in line and "disabled" not in line]
        said = f"refused: {' '.join(dict.fromkeys(reasons)) or lines[0]}"
    return said if len(said) <= 300 else said[:297] + "..."


def work(connection: Connection, scale: str, device: str) -> None:
    """Measure what is asked for, until nothing more is."""
    torch._dynamo.config.recompile_limit = 256  # models of one class take turns, at several lengths
    torch._dynamo.config.accumulated_recompile_limit = 4096
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # and not uncompiled, without a word
    bench = Bench(SCALES[scale], torch.device(device), lambda *message: connection.send(message))
    connection.send(("ready", surroundings(bench.device)))
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            return
        connection.send(("done", bench.measure(cell)))


def _end_with_parent() -> None:
    """Whose end of the input nobody else holds."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(Connection(int(sys.argv[1])), *sys.argv[2:])
