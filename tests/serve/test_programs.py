"""Programs for other runtimes: each is written, loaded and run there, and compared with the model from outside."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import encoder, gpt, gpt_config, left_padded, python_environment, seq2seq, token_ids, vit
from typer.testing import CliRunner

from sas_hf import (
    SASEncoderForSequenceClassification,
    SASEncoderModel,
    SASGPTForCausalLM,
    SASGPTForSequenceClassification,
    SASSeq2SeqModel,
    SASViTForMaskedImageModeling,
)
from sas_hf.cli import app
from sas_hf.modeling import sequence
from sas_hf.modeling.cache_name import CACHE_NAME
from sas_hf.serve import programs
from sas_hf.serve.programs import FORMATS, empty_cache, export_program


exporters = pytest.importorskip("transformers.exporters", reason="programs need the exporters of Transformers 5.23")
if not hasattr(exporters, "ExportedModel"):
    pytest.skip("programs need the exporters of Transformers 5.23", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters, which are new
WHOLE = os.environ.get("SAS_HF_WHOLE_MATRIX") == "1"
ONE = {"num_hidden_layers": 1}  # the time it takes grows with the layers; the tests below have two
ONE_EACH = {"encoder_layers": 1, "decoder_layers": 1}
MODELS = {
    "gpt": lambda variant: gpt(variant, **ONE),
    "gpt-base": lambda variant: gpt(variant, simulation_cache="base", **ONE),
    "gpt-k3": lambda variant: gpt(variant, simulation_kernel_size=3, **ONE),
    "classifier": lambda variant: gpt(variant, SASGPTForSequenceClassification, num_labels=3, pad_token_id=0, **ONE),
    "encoder": lambda variant: encoder(variant, **ONE),
    "sentence": lambda variant: encoder(variant, SASEncoderModel, **ONE),
    "texts": lambda variant: encoder(variant, SASEncoderForSequenceClassification, num_labels=3, **ONE),
    "vit": lambda variant: vit(variant, **ONE),
    "hidden-patches": lambda variant: vit(variant, SASViTForMaskedImageModeling, **ONE),
    "seq2seq": lambda variant: seq2seq(variant, **ONE_EACH),
    "seq2seq-base": lambda variant: seq2seq(variant, simulation_cache="base", **ONE_EACH),
}
KINDS = ("mha", "gqa", "mqa", "mla", "tpa", "optimised", "efficient", "super")
SIMULATED = ("sas", "head_only", "feature_only", "linear", "mla_sas", "tpa_sas", "optimised_sas", "efficient_sas")
MATRIX = [
    *(("gpt", variant) for variant in (*KINDS, *SIMULATED, "learned", "parallel_sas")),
    *(("gpt-base", variant) for variant in ("sas_k5_gqa", "mla_sas", "tpa_sas", "optimised_sas", "efficient_sas")),
    ("gpt-k3", "sas"),
    *(("classifier", variant) for variant in ("sas", "super")),
    *(("encoder", variant) for variant in ("mha", "rope", "super", "sas", "sas_k5_gqa", "mla_sas", "efficient_sas")),
    ("sentence", "sas"),
    ("texts", "sas_rope"),
    *(("vit", variant) for variant in ("vit", "mla", "super", "sas", "sas_k5_gqa", "tpa_sas", "efficient_sas")),
    ("hidden-patches", "sas"),
    *(("seq2seq", variant) for variant in ("mha", "sinusoidal", "efficient", "super", "sas_rope", "mla_sas")),
    ("seq2seq-base", "sas_rope"),
]
# What runs everywhere; `make test-exporters` runs the whole matrix.
ALWAYS = {
    ("torch", "gpt-base", "efficient_sas"),
    ("torch", "classifier", "sas"),
    ("torch", "seq2seq", "super"),
    ("onnx", "gpt", "super"),
    ("onnx", "encoder", "sas_k5_gqa"),
    ("onnx", "vit", "efficient_sas"),
}
# The others take ExecuTorch half a minute each, and what it makes of them has not been seen.
ON_EXECUTORCH = [
    *(("gpt", variant) for variant in ("mha", "gqa", "mla", "efficient", "feature_only", "head_only", "sas")),
    ("encoder", "sas"),
    ("vit", "sas"),
    ("seq2seq", "mha"),
]
# What is refused, and with what words.
REFUSED = {
    ("executorch", "gpt", "head_only"): "SASGPTForCausalLM for executorch does not run: .*Failed to load method",
    ("executorch", "gpt", "sas"): "SASGPTForCausalLM for executorch does not run: .*Failed to load method",
}


def cells():
    """Those that run here, and for each format one that stands for the others."""
    for export_format, chosen in FORMATS.items():
        missing = [name for name in chosen.packages if importlib.util.find_spec(name) is None]
        every = [(export_format, *model) for model in (ON_EXECUTORCH if export_format == "executorch" else MATRIX)]
        here = [cell for cell in every if WHOLE or cell in ALWAYS]
        reason = f"needs {', '.join(missing)}: make test-exporters"
        for cell in here:
            yield pytest.param(*cell, id="-".join(cell), marks=pytest.mark.skipif(bool(missing), reason=reason))
        if left_out := len(every) - len(here):
            reason = f"{left_out} more cells of {export_format}: make test-exporters"
            yield pytest.param(
                export_format, "", "", id=f"{export_format}-whole", marks=pytest.mark.skip(reason=reason)
            )


@pytest.mark.parametrize(("export_format", "model", "variant"), list(cells()))
def test_a_program_computes_what_the_model_does(export_format, model, variant, tmp_path):
    MODELS[model](variant).save_pretrained(tmp_path / "model")
    refused = REFUSED.get((export_format, model, variant))
    if refused is not None:
        with pytest.raises(ValueError, match=refused):
            export_program(tmp_path / "model", tmp_path / "program", export_format)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        return
    differences = export_program(tmp_path / "model", tmp_path / "program", export_format)
    print(f"{export_format} {model} {variant}: {max(differences.values()):.1e}")  # the table of docs/serving.md
    assert differences and all(difference < 3e-5 for difference in differences.values())
    assert (tmp_path / "program" / "export.json").is_file()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A model whose cache is small, and its program, by the command."""
    folder, model = tmp_path_factory.mktemp("decoder"), gpt("sas_k5_gqa", simulation_cache="base")
    model.save_pretrained(folder / "model")
    shown = command("export", folder / "model", folder / "program", "--format", "torch")
    told = " ".join(shown.output.split())  # lines of a terminal
    assert shown.exit_code == 0 and "differences from the model, of the largest number: logits" in told
    return folder, model


