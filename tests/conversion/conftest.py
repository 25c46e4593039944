"""Llama sources: live models of every awkward shape, and a complete little checkpoint."""

import pytest
from helpers import train_tokenizer
from tiny_llama import AWKWARD, tiny_llama, tiny_llama_config
from transformers import LlamaForCausalLM


@pytest.fixture(params=AWKWARD)
def awkward_llama(request):
    return tiny_llama(request.param)


@pytest.fixture
def llama_folder(tmp_path):
    """Weights, a tokenizer with a chat template, a generation configuration."""
    tokenizer = train_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = LlamaForCausalLM(tiny_llama_config(**AWKWARD["gqa"] | {"vocab_size": len(tokenizer)}))
    folder = tmp_path / "source"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Contradicts itself (no sampling, but a top_k), as many on the Hub do.
    (folder / "generation_config.json").write_text('{"do_sample": false, "top_k": 7}')
    return folder
