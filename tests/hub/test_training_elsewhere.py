"""Exported code is trained where there is no sas_hf: by the stock Trainer and by TRL's trainers, as with sas_hf."""

from pathlib import Path

import pytest
import trl_steps
from answered_checkpoints import IMAGE_HEADS, TEXT_HEADS, save_checkpoint
from environments import report_of, run_script
from helpers import gpt, train_tokenizer

from sas_hf import SASGPTForSequenceClassification
from sas_hf.hub.export import export_model


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL and peft
TRAINED = """
import json, os, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer
from transformers import TrainingArguments

torch.set_num_threads(1)
language, reward_model, output = sys.argv[1:]
trust = {"trust_remote_code": True}
said = {"losses": {}, "modules": set()}
for kind in STEPS:
    folder = reward_model if kind == "reward" else language
    auto_class = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    live, tokenizer = auto_class.from_pretrained(folder, **trust), AutoTokenizer.from_pretrained(folder)
    trainer, first = step(kind, folder, os.path.join(output, kind), **trust)
    said["losses"][kind] = [first["loss"], first["grad_norm"]]
    said["modules"].add(type(trainer.model).__module__.partition(".")[0])
    for lora in (False, True):
        trainer, first = step(kind, live, os.path.join(output, kind), lora, tokenizer, **trust)
        said["losses"][f"{kind} live {lora}"] = [first["loss"], first["grad_norm"]]

model = AutoModelForCausalLM.from_pretrained(language, **trust).eval()
ids = torch.arange(3, 15).view(2, 6)
arguments = TrainingArguments(output, label_smoothing_factor=0.3, use_cpu=True, report_to=[])
with torch.no_grad():
    smoothed = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    surprise = -model(ids).logits[:, :-1].log_softmax(-1)
expected = 0.7 * surprise.gather(-1, ids[:, 1:, None]).mean() + 0.3 * surprise.mean()
said["smoothed"] = [smoothed.item(), expected.item()]
said["modules"] = sorted(said["modules"])
said["sas_hf"] = "sas_hf" in sys.modules
print()
print(json.dumps(said))
"""
TRAINER = Path(trl_steps.__file__).read_text() + TRAINED
SAVED = """
import json, sys
from pathlib import Path
import transformers

output, files = Path(sys.argv[1]), {}
for export in map(Path, sys.argv[2:]):
    for name in sorted(json.loads((export / "config.json").read_text())["auto_map"], reverse=True):
        if name != "AutoConfig":
            folder = output / export.name / name
            getattr(transformers, name).from_pretrained(export, trust_remote_code=True).save_pretrained(folder)
            again = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
            files[type(again).__name__] = sorted(file.name for file in folder.glob("*.py"))
print()
print(json.dumps(files))
"""


@pytest.fixture
def exports(tmp_path):
    save_checkpoint("sas_k5_gqa", tmp_path / "language")
    model = gpt("sas", SASGPTForSequenceClassification, vocab_size=400, pad_token_id=0, eos_token_id=1, num_labels=1)
    model.save_pretrained(tmp_path / "reward")
    train_tokenizer().save_pretrained(tmp_path / "reward")
    for name in ("language", "reward"):
        export_model(tmp_path / name, tmp_path / f"{name}-export")
    return [tmp_path / f"{name}-export" for name in ("language", "reward")]


def test_the_trainers_train_it_as_with_sas_hf(exports, python_without, tmp_path, tolerate_deprecations):
    home = tmp_path / "home"
    home.mkdir()
    run = run_script(python_without, TRAINER, *exports, home / "runs", home=home, HF_HUB_DISABLE_TELEMETRY="1")
    said = report_of(run)
    assert said["modules"] == ["transformers_modules"] and not said["sas_hf"]
    smoothed, expected = said["smoothed"]
    assert smoothed == pytest.approx(expected, rel=1e-5), "the labels are shifted"
    assert all(norm > 1e-3 for _, norm in said["losses"].values())
    for kind, folder in (("sft", exports[0]), ("reward", exports[1])):
        _, first = trl_steps.step(kind, str(folder), str(tmp_path / kind))
        assert said["losses"][kind] == pytest.approx([first["loss"], first["grad_norm"]], rel=1e-4)


def test_whatever_is_loaded_first_all_that_is_saved_holds_its_code(python_without, tmp_path):
    """Transformers itself marks a class as one whose code is saved only if it had not met it: here, the base model."""
    exports = [tmp_path / "gpt", tmp_path / "vit"]
    for export in exports:
        save_checkpoint(f"{export.name}-AutoModel", tmp_path / f"{export.name}-model")
        export_model(tmp_path / f"{export.name}-model", export)
    saved = report_of(run_script(python_without, SAVED, tmp_path / "saved", *exports, home=tmp_path))
    assert saved.keys() == {head.__name__ for head in (*TEXT_HEADS.values(), *IMAGE_HEADS.values())}
    code = {export.name: {file.name for file in export.glob("*.py")} for export in exports}
    for name, files in saved.items():
        assert set(files) == code[name[3:6].lower()] - {"image_processing_sas_vit.py"}, name
