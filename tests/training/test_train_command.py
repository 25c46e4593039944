"""`sas-hf train` on small models: what a run leaves, a kill that costs nothing, refusals before a model is built."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import USE_CPU, assert_identical, python_environment, train_tokenizer
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sas_hf import SASGPTForCausalLM
from sas_hf.configurations import named_config
from sas_hf.conversion import ConversionOptions, convert_model
from sas_hf.data.text import python_reference
from sas_hf.training.recipe import load_recipe, recipe_from_dict
from sas_hf.training.reporting import TrainingLog
from sas_hf.training.run import train


TINY = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_simulated_heads": 12,
    "simulated_head_dim": 12,
    "max_position_embeddings": 64,
    "hidden_dropout": 0.1,  # makes the run depend on the random state
    "bos_token_id": 0,
    "eos_token_id": 0,
}
STEPS, SAVE_EVERY = 36, 6


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    """A recipe without its output folder."""
    return {
        "model": {"config": "sas-125m", "tokenizer": "python-reference", "overrides": TINY},
        "data": {
            "train": "python-reference",
            "validation_documents": 4,
            "max_validation_sequences": 16,
            "sequence_length": 64,
            "cache": str(tmp_path_factory.mktemp("cache")),
        },
        "batch_size": 8,
        "simulation_learning_rate": 1e-2,
        "minimum_learning_rate": 1e-4,
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "warmup_steps": 5,
            "weight_decay": 0.1,
            "logging_steps": SAVE_EVERY,
            "save_steps": SAVE_EVERY,
            "eval_strategy": "steps",
            "eval_steps": 15,
            "use_cpu": USE_CPU,
        },
    }


@pytest.fixture(scope="module")
def file(fields, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def command(file, folder, *changes):
    return [sys.executable, "-m", "sas_hf", "train", str(file), f"training.output_dir={folder}", *changes]


def run(file, folder, *changes):
    return subprocess.run(command(file, folder, *changes), env=python_environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """The folder of a run that nothing interrupts, and what the terminal showed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = run(file, folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def weights(folder):
    return load_file(folder / "model.safetensors")


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_a_run_leaves_model_recipe_log_and_curves(whole, file):
    folder, shown = whole
    names = {path.name for path in folder.iterdir()}
    expected = {"recipe.yaml", "log.jsonl", "loss.png", "model.safetensors", "config.json", "tokenizer.json"}
    assert expected <= names and f"checkpoint-{STEPS}" in names and not [name for name in names if name[0] == "."]
    assert load_recipe(folder / "recipe.yaml") == load_recipe(file, [f"training.output_dir={folder}"])
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in logged if "eval_loss" in line]
    assert [line["step"] for line in logged if "eval_loss" in line] == [15, 30, 36]
    assert losses == sorted(losses, reverse=True) and losses[0] < math.log(2048) - 0.5
    found = results(folder)
    assert (found["step"], found["eval_loss"]) == (STEPS, losses[-1])
    assert found["perplexity"] == pytest.approx(math.exp(losses[-1]))
    assert "eval_loss" in shown and "Saved" in shown
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, SASGPTForCausalLM) and model.config.num_simulated_heads == 12
    assert tokenizer.decode(tokenizer("The with statement").input_ids) == "The with statement"


