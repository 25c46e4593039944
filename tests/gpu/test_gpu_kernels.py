"""Every kernel of attention computes, with keys of 96 and values of 64 features, what the definition does."""

import pytest
import torch
from against_cpu import DEVICES, LAYERS, LENGTH, TOLERANCES, Beside, Kept, choose_always
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from sas_hf.modeling.attention_kernels import AS_THEY_ARE, PADDED


FLASH = {2: is_flash_attn_2_available, 3: is_flash_attn_3_available, 4: is_flash_attn_4_available}
SDPA = {  # how values reach the kernel, the types and the cases that it takes
    SDPBackend.MATH: (AS_THEY_ARE, (torch.float32, torch.float16, torch.bfloat16), ("plain", "packed", "padded")),
    SDPBackend.EFFICIENT_ATTENTION: (
        AS_THEY_ARE,
        (torch.float32, torch.float16, torch.bfloat16),
        ("plain", "packed", "padded"),
    ),
    SDPBackend.CUDNN_ATTENTION: (AS_THEY_ARE, (torch.float16, torch.bfloat16), ("plain", "packed", "padded")),
    SDPBackend.FLASH_ATTENTION: (PADDED, (torch.float16, torch.bfloat16), ("plain",)),
}
ON_A_CPU = {SDPBackend.MATH: (torch.float32,), SDPBackend.FLASH_ATTENTION: (torch.float32, torch.bfloat16)}
SDPA_CASES = [
    pytest.param("cuda", kernel, dtype, case, marks=pytest.mark.gpu)
    for kernel, (_, dtypes, cases) in SDPA.items()
    for dtype in dtypes
    for case in cases
]
SDPA_CASES += [
    ("cpu", kernel, dtype, case) for kernel, dtypes in ON_A_CPU.items() for dtype in dtypes for case in SDPA[kernel][2]
]


@pytest.mark.parametrize(("device", "kernel", "dtype", "case"), SDPA_CASES)
def test_kernels_of_sdpa(device, kernel, dtype, case, monkeypatch):
    """No other kernel is allowed, so that one which refuses raises an error."""
    if device == "cuda" and kernel is SDPBackend.CUDNN_ATTENTION and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN's kernel is chosen from compute capability 9.0 on")
    choose_always(monkeypatch, "sdpa", device, SDPA[kernel][0])
    beside = Beside(device, dtype, case)
    beside.compare(TOLERANCES[dtype], around=lambda: sdpa_kernel(kernel))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["plain", "packed", "padded"])
def test_the_kernel_that_is_chosen(device, dtype, case):
    """As anybody gets it."""
    Beside(device, dtype, case).compare(TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("device", "values"),
    [("cpu", PADDED), *(pytest.param("cuda", values, marks=pytest.mark.gpu) for values in (AS_THEY_ARE, PADDED))],
)
def test_of_what_simulation_makes_nothing_is_kept(device, values, monkeypatch):
    """Neither queries and keys nor padded values; the output, which padding makes as wide as they, once a layer."""
    choose_always(monkeypatch, "sdpa", device, values)
    beside, kept = Beside(device, torch.bfloat16), Kept()
    beside.compare(TOLERANCES[torch.bfloat16], around=kept)
    wide = [shape for shape in kept.shapes if sorted(shape) == sorted((2, 12, LENGTH, 96))]
    assert len(wide) == (LAYERS if values == PADDED else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["plain", "packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # Transformers to PyTorch
def test_flex_attention(dtype, case):
    beside = Beside("cuda", dtype, case)
    beside.model.set_attn_implementation("flex_attention")
    beside.compare(TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["plain", "packed", "padded"])
@pytest.mark.parametrize("values", [AS_THEY_ARE, PADDED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("version", FLASH)
def test_flash_attention(version, dtype, values, case, monkeypatch):
    if not FLASH[version]():
        pytest.skip(f"FlashAttention {version} is not installed")
    if values == AS_THEY_ARE and version < 4:
        pytest.skip(f"FlashAttention {version} knows one width")
    choose_always(monkeypatch, f"flash_attention_{version}", "cuda", values)
    beside = Beside("cuda", dtype, case)
    beside.model.set_attn_implementation(f"flash_attention_{version}")
    beside.compare(TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("device", "variant"),
    [
        ("cpu", "sas"),
        *(pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in ("sas", "sas_k5_gqa", "mla_sas")),
    ],
)
def test_autocast(device, dtype, variant):
    beside = Beside(device, torch.float32, variant=variant)
    wider = 1.5 if variant == "sas_k5_gqa" else 1  # on a CPU as on an H200: 0.069 and 0.077 in bfloat16
    beside.compare(wider * TOLERANCES[dtype], around=lambda: torch.autocast(device, dtype=dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["plain", "packed"])
def test_a_compiled_step(device, case):
    """In one graph; on a GPU by Inductor, which `tests/modeling` does on the CPU."""
    torch._dynamo.reset()
    beside = Beside(device, torch.float32, case)
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(beside.model, fullgraph=True, backend=backend)
    beside.compare(TOLERANCES[torch.float32], compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("variant", ["sas", "sas_k5_gqa"])
def test_a_compiled_simulation(variant, recompute):
    torch._dynamo.reset()
    beside = Beside("cuda", torch.float32, variant=variant, compile_simulation=True, recompute_simulation=recompute)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # convolutions would
        beside.compare(TOLERANCES[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["plain", "packed"])
@pytest.mark.parametrize("variant", ["mha", "sas", "sas_k5_gqa", "sas_learned", "mla_sas"])
def test_a_step_waits_for_nothing(variant, case):
    beside = Beside("cuda", torch.bfloat16, case, variant)
    inputs = {name: tensor.cuda() for name, tensor in beside.inputs.items()}

    def train():
        beside.model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()

    train()  # what is made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_that_waits_is_seen():
    """That the test above can fail."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_memory_of_a_step():
    """Recomputation holds less by queries, keys and values of all layers, to a half at least."""
    peaks = []
    for recompute in (True, False):
        beside = Beside("cuda", torch.bfloat16, recompute_simulation=recompute, num_hidden_layers=8)
        ids = beside.inputs["input_ids"].cuda().repeat(8, 1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        beside.model(ids, labels=ids, use_cache=False).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    spared = 8 * ids.numel() * 2 * (2 * 12 * 96 + 12 * 64)
    assert peaks[1] - peaks[0] > spared / 2
