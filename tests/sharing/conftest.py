"""The two environments, made once, and checkpoints of every kind with the answers that their readers must give."""

from pathlib import Path

import pytest
import torch
from environments import make_environment, run_script
from helpers import GPT_VARIANTS, gpt, token_ids, train_tokenizer
from safetensors.torch import save_file

from sas_hf import (
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASGPTModel,
)


HEADS = {
    "AutoModel": SASGPTModel,
    "AutoModelForSequenceClassification": SASGPTForSequenceClassification,
    "AutoModelForTokenClassification": SASGPTForTokenClassification,
    "AutoModelForQuestionAnswering": SASGPTForQuestionAnswering,
}
# Name of a checkpoint → the Auto class that loads it.
CHECKPOINTS = dict.fromkeys(GPT_VARIANTS, "AutoModelForCausalLM") | {name: name for name in HEADS}


@pytest.fixture(scope="session")
def python_without(tmp_path_factory) -> Path:
    """The Python of an environment in which sas_hf cannot be imported."""
    python = make_environment(tmp_path_factory.mktemp("without") / "venv", with_package=False)
    run = run_script(python, "import sas_hf", home=python.parent)
    assert "ModuleNotFoundError: No module named 'sas_hf'" in run.stderr
    return python


@pytest.fixture(scope="session")
def python_with(tmp_path_factory) -> Path:
    """The Python of an environment with sas_hf."""
    return make_environment(tmp_path_factory.mktemp("with") / "venv", with_package=True)


@torch.no_grad()
def save_checkpoint(name: str, folder: Path) -> None:
    """A checkpoint of that name with a tokenizer; beside its files, inputs and the answers to them."""
    tokenizer = train_tokenizer()
    if name in HEADS:
        model = gpt("sas_mqa", model_class=HEADS[name], vocab_size=len(tokenizer), pad_token_id=0)
    else:
        model = gpt(name, vocab_size=len(tokenizer), pad_token_id=0)
    ids = token_ids(2, 9, vocab_size=len(tokenizer))
    answers = {"ids": ids, "output": model(ids)[0]}
    if name not in HEADS:
        answers["generated"] = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(answers, folder.with_suffix(".answers"))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_checkpoint("sas_k5_gqa", tmp_path / "model")
    return tmp_path / "model"
