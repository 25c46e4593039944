"""`evaluate`: what it returns and writes, that it needs no network and leaves no traces, and its early errors."""

import importlib
import io
import json
import random
import shutil
import socket
import sys
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import rich.console
import torch
import transformers
from transformers import AutoModel

import sas_hf.eval.evaluation
import sas_hf.report.files
from sas_hf import SASGPTConfig, SASGPTForCausalLM
from sas_hf.eval import Report, evaluate


def responses(result):
    return {name: [sample["responses"] for sample in task.samples] for name, task in result.tasks.items()}


def test_result_and_output(checkpoint, config, data, tmp_path):
    output = tmp_path / "new" / "result.json"
    result = evaluate(
        str(checkpoint), ["arc_easy", "sas_continuation"], data=data, limit=5, output=output, device="cpu"
    )

    saved = json.loads(output.read_text())
    assert saved == result.to_dict()
    assert [path.name for path in output.parent.iterdir()] == ["result.json"]
    assert saved["model"] == str(checkpoint)
    assert saved["num_parameters"] == SASGPTForCausalLM(config).num_parameters()
    assert (saved["limit"], saved["dtype"], saved["device"]) == (5, "float32", "cpu")
    assert saved["batch_size"]["requested"] == "auto"
    assert 1 < saved["batch_size"]["smallest"] <= saved["batch_size"]["largest"]
    assert saved["seconds"] > 0
    assert saved["versions"] == {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "sas_hf": sas_hf.__version__,
    }
    assert list(saved["tasks"]) == ["arc_easy", "sas_continuation"]
    task = saved["tasks"]["arc_easy"]
    assert (task["num_samples"], task["num_available"]) == (5, 8)
    assert (task["split"], task["num_fewshot"], task["version"]) == ("validation", 0, 1.0)
    assert task["data"] == str(data / "allenai" / "ai2_arc" / "ARC-Easy" / "validation.parquet")
    assert task["samples"] is None
    for score in task["metrics"].values():
        assert 0 <= score["value"] <= 1 and 0 <= score["stderr"] <= 1

    console = rich.console.Console(width=120, file=io.StringIO())
    console.print(Report([result]).rich())
    table = console.file.getvalue()
    for shown in ("arc_easy", "acc_norm", f"{task['metrics']['acc']['value']:.4f}", "float32 on cpu", "validation"):
        assert shown in table


def test_samples_explain_the_metric(checkpoint, data):
    result = evaluate(checkpoint, "arc_easy", data=data, log_samples=True, device="cpu")
    task = result.tasks["arc_easy"]
    assert len(task.samples) == 8
    for sample in task.samples:
        values = [log_likelihood for log_likelihood, _ in sample["responses"]]
        assert all(value < 0 for value in values)
        assert sample["acc"] == float(np.argmax(values) == int(sample["target"]))
    assert task.metrics["acc"].value == pytest.approx(np.mean([sample["acc"] for sample in task.samples]))
    assert json.loads(json.dumps(result.to_dict()))["tasks"]["arc_easy"]["samples"][0]["doc_id"] == 0


def test_a_single_sample_has_no_standard_error(checkpoint, data):
    result = evaluate(checkpoint, "arc_easy", data=data, limit=1, device="cpu")
    assert result.tasks["arc_easy"].metrics["acc"].stderr is None
    assert "| arc_easy | acc |" in Report([result]).markdown()


def test_a_live_model_scores_as_its_checkpoint(checkpoint, model, tokenizer, data):
    expected = evaluate(checkpoint, "arc_easy", data=data, log_samples=True, device="cpu")
    live = evaluate(model, "arc_easy", data=data, tokenizer=tokenizer, log_samples=True)
    found = evaluate(model, "arc_easy", data=data, log_samples=True)  # the tokenizer lies where the model came from
    assert responses(live) == responses(found) == responses(expected)
    assert live.model == "SASGPTForCausalLM"


def test_a_live_model_is_left_as_found(model, tokenizer, data):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    padding = tokenizer.pad_token
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate(model, "arc_easy", data=data, tokenizer=tokenizer, limit=2)
    assert [module.training for module in model.modules()] == modes
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert tokenizer.pad_token == padding


def test_dtype(checkpoint, data):
    result = evaluate(checkpoint, "arc_easy", data=data, dtype="bfloat16", limit=1, device="cpu")
    assert result.dtype == "bfloat16"


def test_asks_no_server(checkpoint, model, tokenizer, data, monkeypatch):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # set for all tests; here one might ask
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(checkpoint.parent)
    evaluate(checkpoint.name, ["arc_easy", "sas_continuation"], data=data, limit=1, device="cpu")
    evaluate(model, "arc_easy", data=data, tokenizer=tokenizer, limit=1)
    assert asked == []