def command(*arguments):
    return CliRunner(env={"COLUMNS": "500"}).invoke(app, [*map(str, arguments)])


@torch.no_grad()
def test_a_program_writes_what_generate_writes(decoder):
    """By hand, as any runtime would: an empty cache, prompts padded on the left, token after token."""
    folder, model = decoder
    ids, mask = left_padded(6, 3)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    program = exporters.ExportedModel.from_pretrained(folder / "program", trust_remote_code=True)
    cache, written, new = empty_cache(program.config, rows=2), ids, ids
    for _ in range(6):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        output = program(input_ids=new, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
        cache, new = output[CACHE_NAME], output.logits[:, -1:].argmax(-1)
        written, mask = torch.cat((written, new), 1), torch.cat((mask, torch.ones_like(new)), 1)
    assert torch.equal(written, expected)


def test_a_program_runs_where_only_its_folder_is(decoder):
    """In a process of its own, its classes of caches found by their names."""
    folder, model = decoder
    ids = token_ids(1, 5)
    code = (
        "import sys, torch, sas_hf\n"
        "from transformers.exporters import ExportedModel\n"
        "from sas_hf.serve.programs import empty_cache\n"
        "program = ExportedModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = torch.tensor([[int(token) for token in sys.argv[2].split(',')]])\n"
        "places = torch.arange(ids.shape[1])[None]\n"
        "inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places)\n"
        f"output = program(**inputs, {CACHE_NAME}=empty_cache(program.config))\n"
        "print(output.logits[0, -1].argmax().item())\n"
    )
    tokens = ",".join(map(str, ids[0].tolist()))
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "program"), tokens],
        capture_output=True, text=True, env=python_environment(),
    )  # fmt: skip
    with torch.no_grad():
        assert done.stdout.split() == [str(model(ids).logits[0, -1].argmax().item())], done.stderr


