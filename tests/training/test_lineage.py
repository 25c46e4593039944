"""What a run leaves loads again as documented, and says what it was made from."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import USE_CPU, python_environment, real_text, train_tokenizer
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from sas_hf import SASGPTForCausalLM
from sas_hf.conversion import ConversionError, convert_checkpoint, restore_checkpoint
from sas_hf.hub.export import export_model
from sas_hf.training.data import training_data
from sas_hf.training.recipe import recipe_from_dict
from sas_hf.training.run import train


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
LORA = {"r": 2, "target_modules": ["q_proj", "expansion"], "modules_to_save": ["residual"]}
PLAIN_LORA = {"r": 2, "target_modules": ["q_proj"]}
EOT_TEMPLATE = "{% for m in messages %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endfor %}"
CARD = "---\nlicense: mit\nlanguage: en\nbase_model: someone/llama\n---\n\n# A llama\n\nIts benchmarks: 99 %.\n"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text("\n\n".join(real_text()[:60]))
    (folder / "held.txt").write_text("\n\n".join(real_text()[100:120]))
    rows = [
        {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text[:9]}]}
        for text in real_text()[:8]
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.jinja").write_text(EOT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folder of a small Llama with tokenizer and card."""
    folder = tmp_path_factory.mktemp("llama") / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=400, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def conversion(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversion") / "llama-sas"
    convert_checkpoint(llama, folder, windows=2, window_length=32)
    return folder


def recipe_of(texts, output, model, **changes):
    fields = {
        "model": model,
        "data": {
            "train": str(texts / "train.txt"),
            "validation": str(texts / "held.txt"),
            "sequence_length": 32,
            "max_validation_sequences": 8,
            "cache": str(texts / "cache"),
        },
        "training": {"max_steps": 2, "learning_rate": 1e-2, "use_cpu": USE_CPU, "output_dir": str(output)},
    }
    for name, value in changes.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    return recipe_from_dict(fields)


LOSS = """
import sys, torch
import sas_hf
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = {"adapters": AutoPeftModelForCausalLM, "model": AutoModelForCausalLM}[sys.argv[1]].from_pretrained(sys.argv[2])
rows = Dataset.load_from_disk(sys.argv[3]).with_format("torch")
with torch.no_grad():
    print("loss", model.eval()(**rows[:]).loss.item())
"""


def loss_in_a_fresh_process(kind: str, folder: Path, recipe, tmp_path) -> float:
    """Validation loss of what lies in the folder, loaded elsewhere as the documentation says."""
    training_data(recipe.data, train_tokenizer(), 42).validation.save_to_disk(tmp_path / "rows")
    command = [sys.executable, "-c", LOSS, kind, str(folder), str(tmp_path / "rows")]
    result = subprocess.run(command, env=python_environment(), cwd="/", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return float(result.stdout.split("loss ")[1])


NEW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8}
NEW |= {"num_simulated_heads": 12, "simulated_head_dim": 12, "vocab_size": 400, "max_position_embeddings": 64}
NEW |= {"num_key_value_heads": 4}
STARTS = {
    "conversion": {"checkpoint": "llama", "conversion": {"perturbation": 0.3}, "lora": LORA},
    "conversion and overrides": {
        "checkpoint": "llama",
        "conversion": {},
        "overrides": {"rms_norm_eps": 0.1},
        "lora": LORA,
    },
    "overrides": {"checkpoint": "llama", "overrides": {"rms_norm_eps": 0.1}, "lora": PLAIN_LORA},
    "new": {"config": "sas-125m", "overrides": NEW, "tokenizer": "llama", "lora": LORA},
    "relative path": {"checkpoint": "llama", "lora": PLAIN_LORA},
    "whole conversion": {"checkpoint": "llama", "conversion": {}},
}


@pytest.mark.parametrize("start", STARTS)
def test_a_run_loads_in_a_fresh_process_elsewhere(start, llama, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(llama.parent)  # so that "llama" is a path
    model = STARTS[start]
    out = tmp_path / "out"
    recipe = recipe_of(texts, out, model)
    metrics = train(recipe)
    kind = "adapters" if "lora" in model else "model"
    assert loss_in_a_fresh_process(kind, out, recipe, tmp_path) == pytest.approx(metrics["eval_loss"], abs=1e-5)
    assert (out / "base").is_dir() == (start != "relative path")
    assert train(recipe) == metrics


def test_adapters_end_where_they_were_trained_to(llama, texts, tmp_path):
    """The source's configuration ends at Llama's token 2, the tokenizer at 1: a base of the run's own ends there, too;
    of another there is a warning, and the run's configuration beside the adapters."""
    own, plain = tmp_path / "own", tmp_path / "plain"
    train(recipe_of(texts, own, {"checkpoint": str(llama), "conversion": {}, "lora": PLAIN_LORA}))
    assert AutoPeftModelForCausalLM.from_pretrained(own).generation_config.eos_token_id == [1, 2]
    with pytest.warns(UserWarning, match="which does not end at '<eot>'; set the loaded model's `generation_config`"):
        train(recipe_of(texts, plain, {"checkpoint": str(llama), "lora": PLAIN_LORA}))
    assert GenerationConfig.from_pretrained(plain).eos_token_id == [1, 2]
    export_model(own, tmp_path / "exported")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").generation_config.eos_token_id == [1, 2]


def test_adapters_and_their_base_are_exported_as_one_model(llama, texts, tmp_path):
    out, exported = tmp_path / "out", tmp_path / "exported"
    recipe = recipe_of(texts, out, {"checkpoint": str(llama), "conversion": {}, "lora": LORA})
    train(recipe)
    export_model(out, exported)
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected = AutoPeftModelForCausalLM.from_pretrained(out).eval()(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(exported).eval()(tokens).logits
        untrained = AutoModelForCausalLM.from_pretrained(out / "base").eval()(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (untrained - expected).abs().max() > 1e-3
    card = ModelCard.load(exported / "README.md")
    data = card.data
    assert (data.library_name, data.license, data.base_model) == ("transformers", "mit", "someone/llama")
    assert data.get("base_model_relation") != "adapter" and "AutoPeft" not in card.text
    assert json.loads((exported / "fidelity.json").read_text())["trained_since"][0]["trained"] == "LoRA"
    with pytest.raises(FileNotFoundError, match="holds adapters, and no model of its own; `sas-hf export"):
        restore_checkpoint(out, tmp_path / "restored")
    (out / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="`base_model_name_or_path` in .* where no model is; if it has moved"):
        export_model(out, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_conversion_in_a_recipe_is_verified_and_kept(llama, texts, tmp_path):
    out = tmp_path / "out"
    recipe = recipe_of(texts, out, {"checkpoint": str(llama), "conversion": {"perturbation": 0.3}})
    train(recipe)
    report = json.loads((out / "base" / "fidelity.json").read_text())
    assert report["fidelity"]["exact"] and report["options"]["perturbation"] == 0.3
    (out / "all_results.json").unlink()
    (out / "base").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="base is gone, from which the run in .* started"):
        train(recipe)


def test_what_is_refused_after_the_conversion_leaves_nothing(llama, texts, tmp_path):
    model = {"checkpoint": str(llama), "conversion": {}, "lora": {"target_modules": ["q_prj"]}}
    with pytest.raises(ValueError, match="`model.lora.target_modules` names 'q_prj'"):
        train(recipe_of(texts, tmp_path / "out", model))
    assert not (tmp_path / "out").exists()


def card_of(folder) -> ModelCard:
    card = ModelCard.load(folder / "README.md")
    for word in ("None", "More Information Needed", "99 %"):
        assert word not in card.content
    assert (card.data.license, card.data.language, card.data.base_model) == ("mit", "en", "someone/llama")
    return card


TASKS = {
    "fine-tuning": ({}, {}),
    "chat": ({"chat_template": "of the texts"}, {"task": "chat"}),
    "LoRA": ({"lora": LORA}, {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_lineage_goes_on_and_says_that_the_model_was_trained(task, conversion, texts, tmp_path):
    out, (model, changes) = tmp_path / "tuned", TASKS[task]
    if task == "chat":
        changes = changes | {"data": {"train": str(texts / "chats.jsonl"), "validation": None, "sequence_length": 64}}
        model = {"chat_template": str(texts / "chat.jinja")}
    train(recipe_of(texts, out, {"checkpoint": str(conversion)} | model, **changes))
    before = json.loads((conversion / "fidelity.json").read_text())
    for folder in (out, out / "checkpoint-2"):
        report = json.loads((folder / "fidelity.json").read_text())
        (entry,) = report.pop("trained_since")
        assert report == before
        assert (entry["steps"], entry["started_from"]) == (2, str(conversion))
        card = card_of(folder)
        assert card.text.strip().startswith("# tuned\n")
        assert (
            "2 steps" in card.text
            and "the fidelity below is the conversion's, from before it was trained" in card.text
        )
        assert "## Fidelity" in card.text and str(conversion) in card.text
    assert (card.data.library_name == "peft") == ("lora" in model)


def test_a_chain_of_trainings_is_told_in_full_and_restored_while_its_simulation_is_not_trained(
    conversion, llama, texts, tmp_path
):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    train(recipe_of(texts, first, {"checkpoint": str(conversion), "trainable": ["mlp"]}))
    train(recipe_of(texts, second, {"checkpoint": str(first), "trainable": ["norm"]}))
    report = json.loads((second / "fidelity.json").read_text())
    told = [(entry["trained"], entry["started_from"]) for entry in report["trained_since"]]
    assert told == [("parameters matching mlp", str(conversion)), ("parameters matching norm", str(first))]
    restore_checkpoint(second, tmp_path / "restored", windows=2, window_length=32)
    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(tmp_path / "restored").eval()(tokens).logits
        expected = SASGPTForCausalLM.from_pretrained(second).eval()(tokens).logits
        source = LlamaForCausalLM.from_pretrained(llama).eval()(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - source).abs().max() > 1e-2
    train(recipe_of(texts, third, {"checkpoint": str(second)}))
    with pytest.raises(ConversionError, match="The simulation of .*third has been trained"):
        restore_checkpoint(third, tmp_path / "again", windows=2, window_length=32)
    export_model(third, tmp_path / "exported")
    card_of(tmp_path / "exported")
    assert len(json.loads((tmp_path / "exported" / "fidelity.json").read_text())["trained_since"]) == 3


def test_the_card_of_a_model_that_was_never_converted(llama, texts, tmp_path):
    train(recipe_of(texts, tmp_path / "tuned", {"checkpoint": str(llama)}))
    text = card_of(tmp_path / "tuned").text
    assert "sas_hf  #" not in text and "Fidelity" not in text and "AutoModelForCausalLM" in text
    assert not (tmp_path / "tuned" / "fidelity.json").exists()
    model = {"config": "sas-125m", "overrides": NEW, "tokenizer": str(llama)}
    train(recipe_of(texts, tmp_path / "new", model))
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert "None" not in card.content
    assert card.data.license is None and card.data.base_model is None  # never made up


def test_a_damaged_report_or_card_is_refused_before_training(conversion, texts, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(conversion, start)
    (start / "fidelity.json").write_text("{")
    with pytest.raises(ValueError, match="fidelity.json is no JSON .*; mend or remove it"):
        train(recipe_of(texts, tmp_path / "out", {"checkpoint": str(start)}))
    assert not (tmp_path / "out").exists()
    shutil.copyfile(conversion / "fidelity.json", start / "fidelity.json")
    (start / "README.md").write_text("---\n[\n---\n")
    with pytest.raises(ValueError, match="has metadata that cannot be read"):
        train(recipe_of(texts, tmp_path / "out", {"checkpoint": str(start)}))


def test_the_best_models_numbers_lie_beside_the_best_model(llama, texts, tmp_path):
    """A rate that grows until the model is worse than before; the folder is moved between two starts, too."""
    out = tmp_path / "out"
    best = {
        "max_steps": 6,
        "learning_rate": 5.0,
        "warmup_steps": 60,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "load_best_model_at_end": True,
    }
    recipe = recipe_of(texts, out, {"checkpoint": str(llama)}, training=best)
    metrics = train(recipe)
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    evaluated = {line["step"]: line["eval_loss"] for line in logged if "eval_loss" in line}
    step = min(evaluated, key=evaluated.get)
    assert list(evaluated) == [2, 4, 6] and step < 6
    assert (metrics["step"], metrics["eval_loss"]) == (step, evaluated[step])
    assert metrics["perplexity"] == pytest.approx(math.exp(evaluated[step]))
    assert metrics["loss"] == next(line["loss"] for line in logged if line["step"] == step and "loss" in line)
    assert json.loads((out / "all_results.json").read_text()) == metrics
    assert loss_in_a_fresh_process("model", out, recipe, tmp_path) == pytest.approx(metrics["eval_loss"], abs=1e-4)
    assert f"{step} steps" in (out / "README.md").read_text()
    # As if it had been killed at the end, in a folder that was moved since.
    moved = tmp_path / "moved"
    (out / "all_results.json").unlink()
    out.rename(moved)
    assert train(recipe_of(texts, moved, {"checkpoint": str(llama)}, training=best)) == metrics
    (moved / "all_results.json").unlink()
    (moved / f"checkpoint-{step}").rename(tmp_path / "gone")
    with pytest.raises(
        FileNotFoundError, match=f"`load_best_model_at_end`: .*checkpoint-{step} is gone, the best mod"
    ):
        train(recipe_of(texts, moved, {"checkpoint": str(llama)}, training=best))
    assert not (moved / "all_results.json").exists()