def test_a_failed_write_leaves_the_old_file(checkpoint, data, tmp_path, monkeypatch):
    output = tmp_path / "out" / "result.json"
    result = evaluate(checkpoint, "arc_easy", data=data, limit=1, output=output, device="cpu")
    old = output.read_text()

    def fail(*args):
        raise OSError("disk gone")

    monkeypatch.setattr(sas_hf.report.files.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        result.save(output)
    assert [path.name for path in output.parent.iterdir()] == ["result.json"]
    assert output.read_text() == old


def test_nan_is_not_taken_for_an_answer(model, tokenizer, data, tmp_path):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"log-likelihoods of task 'arc_easy' are not numbers"):
        evaluate(model, "arc_easy", data=data, tokenizer=tokenizer, output=tmp_path / "result.json")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    "missing, error, message",
    [
        (["model.safetensors"], FileNotFoundError, r"without weights \(model.safetensors"),
        (["config.json"], FileNotFoundError, r"without configuration \(config.json"),
        (["tokenizer.json", "tokenizer_config.json"], ValueError, "no tokenizer in .*`tokenizer`"),
    ],
)
def test_incomplete_checkpoints(missing, error, message, checkpoint, data, tmp_path, never_loaded):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(error, match=message):
        evaluate(folder, "arc_easy", data=data)


def test_missing_checkpoints(data, tmp_path, never_loaded):
    for model in (tmp_path / "nowhere", "./nowhere", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="`model`: .* does not exist"):
            evaluate(model, "arc_easy", data=data)


def test_a_name_that_is_neither_folder_nor_on_the_hub(data, never_loaded):
    with pytest.raises(OSError, match="`model`: smolm2 is no folder here, nor a checkpoint that the Hub gives"):
        evaluate("smolm2", "arc_easy", data=data)


def test_unusable_models(checkpoint, config, tokenizer, data, tmp_path, never_loaded):
    with pytest.raises(ValueError, match="SASGPTModel, which has no language model head"):
        evaluate(AutoModel.from_pretrained(checkpoint), "arc_easy", data=data, tokenizer=tokenizer)
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    SASGPTConfig(**config.to_diff_dict() | {"is_causal": False}).save_pretrained(folder)
    with pytest.raises(ValueError, match="is_causal=False"):
        evaluate(folder, "arc_easy", data=data)


def test_unusable_tokenizers(config, model, tokenizer, data, never_loaded):
    fresh = SASGPTForCausalLM(config)
    with pytest.raises(ValueError, match="no tokenizer in ''"):
        evaluate(fresh, "arc_easy", data=data)
    with pytest.raises(FileNotFoundError, match="`tokenizer`: /no/such does not exist"):
        evaluate(fresh, "arc_easy", data=data, tokenizer="/no/such")
    without_end = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="neither `bos_token` nor `eos_token`"):
        evaluate(fresh, "arc_easy", data=data, tokenizer=without_end)
    small = SASGPTForCausalLM(SASGPTConfig(**config.to_diff_dict() | {"vocab_size": 64}))
    with pytest.raises(ValueError, match="has 384 tokens, but `vocab_size` of the model is 64"):
        evaluate(small, "arc_easy", data=data, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"limit": 0}, "`limit` is 0"),
        ({"limit": 1.5}, "`limit` is 1.5"),
        ({"num_fewshot": -1}, "`num_fewshot` is -1"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"batch_size": "large"}, "`batch_size` is 'large'"),
        ({"dtype": "float33"}, "`dtype` is 'float33'"),
        ({"device": "gpu"}, "`device` is 'gpu'"),
        ({"data": None, "tasks": "sas_continuation"}, "make_continuation_task"),
    ],
)
def test_unusable_arguments(arguments, message, checkpoint, data, never_loaded):
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, **{"tasks": "arc_easy", "data": data} | arguments)


def test_arguments_that_a_live_model_cannot_follow(model, data, tmp_path, never_loaded):
    for arguments in ({"device": "cpu"}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="live model"):
            evaluate(model, "arc_easy", data=data, **arguments)
    with pytest.raises(ValueError, match=r"`output` is .*a folder"):
        evaluate(model, "arc_easy", data=data, output=tmp_path)


def test_places_that_cannot_be_written_are_known_first(checkpoint, data, tmp_path, never_loaded):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"`cache` is .*no file can be written into .*file"):
        evaluate(checkpoint, "arc_easy", data=data, cache=tmp_path / "file" / "cache")
    with pytest.raises(OSError, match=r"`output` is .*no file can be written into .*file"):
        evaluate(checkpoint, "arc_easy", data=data, output=tmp_path / "file" / "out" / "result.json")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that nobody, not even root, may write into")
def test_a_folder_that_is_there_may_be_read_only(checkpoint, data, never_loaded):
    with pytest.raises(OSError, match=r"`cache` is '/proc', but no file can be written into /proc"):
        evaluate(checkpoint, "arc_easy", data=data, cache="/proc")


def test_data_errors_come_before_the_model(checkpoint, data, never_loaded):
    with pytest.raises(FileNotFoundError, match="piqa"):
        evaluate(checkpoint, "piqa", data=data)


def test_without_the_harness_the_import_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("sas_hf.eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install sas_hf\[eval\]"):
        importlib.import_module("sas_hf.eval")
