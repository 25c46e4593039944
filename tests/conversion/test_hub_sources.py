"""Sources by Hub id: what is there is converted, what is not is said in one line, before and without any output."""

import json

import pytest
import torch
from helpers import sas_hf
from loopback_hub import LoopbackHub, loopback_hub
from transformers import AutoModelForCausalLM, LlamaForCausalLM


@pytest.fixture
def hub(llama_folder, tmp_path, monkeypatch):
    """A Hub with `team/llama`, a sharded bfloat16 checkpoint; commands that a test runs use it."""
    repositories = tmp_path / "hub"
    repository = repositories / "team" / "llama"
    repository.parent.mkdir(parents=True)
    model = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.bfloat16)
    (llama_folder / "model.safetensors").unlink()
    model.save_pretrained(llama_folder, max_shard_size="50KB")
    llama_folder.rename(repository)
    with loopback_hub(repositories) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield repositories


def test_a_sharded_bfloat16_source_is_converted_by_its_id(hub, tmp_path):
    run = sas_hf("convert", "team/llama", tmp_path / "sas", "--revision", "main")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "sas" / "fidelity.json").read_text())
    assert (report["source"], report["revision"]) == ("team/llama", "main")
    assert (
        report["fidelity"]["exact"] and report["dtype_saved"] == "bfloat16" and report["dtype_verified"] == "float32"
    )
    assert "the Python language reference" in report["verified_on"], "the tokenizer was not found"
    source = LlamaForCausalLM.from_pretrained(hub / "team" / "llama", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sas", dtype=torch.float32)
    ids = torch.randint(source.config.vocab_size, (2, 30))
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=0, atol=1e-4)
    assert model.generation_config.top_k == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["team/nothing"], "team/nothing is no folder here, nor a checkpoint that the Hub gives"),
        (["team/gated"], "gated repo"),
        (["team/llama", "--revision", "nowhere"], "nowhere is not a valid git identifier"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_a_line(hub, tmp_path, arguments, message):
    run = sas_hf("convert", arguments[0], tmp_path / "sas", *arguments[1:])
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "sas").exists()


def test_a_repository_of_pickles_is_refused(hub, tmp_path):
    repository = hub / "team" / "llama"
    for file in repository.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, repository / "pytorch_model.bin")
    run = sas_hf("convert", "team/llama", tmp_path / "sas")
    assert run.returncode == 1
    assert "only a pickle" in run.stderr and "safetensors" in run.stderr
    assert "Traceback" not in run.stderr


def test_without_a_network_the_reason_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # HF_HUB_OFFLINE is set for all tests
    run = sas_hf("convert", "team/llama", tmp_path / "sas")
    assert run.returncode == 1
    assert "team/llama is no folder here, nor a checkpoint that the Hub gives" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_hub_that_is_away_is_asked_once(tmp_path, monkeypatch):
    """Its client would ask six times for each file, for a minute."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run = sas_hf("convert", "runs/quikstart", tmp_path / "sas")
    assert run.returncode == 1
    assert "runs/quikstart is no folder here, nor a checkpoint that the Hub gives: it cannot be reached" in run.stderr
    assert "there is runs/quickstart." in run.stderr and "Retry" not in run.stderr


@pytest.mark.parametrize(
    ("status", "told"), [(500, "answers with an error of its own (500); try again later"), (200, "answers no JSON")]
)
def test_what_answers_there_is_no_hub(status, told, tmp_path, monkeypatch):
    class Broken(LoopbackHub):
        def do_GET(self):
            self.answer(status, b"<html>Welcome</html>", Content_Type="text/html")

        do_HEAD = do_GET

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with loopback_hub(tmp_path, Broken) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        run = sas_hf("info", "team/llama")
    assert run.returncode == 1 and "Retry" not in run.stderr
    assert "team/llama is no folder here, nor a checkpoint that the Hub gives: " + address in run.stderr
    assert told in run.stderr


def test_a_link_to_nowhere_is_called_so(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    run = sas_hf("info", tmp_path / "link")
    assert run.returncode == 1 and f"link is a link to {tmp_path / 'moved'}, which does not exist." in run.stderr


def test_a_mistyped_folder_is_told_from_its_neighbours(llama_folder, tmp_path):
    run = sas_hf("convert", llama_folder.with_name("sourse"), tmp_path / "sas")
    assert f"sourse does not exist; there is {llama_folder}." in run.stderr


@pytest.mark.parametrize("name", ["owner/nam/", "a/b@main", "C:\\models\\x"])
def test_what_is_no_name_of_the_hub_is_no_folder_here(name):
    run = sas_hf("info", name if "/" in name else f"./{name}")
    assert run.returncode == 1 and ("is no folder here" in run.stderr or "does not exist" in run.stderr)
    assert "Traceback" not in run.stderr


def test_a_log_has_no_bars_and_no_colours(llama_folder, tmp_path):
    run = sas_hf("convert", llama_folder, tmp_path / "sas")
    assert run.returncode == 0 and "Comparing" in run.stdout
    written = run.stdout + run.stderr
    assert not any(mark in written for mark in ("\r", "\x1b", "it/s", "%|"))
