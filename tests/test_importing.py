"""What is imported when: `import sas_hf` and the command's help stay light, the architectures are registered in every
order of imports, and modules that moved are found by their former paths too.
"""

import importlib
import json
import pickle
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from helpers import gpt, gpt_config, python_environment

import sas_hf
from sas_hf.report import tables


HEAVY = {"accelerate", "datasets", "huggingface_hub", "lm_eval", "matplotlib", "numpy", "peft", "pyarrow", "scipy"}
HEAVY |= {"tokenizers", "torch", "transformers", "trl"}


def run(script: str, *arguments) -> str:
    """What a fresh Python prints of it."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    shown = subprocess.run(command, env=python_environment(), capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


IN_PROCESS = """
import json, runpy, sys
sys.stderr = sys.stdout
try:
    runpy.run_module("sas_hf", run_name="__main__", alter_sys=True)
except SystemExit as end:
    status = end.code
print()
print(json.dumps([status, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--help"], 0, "convert"),
        (["--version"], 0, f"sas_hf {sas_hf.__version__}"),
        (["train", "--help"], 0, "[recipe]"),
        (["eval", "--help"], 0, "--perplexity"),
        ([], 2, "convert"),
        (["convert"], 2, ""),
        (["study", "cpu-kinds", "--output", ""], 2, ""),
    ],
)
def test_help_and_usage_import_nothing_heavy(arguments, status, told):
    shown = run(IN_PROCESS, *arguments)
    ended, imported = json.loads(shown.splitlines()[-1])
    assert ended == status and told in shown
    assert HEAVY.isdisjoint(imported), HEAVY.intersection(imported)


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "PATH", "out"),
        ("restore", "PATH", "out"),
        ("fold", "PATH", "out"),
        ("export", "PATH", "out"),
        ("merge", "PATH", "out"),
        ("info", "PATH"),
        ("look", "PATH", "text", "-o", "page.html"),
        ("serve", "PATH", "--port", "0"),
        ("eval", "PATH", "--tasks", "arc_easy"),
        ("eval", "owner/name", "PATH", "--tasks", "arc_easy"),
        ("eval", "owner/name", "--adapter", "PATH", "--tasks", "arc_easy"),
        ("eval", "owner/name", "--tokenizer", "PATH", "--tasks", "arc_easy"),
    ],
)
def test_a_mistyped_path_is_refused_before_anything_heavy_is_imported(arguments, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    shown = run(IN_PROCESS, *(tmp_path / "chekpoint" if name == "PATH" else name for name in arguments))
    ended, imported = json.loads(shown.splitlines()[-1])
    assert ended == 1 and f"chekpoint does not exist; there is {tmp_path / 'checkpoint'}." in shown
    assert HEAVY.isdisjoint(imported), HEAVY.intersection(imported)


def test_a_tilde_that_the_shell_left_alone_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    gpt().save_pretrained(tmp_path / "mine")
    shown = run(IN_PROCESS, "info", "~/mine")
    assert json.loads(shown.splitlines()[-1])[0] == 0, shown


# By extra, what only the others bring (Pillow aside, which the class of an image processor is made with).
OF_OTHER_EXTRAS = {
    "train": ["lm_eval", "onnx", "onnxruntime", "onnxscript"],
    "eval": ["onnx", "onnxruntime", "onnxscript", "peft", "tensorboard", "trl"],
    "": ["datasets", "lm_eval", "matplotlib", "onnx", "peft", "psutil", "sacrebleu", "scipy", "tensorboard", "trl"],
}
ROOMS_OF = {
    "train": ["capacity", "data", "report", "training"],
    "eval": ["data", "eval", "report"],
    "": ["cli", "conversion", "hub", "looking", "modeling"],
}
IMPORT_ALL = """
import importlib, pkgutil, sys
missing, rooms = (names.split(",") for names in sys.argv[1:])
sys.modules |= dict.fromkeys(missing)
for room in rooms:
    package = importlib.import_module(f"sas_hf.{room}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            print(importlib.import_module(module.name).__name__)
"""


@pytest.mark.parametrize("extra", OF_OTHER_EXTRAS)
def test_an_extra_brings_what_its_rooms_import(extra):
    imported = run(IMPORT_ALL, ",".join(OF_OTHER_EXTRAS[extra]), ",".join(ROOMS_OF[extra])).split()
    assert len(imported) > 5


def test_the_package_alone_imports_nothing_heavy():
    imported = run("import sas_hf, sys; print(*sys.modules)").split()
    assert "sas_hf" in imported and HEAVY.isdisjoint(imported)


KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.image_processing_auto import AutoImageProcessor, IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["sas_gpt"] == "SASGPTForCausalLM"
assert type(AutoConfig.for_model("sas_gpt")).__module__ == "sas_hf.modeling.configuration_sas_gpt"
assert type(AutoConfig.for_model("sas_vit")) in IMAGE_PROCESSOR_MAPPING
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
import sas_hf
assert type(model) is sas_hf.SASGPTForCausalLM
current = sys.modules["transformers"]
for module in (current, globals().get("transformers", current)):  # of the latter name there were two, if bound early
    assert module.SASGPTForCausalLM is sas_hf.SASGPTForCausalLM and module.SASViTModel is sas_hf.SASViTModel
"""
IN_TWO_THREADS = """
import sas_hf, sys, threading, time
from sas_hf.importing import AfterImport
begun, known = threading.Event(), []
def look():
    from transformers import CONFIG_MAPPING
    known.append("sas_gpt" in CONFIG_MAPPING)
def wait():
    begun.set()
    time.sleep(2)
ours = [getattr(finder, "name", None) for finder in sys.meta_path].index("transformers")
sys.meta_path.insert(ours + 1, AfterImport("transformers", wait))
other = threading.Thread(target=look)
other.start()
begun.wait()
{}
other.join()
assert {}
"""
# Unpickling imports a file of `sas_hf.modeling` before Transformers. One thread has all but imported Transformers when
# the other comes to want a class of ours, or a file: the latter registers when its import is done.
ORDERS = {
    "transformers first": "import transformers; import sas_hf",
    "a model class first": "import transformers; from transformers import LlamaForCausalLM; import sas_hf",
    "in the middle of Transformers": "import sas_hf, transformers.modeling_layers",
    "unpickled": "import pickle; assert pickle.loads(bytes.fromhex(sys.argv[2])).model_type == 'sas_gpt'",
    "in two threads": IN_TWO_THREADS.format("sas_hf.SASGPTConfig", "known == [True]"),
    "in two threads, by a file": IN_TWO_THREADS.format("import sas_hf.modeling", "known"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    gpt().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", ORDERS)
def test_the_architectures_are_registered_in_every_order(order, checkpoint):
    run(f"import sys\n{ORDERS[order]}\n{KNOWN}", checkpoint, pickle.dumps(gpt_config()).hex())


@pytest.mark.parametrize("former", sas_hf.MOVED)
def test_former_paths_import_the_same_module(former):
    module = importlib.import_module(f"sas_hf.{sas_hf.MOVED[former]}")
    assert importlib.import_module(f"sas_hf.{former}") is module is attrgetter(former)(sas_hf)
    assert module.__spec__.name == module.__name__ == f"sas_hf.{sas_hf.MOVED[former]}"


def test_former_paths_of_names():
    """Each as it was documented or used in examples before its module moved."""
    from sas_hf.checkpoints import load_model
    from sas_hf.cli import app, conversion_table, explain_errors
    from sas_hf.export import export_model
    from sas_hf.files import write_atomically
    from sas_hf.image_files import open_image
    from sas_hf.info import describe
    from sas_hf.text import python_reference, split_text, train_tokenizer
    from sas_hf.text_files import read_whole
    from sas_hf.training import chat
    from sas_hf.training.images import make_image_trainer
    from sas_hf.training.tasks import image_classification

    assert (export_model, describe) == (sas_hf.hub.export_model, sas_hf.hub.describe)
    assert (open_image, read_whole) == (sas_hf.data.open_image, sas_hf.data.read_whole)
    names = ("python_reference", "split_text", "train_tokenizer")
    assert [python_reference, split_text, train_tokenizer] == [getattr(sas_hf.data, name) for name in names]
    assert load_model is sas_hf.hub.checkpoints.load_model and write_atomically is sas_hf.report.write_atomically
    assert chat is sas_hf.training.tasks.chat and make_image_trainer is image_classification.make_image_trainer
    assert all(map(callable, (app, conversion_table, explain_errors)))


def test_what_was_pickled_by_a_former_path_is_read():
    assert pickle.loads(b"csas_hf.tables\nGrid\n.") is tables.Grid


def test_a_patch_by_a_former_path_is_seen(monkeypatch):
    monkeypatch.setattr("sas_hf.text_files.read_text", lambda path: "patched")
    assert sas_hf.data.read_whole(Path("a.txt")) == "patched"


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="No module named 'sas_hf.cards'"):
        importlib.import_module("sas_hf.cards")
