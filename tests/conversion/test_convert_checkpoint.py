"""From folder to folder: what is carried along, what is reported, and what a wrong input leaves behind (nothing)."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from helpers import sas_hf
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, LlamaForCausalLM

from sas_hf.conversion import ConversionError, ConversionOptions, convert_checkpoint, fidelity


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_converted_with_all_that_belongs_to_it(llama_folder, tmp_path):
    output = tmp_path / "sas"
    report = convert_checkpoint(llama_folder, output, windows=3, window_length=64)

    source, model = LlamaForCausalLM.from_pretrained(llama_folder), AutoModelForCausalLM.from_pretrained(output)
    ids = torch.randint(source.config.vocab_size, (2, 30))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=1e-4)
    assert model.generation_config.top_k == 7
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(llama_folder).chat_template
    assert (
        tokenizer("an expression")["input_ids"]
        == AutoTokenizer.from_pretrained(llama_folder)("an expression")["input_ids"]
    )

    saved = json.loads((output / "fidelity.json").read_text())
    assert saved == report
    assert saved["fidelity"]["exact"] and saved["fidelity"]["argmax_agreement"] == 1.0
    assert saved["parameters"] == model.num_parameters()
    card = (output / "README.md").read_text()
    assert f"{saved['fidelity']['max_abs_difference']:.3g}" in card and "AutoModelForCausalLM" in card
    assert files_in(tmp_path) == ["sas", "source"], "temporary folders remain"
    assert not list(output.glob("*.py"))


def to_save_again(folder, **options):
    """The source, of whose generation configuration Transformers 5.16 would save nothing, as it contradicts itself."""
    model = LlamaForCausalLM.from_pretrained(folder, **options)
    model.generation_config.top_k = None
    return model


def test_the_sources_dtype_is_kept_or_replaced(llama_folder, tmp_path):
    to_save_again(llama_folder, dtype=torch.bfloat16).save_pretrained(llama_folder)
    convert_checkpoint(llama_folder, tmp_path / "same")
    convert_checkpoint(llama_folder, tmp_path / "float16", dtype="float16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "same").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "float16").dtype == torch.float16


def test_a_source_without_tokenizer_is_verified_on_random_tokens(llama_folder, tmp_path):
    for file in llama_folder.glob("token*"):
        file.unlink()
    (llama_folder / "chat_template.jinja").unlink()
    report = convert_checkpoint(llama_folder, tmp_path / "sas")
    assert "no tokenizer" in report["verified_on"]
    assert report["fidelity"]["exact"]


def test_an_existing_output_is_refused_and_kept(llama_folder, tmp_path):
    output = tmp_path / "sas"
    output.mkdir()
    (output / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert_checkpoint(llama_folder, output)
    assert (output / "precious").read_text() == "mine"


def test_an_empty_output_folder_is_filled(llama_folder, tmp_path):
    (tmp_path / "sas").mkdir()
    convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    assert "model.safetensors" in files_in(tmp_path / "sas")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ConversionOptions(simulation_kernel_size=4), "simulation_kernel_size.*4.*3 or 5"),
        (ConversionOptions(num_simulated_heads=10), "num_simulated_heads.*10.*multiple.*6.*12"),
        (ConversionOptions(simulated_head_dim=4), "simulated_head_dim.*4.*head_dim.*12"),
        (ConversionOptions(perturbation=-1.0), "perturbation.*-1.0"),
        (ConversionOptions(simulation_act="rely"), "simulation_act.*rely.*'identity'"),
        (
            ConversionOptions(num_simulated_heads=0, simulated_head_dim=0, simulation_act="identity"),
            "simulation_act.*identity.*there is none",
        ),
        (ConversionOptions(head_aggregation="sum"), "head_aggregation.*sum.*'mean', 'concat'"),
        (ConversionOptions(num_simulated_heads=6, head_aggregation="concat"), "head_aggregation.*concat.*12 heads"),
        (ConversionOptions(lossy="gqa", num_key_value_heads=1, head_aggregation="concat"), "head_aggregation"),
        (
            ConversionOptions(lossy="mla", num_simulated_heads=12, simulated_head_dim=24, head_aggregation="concat"),
            "head_aggregation.*concat.*lossy",
        ),
    ],
)
def test_impossible_options_are_refused_before_weights_are_read(llama_folder, tmp_path, options, message):
    (llama_folder / "model.safetensors").unlink()  # an error about it would mean that the options came too late
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(llama_folder, tmp_path / "sas", options)
    assert files_in(tmp_path) == ["source"]


def test_an_unknown_dtype_is_refused(llama_folder, tmp_path):
    with pytest.raises(ValueError, match="`dtype` is 'float99'.*bfloat16"):
        convert_checkpoint(llama_folder, tmp_path / "sas", dtype="float99")


def damage_none(folder):
    for file in folder.iterdir():
        file.unlink()


def damage_no_weights(folder):
    (folder / "model.safetensors").unlink()


def damage_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damage_truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def shard(folder):
    model = to_save_again(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    return next(folder.glob("model-00002-*"))


def damage_missing_shard(folder):
    shard(folder).unlink()


def damage_truncated_shard(folder):
    file = shard(folder)
    file.write_bytes(file.read_bytes()[:-8])


def damage_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')


def damage_index_entries(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def damage_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def damage_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 45}))


def damage_architecture(folder):
    BloomConfig(architectures=["BloomForCausalLM"]).save_pretrained(folder)


def damage_head(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSpeech"]}))


def damage_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))


def damage_nan(folder):
    model = to_save_again(folder)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)


def damage_unused_row(folder):
    """Of a token that the text it is verified on need not hold."""
    model = to_save_again(folder)
    model.model.embed_tokens.weight.data[0] = float("inf")
    model.save_pretrained(folder)


def damage_sas(folder):
    convert_checkpoint(folder, folder.parent / "once", windows=1)
    (folder.parent / "once").rename(folder.parent / "twice")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    (folder.parent / "twice").rename(folder)


def damage_emptied(folder):
    save_file({}, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": None}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_none, FileNotFoundError, "no config.json"),
        (damage_no_weights, FileNotFoundError, "no model.safetensors"),
        (damage_pickle, FileNotFoundError, "only a pickle"),
        (damage_truncated, ConversionError, "model.safetensors is damaged or truncated"),
        (damage_missing_shard, FileNotFoundError, "has no model-00002-of-0000"),
        (damage_truncated_shard, ConversionError, "model-00002-of-0000.*is damaged or truncated"),
        (damage_index, ConversionError, "model.safetensors.index.json is damaged"),
        (damage_index_entries, ConversionError, "model.safetensors.index.json is damaged.*weight_map"),
        (damage_config, ValueError, "config.json is no JSON"),
        (damage_shape, ConversionError, r"mlp.down_proj.weight as \[60, 44\].*\[60, 45\].*belong together"),
        (damage_architecture, ConversionError, "model_type.*bloom.*gpt2, gpt_neox, helium, llama"),
        (damage_head, ConversionError, "LlamaForSpeech"),
        (damage_layers, ConversionError, "lacks weights.*layers.3"),
        (damage_nan, ConversionError, "model.norm.weight holds NaN or infinite"),
        (damage_unused_row, ConversionError, "embed_tokens.weight holds NaN or infinite"),
        (damage_emptied, ConversionError, "model.safetensors holds no weights"),
        (damage_sas, ConversionError, "SAS model already"),
    ],
)
def test_a_bad_source_is_refused_and_nothing_is_left(llama_folder, tmp_path, damage, error, message):
    damage(llama_folder)
    with pytest.raises(error, match=message):
        convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    assert files_in(tmp_path) == ["source"]


MALICE = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\nclass Evil: pass\n"


def plant_code(folder, file, auto_map):
    """Python files beside the checkpoint, and a JSON file of it that names them."""
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(MALICE)
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | {"auto_map": auto_map}))


def test_code_in_a_checkpoint_is_neither_executed_nor_carried_over(llama_folder, tmp_path):
    maps = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    plant_code(llama_folder, "config.json", maps)
    plant_code(llama_folder, "tokenizer_config.json", {"AutoTokenizer": [None, "tokenization_evil.Evil"]})
    convert_checkpoint(llama_folder, tmp_path / "sas", windows=1)
    assert not list(tmp_path.rglob("executed"))
    assert not list((tmp_path / "sas").glob("*.py"))
    for file in (tmp_path / "sas").glob("*.json"):
        assert "evil" not in file.read_text(), file.name


def test_an_architecture_that_needs_code_is_refused_without_executing_it(llama_folder, tmp_path):
    plant_code(llama_folder, "config.json", {"AutoConfig": "configuration_evil.Evil"})
    settings = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps(settings | {"model_type": "evil"}))
    with pytest.raises(ConversionError, match="model_type.*'evil' is not supported"):
        convert_checkpoint(llama_folder, tmp_path / "sas")
    assert files_in(tmp_path) == ["source"]
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.parametrize(("text", "message"), [("", "has 0 tokens"), ("hi", "comparing models needs at least 32")])
def test_a_text_that_says_little_is_refused(llama_folder, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(llama_folder, tmp_path / "sas", text=text)
    assert files_in(tmp_path) == ["source"]


def test_a_name_that_is_no_folder_is_said_to_be_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="lama is no folder here"):
        convert_checkpoint("lama", tmp_path / "sas")


def test_an_output_that_cannot_be_written_is_refused_at_once(llama_folder):
    (llama_folder / "model.safetensors").unlink()  # an error about it would mean that this one came too late
    with pytest.raises(PermissionError, match="is to be /proc/sas, but no file can be written into /proc"):
        convert_checkpoint(llama_folder, "/proc/sas")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "sas")


def test_an_inexact_conversion_leaves_no_checkpoint(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "TOLERANCE", 0.0)  # no arithmetic is that exact
    with pytest.raises(ConversionError, match="not exact.*No checkpoint was written"):
        convert_checkpoint(llama_folder, tmp_path / "sas")
    assert files_in(tmp_path) == ["source"]


def test_an_interrupt_while_saving_leaves_nothing(llama_folder, tmp_path):
    def interrupt(message):
        if message.startswith("Saving"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(llama_folder, tmp_path / "sas", progress=interrupt)
    assert files_in(tmp_path) == ["source"]


def test_a_full_disk_leaves_nothing(llama_folder, tmp_path):
    """A real write that fails: the process may not write files of more than 20 kB."""
    script = (
        "import resource, sys; from sas_hf.conversion import convert_checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        f"convert_checkpoint({str(llama_folder)!r}, {str(tmp_path / 'sas')!r}, windows=1)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode != 0
    assert "File too large" in run.stderr
    assert files_in(tmp_path) == ["source"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_the_command_converts_and_shows_a_table(llama_folder, tmp_path):
    options = ("--num-simulated-heads", "12", "--kernel-size", "3", "--value-features", "--head-aggregation", "concat")
    options += ("--simulation-act", "identity")
    run = sas_hf("convert", llama_folder, tmp_path / "sas", *options)
    assert run.returncode == 0, run.stderr
    assert "arg-max agreement" in run.stdout and "100.00%" in run.stdout
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "sas").config
    assert (config.num_simulated_heads, config.simulation_kernel_size) == (12, 3)
    assert config.simulate_value_features and config.head_aggregation == "concat"
    assert config.simulation_act == "identity"
    assert "activation identity" in (tmp_path / "sas" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel-size", "2"], "simulation_kernel_size"),
        (["--num-simulated-head", "12"], "--num-simulated-heads"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_the_command_explains_errors_in_a_line(llama_folder, tmp_path, arguments, message):
    run = sas_hf("convert", llama_folder, tmp_path / "sas", *arguments)
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert files_in(tmp_path) == ["source"]