def test_what_computes_something_else_is_not_kept(monkeypatch, tmp_path):
    """Half a fix: a mask left out where the example hides nothing is left out for all inputs."""
    made = sequence.create_bidirectional_mask

    def hides_nothing(*args, **kwargs):
        return None if torch.compiler.is_exporting() else made(*args, **kwargs)

    monkeypatch.setattr(sequence, "create_bidirectional_mask", hides_nothing)
    encoder("sas").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="computes something else: logits differs by .* It is not kept"):
        export_program(tmp_path / "model", tmp_path / "program", "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_written_is_refused(monkeypatch, tmp_path):
    seq2seq(model_class=SASSeq2SeqModel).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="SASSeq2SeqModel has no head, and its decoder writes nothing"):
        export_program(tmp_path / "model", tmp_path / "program", "torch")
    with pytest.raises(ValueError, match="`format` is 'onxx'; it must be one of onnx, openvino, executorch, torch"):
        export_program(tmp_path / "model", tmp_path / "program", "onxx")
    missing = FORMATS["torch"]._replace(packages=("no_such_runtime",))
    monkeypatch.setitem(FORMATS, "torch", missing)
    with pytest.raises(ImportError, match=r"needs no_such_runtime: pip install 'sas_hf\[torch\]'"):
        export_program(tmp_path / "model", tmp_path / "program", "torch")
    shown = command("export", tmp_path / "model", tmp_path / "program", "--format", "onxx")
    assert shown.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@torch.no_grad()
def test_onnx_runtime_alone_runs_a_program(tmp_path):
    """By the names that docs/serving.md gives, without torch or Transformers."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: make test-exporters")
    model = gpt("sas")
    model.save_pretrained(tmp_path / "model")
    export_program(tmp_path / "model", tmp_path / "program", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "program" / "model.onnx"))
    (ids, mask), held = left_padded(7, 4), {}
    for place in session.get_inputs():
        if "cache" in place.name:
            _, heads, _, width = place.shape
            held[place.name] = np.zeros((2, heads, 0, width), np.float32)
    assert set(held) == {f"input.cache.layers.{layer}.{what}" for layer in (0, 1) for what in ("keys", "values")}
    for seen in (5, 6, 7):
        now = slice(0 if seen == 5 else seen - 1, seen)
        positions = programs.positions_of(mask)[:, now]
        inputs = {"input_ids": ids[:, now], "attention_mask": mask[:, :seen], "position_ids": positions}
        names = [place.name for place in session.get_outputs()]
        output = dict(
            zip(names, session.run(None, {name: x.numpy() for name, x in inputs.items()} | held), strict=True)
        )
        held = {name: output[name.replace("input.", "output.")] for name in held}
    expected = model(ids, attention_mask=mask, position_ids=programs.positions_of(mask)).logits[:, -1]
    torch.testing.assert_close(torch.from_numpy(output["logits"][:, -1]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["mha", "efficient", "sas_k5_gqa", "mla_sas"])
@pytest.mark.parametrize("form", ["expanded", "base"])
@torch.no_grad()
def test_an_empty_cache_is_that_of_the_model(variant, form):
    config = gpt_config(variant, simulation_cache=form)
    model = SASGPTForCausalLM(config).eval()
    ids = token_ids(2, 5)
    plain, begun = model(ids), model(ids, **{CACHE_NAME: empty_cache(config, 2)})
    assert torch.equal(plain.logits, begun.logits)
    for layer, other in zip(plain[CACHE_NAME].layers, begun[CACHE_NAME].layers, strict=True):
        assert vars(layer).keys() == vars(other).keys()
        assert torch.equal(layer.keys, other.keys)