@pytest.mark.parametrize("told", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_anywhere_the_same_command_ends_with_the_same_weights(told, whole, file, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(file, folder), env=python_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (folder / f"checkpoint-{2 * SAVE_EVERY}").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(BlockingIOError, match=rf"{folder}', where process {process.pid} on .* is at work"):
        train(load_recipe(file, [f"training.output_dir={folder}"]))
    os.kill(process.pid, told)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate()
    if told == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == (130 if told == signal.SIGINT else 1)
        assert "the same command goes on from there" in errors and "Traceback" not in errors
    assert not (folder / "all_results.json").exists() and not (folder / "model.safetensors").exists()
    result = run(file, folder)
    assert result.returncode == 0, result.stderr
    assert_identical(weights(folder), weights(whole[0]))
    assert results(folder) == results(whole[0])


def test_a_run_that_has_ended_is_not_trained_again(whole, file):
    folder, _ = whole
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert train(load_recipe(file, [f"training.output_dir={folder}"])) == results(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_the_folder_of_another_run(whole, file):
    folder, _ = whole
    changes = [f"training.output_dir={folder}", "training.learning_rate=1e-3", "model.overrides.head_dim=16"]
    with pytest.raises(FileExistsError, match="another recipe") as error:
        train(load_recipe(file, changes))
    assert "training.learning_rate: 0.003 there, 0.001 now" in str(error.value)
    assert "model.overrides.head_dim: 8 there, 16 now" in str(error.value)
    assert "max_steps" not in str(error.value)


def test_data_that_changed_under_its_name(fields, tmp_path):
    """A run goes on with the data it began with, or not at all."""
    text = python_reference()
    files = {name: tmp_path / f"{name}.txt" for name in ("train-1", "train-2", "validation")}
    for number, path in enumerate(files.values()):
        path.write_text(text[30_000 * number : 30_000 * (number + 1)])
    data = {
        "train": str(tmp_path / "train-*.txt"),
        "validation": str(files["validation"]),
        "validation_documents": None,
    }
    training = {"max_steps": 2, "save_steps": 1, "output_dir": str(tmp_path / "run")}
    recipe = recipe_from_dict(fields | {"data": fields["data"] | data, "training": fields["training"] | training})

    found = train(recipe)
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert kept["train"].startswith("2 files of 60,") and kept["validation"].startswith("1 file of 30,")
    assert train(recipe) == found
    with files["validation"].open("r+") as file:
        file.write("X")
    with pytest.raises(FileExistsError, match=r"other data in the files of these names \(validation: '1 file"):
        train(recipe)
    (tmp_path / "run" / "data.json").unlink()  # a run of an older version has none
    assert train(recipe) == found


def test_a_signal_that_comes_too_late_for_a_run_is_passed_on_after_it(file, tmp_path, monkeypatch):
    """Who trains several runs is told to end by it; this run is whole."""
    heard = []
    monkeypatch.setattr(TrainingLog, "on_train_end", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(
        signal.SIGTERM, lambda number, frame: heard.append((tmp_path / "run/all_results.json").is_file())
    )
    try:
        train(load_recipe(file, [f"training.output_dir={tmp_path / 'run'}", "training.max_steps=2"]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [True]


def test_the_folder_of_a_run_that_is_older_than_a_field(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    fields = yaml.safe_load(recipe.read_text())
    del fields["data"]["shuffle_buffer"]
    recipe.write_text(yaml.safe_dump(fields))
    again = load_recipe(folder / "recipe.yaml", [f"training.output_dir={tmp_path / 'run'}"])
    assert train(again) == train(load_recipe(folder / "recipe.yaml"))


def test_a_folder_that_holds_something_else(file, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds no run; name a free folder"):
        train(load_recipe(file, [f"training.output_dir={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def no_model(monkeypatch):
    """Whoever builds a model fails the test, unless it is one without weights, to be counted."""
    build = SASGPTForCausalLM.__init__

    def refuse(self, *args, **kwargs):
        if torch.get_default_device().type != "meta":
            raise AssertionError("a model was built")
        build(self, *args, **kwargs)

    monkeypatch.setattr(SASGPTForCausalLM, "__init__", refuse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.sequence_length=65", "`data.sequence_length` is 65, but the model's `max_position_embeddings` is 64"),
        ("model.overrides.vocab_size=2047", "The tokenizer has 2,048 tokens, but the model's `vocab_size` is 2,047"),
        ("model.overrides.num_simulated_head=3", "no field of the model; did you mean .*num_simulated_heads`"),
        ("model.overrides.num_simulated_heads=3", r"`num_simulated_heads` .3. must be a multiple"),
        ("model.config=sas-124m", "no configuration named 'sas-124m'.*sas-125m"),
        ("model.config=mnist-sas", "no causal language model"),
        ("model.tokenizer=./nowhere", "`model.tokenizer` is './nowhere'"),
        (
            "model.overrides.eos_token_id=5",
            "`model.overrides.eos_token_id` is 5, but the tokenizer .* with 0",
        ),
        (
            "model.overrides.bos_token_id=5",
            "`model.overrides.bos_token_id` is 5, but the tokenizer .* with 0",
        ),
        ("data.validation=python-reference data.validation_documents=null", "which is what is trained on"),
        ("data.train=./nowhere.txt", "nowhere.txt, which does not exist"),
        ("data.train={parquet}", "`data.text_column` is 'text', which .* does not have.*'texts'"),
        ("model.lora={rank: 4, target_modules: [q_proj]}", "`model.lora` has no field 'rank'"),
        ("evaluation.tasks=[sas_table]", "no task 'sas_table'.*sas_table1"),
        (
            "evaluation={tasks: [sas_table1], data: ./nowhere}",
            "`evaluation.data` is './nowhere': there is no such folder",
        ),
        ("training.eval_strategy=stpes", "stpes"),
    ],
)
def test_refused_before_a_model_is_built(change, message, fields, no_model, tmp_path):
    Dataset.from_dict({"texts": ["one"]}).to_parquet(tmp_path / "words.parquet")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    folder = tmp_path / "run"
    with pytest.raises((ValueError, OSError), match=message):
        change = change.replace("{parquet}", str(tmp_path / "words.parquet"))
        changes = change.split() if change.startswith("data.validation=") else [change]
        train(load_recipe(path, [f"training.output_dir={folder}", *changes]))
    assert not folder.exists()


def test_the_tripwire_of_the_refusals(fields, no_model, tmp_path):
    recipe = recipe_from_dict(fields | {"training": fields["training"] | {"output_dir": str(tmp_path / "run")}})
    with pytest.raises(AssertionError, match="a model was built"):
        train(recipe)


def test_a_run_without_a_checkpoint_is_not_in_the_way(fields, no_model, tmp_path):
    """A mistake that shows at once leaves nothing that refuses the corrected recipe; a checkpoint does."""
    training = fields["training"] | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "run").mkdir()
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"training": training | {"max_steps": 3}}))
    with pytest.raises(AssertionError, match="a model was built"):
        train(recipe_from_dict(fields | {"training": training}))
    recipe.write_text(yaml.safe_dump({"training": training | {"max_steps": 3}}))  # which went with the mistake
    (tmp_path / "run" / "checkpoint-1").mkdir()
    with pytest.raises(FileExistsError, match="holds the run of another recipe .*training.max_steps: 3 there"):
        train(recipe_from_dict(fields | {"training": training}))


def test_a_new_model_begins_and_ends_texts_as_its_tokenizer(fields, tmp_path):
    """Whatever the named configuration says (GPT-2's 50,256)."""
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    overrides = {name: value for name, value in TINY.items() if not name.endswith("token_id")} | {"vocab_size": 400}
    model = {"config": "sas-125m", "tokenizer": str(tmp_path / "tokenizer"), "overrides": overrides}
    training = fields["training"] | {"output_dir": str(tmp_path / "run"), "max_steps": 1, "eval_strategy": "no"}
    train(recipe_from_dict(fields | {"model": model, "training": training}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for settings in (loaded.config, loaded.generation_config):
        found = settings.bos_token_id, settings.eos_token_id, settings.pad_token_id
        assert found == (tokenizer.eos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1, 0)


def test_an_error_is_one_line(file, tmp_path):
    result = run(file, tmp_path / "run", "training.max_stpes=3")
    assert result.returncode == 1
    assert (
        result.stderr.startswith("error: ValueError: `training.max_stpes` is no field")
        and "Trace" not in result.stderr
    )


def checkpoint(folder, fields):
    tokenizer = train_tokenizer()
    SASGPTForCausalLM(named_config("sas-125m", **fields["model"]["overrides"] | {"vocab_size": 400})).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
@pytest.mark.parametrize("model", [{"lora": {"r": 2, "target_modules": ["q_proj"]}}, {"trainable": ["_simulation."]}])
def test_fine_tuning_a_checkpoint_changes_what_it_should(model, fields, tmp_path):
    source = checkpoint(tmp_path / "source", fields)
    training = fields["training"] | {"output_dir": str(tmp_path / "run"), "max_steps": 3}
    changed = {"model": {"checkpoint": str(source)} | model, "training": training}
    if "lora" in model:
        changed["simulation_learning_rate"] = None
    train(recipe_from_dict(fields | changed))
    before = weights(source)
    if "lora" in model:
        assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
        tuned = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").merge_and_unload().state_dict()
    else:
        tuned = weights(tmp_path / "run")
    moved = {name for name, weight in before.items() if not torch.equal(tuned[name], weight)}
    kind = "q_proj" if "lora" in model else "_simulation."
    assert moved and all(kind in name for name in moved)


@pytest.fixture
def llama(tmp_path):
    """Folder of a small Llama with its tokenizer."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    config = LlamaConfig(vocab_size=400, num_key_value_heads=2, **{name: TINY[name] for name in names})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    train_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_checkpoint_is_converted_before_it_is_trained(llama, fields, tmp_path):
    """The first validation loss is the source's, what is saved is a SAS model whose simulation has moved."""
    training = fields["training"] | {"max_steps": 2, "eval_on_start": True, "save_steps": 1}
    losses = {}
    for name, conversion in {"source": None, "sas": {"perturbation": 0.3}}.items():
        changes = {
            "model": {"checkpoint": str(llama), "conversion": conversion},
            "simulation_learning_rate": None,
            "training": training | {"output_dir": str(tmp_path / name)},
        }
        train(recipe_from_dict(fields | changes))
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses[name] = next(line["eval_loss"] for line in lines if line["step"] == 0)
    assert losses["sas"] == pytest.approx(losses["source"], abs=1e-6)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "sas")
    assert isinstance(tuned, SASGPTForCausalLM) and tuned.config.num_simulated_heads == 12
    converted = convert_model(AutoModelForCausalLM.from_pretrained(llama), ConversionOptions(perturbation=0.3))
    before, after = converted.state_dict(), tuned.state_dict()
    moved = [name for name in before if "_simulation." in name and not torch.equal(before[name], after[name])]
    assert moved


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        ({"perturbatoin": 1.0}, "`model.conversion.perturbatoin` is no field of a conversion; did you mean"),
        ({"perturbation": "small"}, "`model.conversion.perturbation` is 'small'; it must be a number"),
        ({"num_simulated_heads": 5}, "`model.conversion`: .*cannot be converted so: .*num_simulated_heads"),
        ({"lossy": "gqa"}, "`model.conversion.lossy` is 'gqa', which is fitted on a text; .* --lossy gqa"),
    ],
)
def test_a_conversion_that_cannot_be_made_is_refused_before_the_model_is_built(
    conversion, message, llama, fields, tmp_path
):
    training = fields["training"] | {"output_dir": str(tmp_path / "run")}
    recipe = {"model": {"checkpoint": str(llama), "conversion": conversion}, "training": training}
    (llama / "model.safetensors").write_bytes(b"")  # whoever reads it fails otherwise
    with pytest.raises(ValueError, match=message):
        train(recipe_from_dict(fields | recipe))
    assert not (tmp_path / "run").exists()


def _lose(weights):
    del weights["model.layers.1.self_attn.k_proj.weight"]


def _damage(weights):
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")


def _reshape(weights):
    weights["model.norm.weight"] = torch.ones(7)


def _add_bias(weights):
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def _add_layer(weights):
    weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32)


@pytest.mark.parametrize("task", ["language_modeling", "chat"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lose, "llama lacks weights of LlamaForCausalLM: model.layers.1.self_attn.k_proj.weight"),
        (_damage, "llama is damaged: model.layers.0.mlp.up_proj.weight holds NaN"),
        (_reshape, r"llama holds model.norm.weight as \[7\], but its config.json asks for \[32\]"),
        (_add_bias, "llama holds weights for which its config.json has no place: .*q_proj.bias"),
        (_add_layer, "llama holds weights for which its config.json has no place: model.layers.2.mlp"),
    ],
)
def test_a_checkpoint_whose_weights_are_not_its_models_is_refused(change, message, task, llama, fields, tmp_path):
    """Transformers begins what is missing at random, and leaves out what it does not know."""
    weights = load_file(llama / "model.safetensors")
    change(weights)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    changes = {
        "task": task,
        "model": {"checkpoint": str(llama)},
        "simulation_learning_rate": None,
        "training": fields["training"] | {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    if task == "chat":
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
        (tmp_path / "chat.jinja").write_text(template)
        changes["model"]["chat_template"] = str(tmp_path / "chat.jinja")
        changes["data"] = {"train": str(tmp_path / "chat.jsonl"), "sequence_length": 64}
        changes["training"]["eval_strategy"] = "no"
    with pytest.raises(ValueError, match=message):
        train(recipe_from_dict(fields | changes))
    assert not (tmp_path / "run").exists()


def test_a_head_that_is_dropped_is_said(llama, fields, tmp_path):
    weights = load_file(llama / "model.safetensors")
    save_file(weights | {"score.weight": torch.ones(2, 32)}, llama / "model.safetensors", metadata={"format": "pt"})
    changes = {
        "model": {"checkpoint": str(llama)},
        "simulation_learning_rate": None,
        "training": fields["training"] | {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    with pytest.warns(UserWarning, match="1 weights are not used by LlamaForCausalLM: score.weight"):
        train(recipe_from_dict(fields | changes))
