"""Pushing to a Hub over HTTP, through dropped connections, and loading what arrived.

No well-kept Hub server exists in the package registries; `hub_server.py` is one of ours, spoken to by the real client.
"""

import json

import pytest
from environments import report_of, run_script
from hub_server import TOKEN, running_hub
from safetensors.torch import load

from sas_hf.hub.export import export_model


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub
    assert hub.unknown == []


def client(hub) -> dict[str, str]:
    """The variables of a client of that Hub. Xet, the Hub's own storage protocol, has no public server either."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


PUSH = """
import json, sys
import torch
import sas_hf
from transformers import AutoModelForCausalLM

model, said = AutoModelForCausalLM.from_pretrained(sys.argv[1]), []
for step in range(3):
    try:
        model.push_to_hub("someone/model")
        said.append("pushed")
    except Exception as error:
        said.append(f"{type(error).__module__}.{type(error).__name__}: {error}")
    if step == 0:
        torch.nn.init.zeros_(model.model.norm.weight)
model.save_pretrained(sys.argv[2])
print(json.dumps(said))
"""
LOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
name, revision, answers, *tokenizers = sys.argv[1:]
answers = load_file(answers)
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)
with torch.no_grad():
    same = torch.equal(model(answers["input"]).logits, answers["output"])
for source in tokenizers:
    expected = AutoTokenizer.from_pretrained(source)("The statement")["input_ids"]
    for trust in (True, False):  # the tokenizer itself needs no code
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        assert tokenizer("The statement")["input_ids"] == expected
print(json.dumps({"module": type(model).__module__, "same": same}))
"""


def test_a_model_is_pushed_through_dropped_connections_and_loads_without_sas_hf(
    hub, checkpoint, python_with, python_without, tmp_path
):
    # The first upload is cut off once (the client tries again), and so is the second push's commit (it does not).
    hub.drops |= {"upload": [True], "commit": [False, True]}
    pushed = report_of(run_script(python_with, PUSH, checkpoint, tmp_path / "saved", home=tmp_path, **client(hub)))
    assert hub.dropped == ["upload", "commit"]
    assert pushed[0] == pushed[2] == "pushed"
    assert "httpx" in pushed[1] and "pushed" not in pushed[1]

    _, first, second = hub.repositories["someone/model"].commits  # the dropped commit left nothing
    files = hub.repositories["someone/model"].commits
    weights = [load(files[commit]["model.safetensors"].content)["model.norm.weight"] for commit in (first, second)]
    assert weights[0].count_nonzero() and not weights[1].count_nonzero()
    # The code came along, though what the same model saves holds none.
    names = {"configuration_sas_gpt.py", "modeling_sas_gpt.py", "attention.py"}
    assert names <= hub.files("someone/model").keys()
    assert "AutoModelForCausalLM" in json.loads(hub.files("someone/model")["config.json"])["auto_map"]
    assert not list((tmp_path / "saved").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())

    answers = checkpoint.with_suffix(".answers")
    seen = report_of(run_script(python_without, LOAD, "someone/model", first, answers, home=tmp_path, **client(hub)))
    assert seen == {"module": f"transformers_modules.someone.model.{first}.modeling_sas_gpt", "same": True}


UPLOAD = """
import sys
from huggingface_hub.cli.hf import main
sys.argv = ["hf", "upload", "someone/export", sys.argv[1]]
main()
"""
EXPORT = """
import json, sys
import sas_hf
from sas_hf.hub.export import export_model
export_model("someone/export", sys.argv[1])
print("{}")
"""


def test_an_export_is_uploaded_loaded_and_exported_again(hub, checkpoint, python_with, python_without, tmp_path):
    folder = tmp_path / "export"
    export_model(checkpoint, folder)
    for _ in range(2):  # the second upload finds everything there
        run = run_script(python_without, UPLOAD, folder, home=tmp_path, **client(hub))
        assert run.returncode == 0, run.stderr
    assert len(hub.repositories["someone/export"].commits) == 2
    assert hub.files("someone/export") == {file.name: file.read_bytes() for file in folder.iterdir()}

    answers = checkpoint.with_suffix(".answers")
    arguments = ("someone/export", "main", answers, checkpoint)
    assert report_of(run_script(python_without, LOAD, *arguments, home=tmp_path, **client(hub)))["same"]

    again = tmp_path / "again"
    run = run_script(python_with, EXPORT, again, home=tmp_path, **client(hub))
    assert run.returncode == 0, run.stderr
    assert {file.name for file in again.iterdir()} == {file.name for file in folder.iterdir()}
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":  # Transformers notes there whether it was a folder's
            assert (again / file.name).read_bytes() == file.read_bytes(), file.name


CARD = """
import json, sys
from huggingface_hub import ModelCard
said = []
for path in sys.argv[1:]:
    try:
        ModelCard(open(path).read()).validate()
        said.append("valid")
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_cards_pass_the_validation_and_a_wrong_one_does_not(hub, checkpoint, python_without, tmp_path):
    (checkpoint / "README.md").write_text("---\nlicense: mit\nbase_model: /home/me/model\n---\n# Mine\n")
    export_model(checkpoint, tmp_path / "export")
    cards = [tmp_path / "export" / "README.md", checkpoint / "README.md"]
    valid, wrong = report_of(run_script(python_without, CARD, *cards, home=tmp_path, **client(hub)))
    assert valid == "valid"
    assert "base_model[0]" in wrong
