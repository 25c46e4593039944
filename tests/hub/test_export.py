"""The exported folder, what an export leaves as it was, and what a bad source leaves behind (nothing)."""

import json
import subprocess
import sys

import pytest
import torch
from answered_checkpoints import CHECKPOINTS, HEADS, save_checkpoint
from helpers import assert_identical, gpt, sas_hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sas_hf import SASGPTForCausalLM
from sas_hf.hub.export import export_model


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_export_holds_all_that_belongs_to_the_checkpoint(checkpoint, tmp_path):
    report = {"fidelity": None}
    (checkpoint / "generation_config.json").write_text('{"do_sample": false, "top_k": 7}')  # contradicts itself
    (checkpoint / "stray.py").write_text("1 / 0")
    (checkpoint / "README.md").write_text("# Mine\n\n## Fidelity\n\nAs told elsewhere.\n")
    (checkpoint / "fidelity.json").write_text(json.dumps(report))
    export_model(checkpoint, tmp_path / "export")
    export = tmp_path / "export"
    assert json.loads((export / "fidelity.json").read_text()) == report
    assert json.loads((export / "generation_config.json").read_text())["top_k"] == 7
    assert not (export / "stray.py").exists()
    assert AutoTokenizer.from_pretrained(export)("a b")["input_ids"]
    assert_identical(load_file(export / "model.safetensors"), load_file(checkpoint / "model.safetensors"))
    assert {"model.safetensors", "checkpoint.answers"}.isdisjoint(files_in(tmp_path)), "temporary files remain"
    assert [name for name in files_in(tmp_path) if name.startswith(".")] == []


def test_the_code_is_what_the_classes_need_and_nothing_else(checkpoint, tmp_path):
    export_model(checkpoint, tmp_path / "export")
    code = {path.stem: path.read_text() for path in (tmp_path / "export").glob("*.py")}
    assert {"modeling_sas_gpt", "configuration_sas_gpt", "attention", "simulation"} <= code.keys()
    assert "__init__" not in code
    assert not any("sas_hf." in line for text in code.values() for line in text.splitlines() if "import" in line)


def test_the_weights_keep_their_dtype(checkpoint, tmp_path):
    SASGPTForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(checkpoint)
    export_model(checkpoint, tmp_path / "export")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def test_sharded_weights_are_exported_whole(tmp_path):
    model = gpt("sas")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    export_model(tmp_path / "model", tmp_path / "export")
    assert_identical(AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict(), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft to Transformers
def test_an_adapter_is_exported_with_the_tokenizer_of_its_base(checkpoint, tmp_path):
    """peft saves none beside it."""
    model = get_peft_model(SASGPTForCausalLM.from_pretrained(checkpoint), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    export_model(tmp_path / "adapter", tmp_path / "export")
    expected = AutoTokenizer.from_pretrained(checkpoint)("a b")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("a b")["input_ids"] == expected


def test_saving_after_an_export_writes_no_code(checkpoint, tmp_path):
    export_model(checkpoint, tmp_path / "export")
    models = [gpt("mha"), *(AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "export"))]
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / f"saved{index}")
        model.config.save_pretrained(tmp_path / f"config{index}")
        for folder in (tmp_path / f"saved{index}", tmp_path / f"config{index}"):
            assert not list(folder.glob("*.py"))
            assert "auto_map" not in (folder / "config.json").read_text()


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "-Auto" in name])
def test_the_auto_map_names_every_head_of_the_architecture(name, tmp_path):
    _, _, model_class = CHECKPOINTS[name]
    save_checkpoint(name, tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architectures"] == [model_class.__name__]
    heads = HEADS[name.partition("-")[0]]
    expected = {key: f"modeling_{config['model_type']}.{head.__name__}" for key, head in heads.items()}
    configuration = f"configuration_{config['model_type']}.{model_class.config_class.__name__}"
    assert config["auto_map"] == expected | {"AutoConfig": configuration}


def test_a_class_that_no_auto_class_knows_is_pushed_as_transformers_does(tmp_path):
    class Mine(SASGPTForCausalLM):
        pass

    model = Mine(gpt("mha").config)
    model._takes_code_along = True
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_empty(folder):
    for file in folder.iterdir():
        file.unlink()


def damage_no_weights(folder):
    (folder / "model.safetensors").unlink()


def damage_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def damage_truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_missing(folder):
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))


def damage_extra(folder):
    change_weights(folder, lambda weights: weights.update({"model.extra": torch.ones(2)}))


def damage_shape(folder):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(2)}))


def damage_nan(folder):
    change_weights(folder, lambda weights: weights["model.norm.weight"].fill_(float("nan")))


def damage_family(folder):
    damage_empty(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)).save_pretrained(folder)


def damage_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["SASGPTForSpeech"]}))


def damage_no_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


def damage_card(folder):
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")


def damage_report(folder):
    (folder / "fidelity.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_empty, FileNotFoundError, "no config.json"),
        (damage_no_weights, OSError, "model.safetensors"),
        (damage_pickle, OSError, "model.safetensors"),
        (damage_truncated, ValueError, "weights of .* are damaged"),
        (damage_missing, ValueError, "lacks weights of SASGPTForCausalLM: model.norm.weight"),
        (damage_extra, ValueError, "unknown to SASGPTForCausalLM: model.extra"),
        (damage_shape, ValueError, r"holds model.norm.weight as \[2\], but its config.json asks for \[32\]"),
        (damage_nan, ValueError, "is damaged: model.norm.weight holds NaN"),
        (damage_family, ValueError, "`model_type` 'gpt2'; only SAS models.*sas-hf convert"),
        (damage_architecture, ValueError, "`architectures` of .* SASGPTForSpeech; it must be one of SASGPTModel"),
        (damage_no_architecture, ValueError, "`architectures` of .* names None"),
        (damage_card, ValueError, "README.md has metadata that cannot be read"),
        (damage_report, ValueError, "fidelity.json is no JSON"),
    ],
)
def test_a_bad_source_is_refused_and_nothing_is_left(checkpoint, tmp_path, damage, error, message):
    damage(checkpoint)
    before = files_in(tmp_path)
    with pytest.raises(error, match=f"(?s){message}"):
        export_model(checkpoint, tmp_path / "export")
    assert files_in(tmp_path) == before


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        export_model(tmp_path / "nowhere", tmp_path / "export")


def test_an_existing_output_is_refused_and_kept(checkpoint, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_model(checkpoint, tmp_path / "export")
    assert files_in(tmp_path / "export") == ["precious"]


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path):
    """A real write that fails: the process may not write files of more than 20 kB."""
    script = (
        "import resource; from sas_hf.hub.export import export_model\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        f"export_model({str(checkpoint)!r}, {str(tmp_path / 'export')!r})"
    )
    before = files_in(tmp_path)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode != 0
    assert "File too large" in run.stderr
    assert files_in(tmp_path) == before


def test_the_command_exports_and_explains_errors_in_a_line(checkpoint, tmp_path):
    run = sas_hf("export", checkpoint, tmp_path / "export")
    assert run.returncode == 0, run.stderr
    assert "hf upload" in run.stdout
    assert (tmp_path / "export" / "modeling_sas_gpt.py").is_file()
    run = sas_hf("export", checkpoint, tmp_path / "export")
    assert run.returncode == 1
    assert "choose another output" in run.stderr and "Traceback" not in run.stderr
