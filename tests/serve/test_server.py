"""`sas-hf serve`: Transformers' own server over HTTP, in a process of its own, asked by OpenAI's client.

What it answers is what `generate` gives, and what it cannot serve is refused before it listens.
"""

import contextlib
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import transformers
import uvicorn
from helpers import GPT_VARIANTS, encoder, gpt, python_environment, seq2seq, vit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager
from transformers.generation.continuous_batching import initialization
from typer.testing import CliRunner

from sas_hf import SASEncoderForSequenceClassification, SASGPTForCausalLM, SASGPTForSequenceClassification
from sas_hf.cli import app


WORDS = [f"w{number}" for number in range(63)]
POOL = ("--continuous-batching", "--cb-num-blocks", "8", "--cb-max-batch-tokens", "64")
LENGTH = 12
CHECKED = pytest.mark.skipif(
    not hasattr(initialization, "check_cb_values_bounds"), reason="this version of Transformers does not check it"
)


def word_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """A token a word, so that whatever a random model says is a text of its own."""
    names = ["<pad>", "<unk>", "<start>", "<end>", *words]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = "{% for message in messages %}w1 {{ message['content'] }} {% endfor %}w2"
    return made


def saved(model, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    if model.can_generate():
        model.generation_config = GenerationConfig(eos_token_id=3, pad_token_id=0)
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def serving(folder: Path, log: Path, *flags: str):
    """The address of a server, and its process, which is told to stop at the end if it has not been."""
    command = [sys.executable, "-m", "sas_hf", "serve", str(folder), "--device", "cpu", "--port", "0", *flags]
    with log.open("w") as out, subprocess.Popen(command, env=python_environment(), stdout=out, stderr=out) as process:
        try:
            while not (found := re.search(r"running on (http://\S+:[1-9]\d*)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            yield found[1], process
        finally:
            process.kill()


class Client:
    """Asks the three routes for text, greedily."""

    def __init__(self, address: str, model: str):
        self.openai = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        self.common = {"model": model, "temperature": 0}

    def completion(self, prompt: str, **more) -> str:
        answer = self.openai.completions.create(prompt=prompt, max_tokens=LENGTH, **self.common, **more)
        if more.get("stream"):
            return "".join(part.choices[0].text for part in answer)
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == LENGTH
        return answer.choices[0].text

    def chat(self, message: str, **more) -> str:
        asked = [{"role": "user", "content": message}]
        answer = self.openai.chat.completions.create(messages=asked, max_tokens=LENGTH, **self.common, **more)
        if more.get("stream"):
            return "".join(part.choices[0].delta.content or "" for part in answer)
        return answer.choices[0].message.content

    def response(self, message: str, **more) -> str:
        answer = self.openai.responses.create(input=message, max_output_tokens=LENGTH, **self.common, **more)
        if more.get("stream"):
            return "".join(part.delta for part in answer if part.type == "response.output_text.delta")
        return answer.output_text


@pytest.mark.parametrize("flags", [(), POOL], ids=["generate", "continuous batching"])
def test_answers_are_those_of_generate(flags, tmp_path):
    folder = saved(gpt("sas_k5_gqa"), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def generated(prompt: str) -> str:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        greedy = GenerationConfig(max_new_tokens=LENGTH, do_sample=False, pad_token_id=0, eos_token_id=3)
        return tokenizer.decode(model.generate(tokens, greedy)[0, tokens.shape[1] :], skip_special_tokens=True)

    log = tmp_path / "log.txt"
    with serving(folder, log, *flags) as (address, process):
        client = Client(address, str(folder))
        if hasattr(ModelManager, "list_models"):  # from 5.24 on; before, the route listed what the Hub's cache holds
            assert [listed.id for listed in client.openai.models.list()] == [str(folder)]

        prompts = ["w5 w9 w30", "w7", "w11 w12 w13 w14 w15 w16 w17 w18 w19 w20", "w60 w5"]
        expected = [generated(prompt) for prompt in prompts]
        assert len(set(expected)) == len(prompts)  # else a mix-up of two would not show
        for stream in (False, True):
            assert client.completion(prompts[0], stream=stream) == expected[0]
            for ask in (client.chat, client.response):
                assert ask("w5 w9", stream=stream) == generated("w1 w5 w9 w2")
        with ThreadPoolExecutor(len(prompts)) as at_once:  # in one batch, if batches are continuous
            for stream in (False, True):
                asked = [at_once.submit(client.completion, prompt, stream=stream) for prompt in prompts]
                assert [answer.result(600) for answer in asked] == expected

        with pytest.raises(openai.BadRequestError) as of_another:
            Client(address, "other").completion("w5")
        assert f"pinned to '{folder}'; requested 'other'" in of_another.value.response.text

        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 128 + signal.SIGTERM
    assert "Application shutdown complete" in log.read_text() and "Traceback" not in log.read_text()


def test_the_server_of_transformers_finds_the_class(tmp_path):
    """Plain `transformers serve` asks the module `transformers` for the class that a checkpoint names."""
    folder = saved(gpt(), tmp_path / "model")
    model, _ = ModelManager(device="cpu").load_model_and_processor(ModelManager.process_model_name(str(folder)))
    assert type(model) is transformers.SASGPTForCausalLM is SASGPTForCausalLM


def refused(monkeypatch, *arguments) -> str:
    """The one line about a server that never listens, after what loading says."""

    def listens(*_):
        raise AssertionError("the server listens")

    monkeypatch.setattr(uvicorn.Server, "run", listens)
    shown = CliRunner().invoke(app, ["serve", *map(str, arguments), "--device", "cpu"])
    assert isinstance(shown.exception, SystemExit) and shown.exit_code in (1, 2), shown.exception
    *before, line = shown.stderr.splitlines()
    assert line.startswith("error: ") and not any(other.startswith(("error", "Traceback")) for other in before)
    return line


NO_POOL = [name for name in GPT_VARIANTS if name.split("_")[0] in ("mla", "tpa", "efficient", "super")]


@pytest.mark.parametrize("variant", NO_POOL)
def test_what_the_pool_cannot_hold_is_refused(variant, tmp_path, monkeypatch):
    folder = saved(gpt(variant), tmp_path / "model")
    told = refused(monkeypatch, folder, *POOL)
    assert f"not what `attention_type` {variant.split('_')[0]!r} caches" in told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        pytest.param(["--attn-implementation", "flex_attention"], "flex_attention is not supported", marks=CHECKED),
        pytest.param(["--cb-block-size", 1], "page_size must be at least", marks=CHECKED),
        (["--cb-num-blocks", 10**9], "`--cb-num-blocks` or `--cb-max-batch-tokens` is too large"),
        (["--prot", 1], "No such option: --prot"),
        (["--port", "x"], "It is 'x'. See sas-hf serve --help."),
    ],
)
@pytest.mark.usefixtures("tolerate_deprecations")  # Transformers calls blocks pages, its flags not yet
def test_flags_are_refused_before_the_first_request(flags, told, tmp_path, monkeypatch):
    assert told in refused(monkeypatch, saved(gpt(), tmp_path / "model"), "--continuous-batching", *flags)


@pytest.mark.parametrize(
    "make",
    [
        encoder,
        seq2seq,
        vit,
        lambda: encoder(model_class=SASEncoderForSequenceClassification),
        lambda: gpt(model_class=SASGPTForSequenceClassification),
        lambda: gpt(is_causal=False),
    ],
    ids=["encoder", "encoder-decoder", "images", "encoder's classifier", "classifier", "not causal"],
)
def test_what_continues_no_text_is_refused(make, tmp_path, monkeypatch):
    model = make()
    folder = saved(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()  # refused before weights are read
    told = refused(monkeypatch, folder)
    assert type(model).__name__ in told and "a causal SASGPTForCausalLM" in told


def test_a_folder_that_is_none_and_a_model_that_is_not_named(tmp_path, monkeypatch):
    assert f"{tmp_path} has no config.json" in refused(monkeypatch, tmp_path)
    assert "`MODEL` is missing" in refused(monkeypatch)


def test_a_tokenizer_that_does_not_fit(tmp_path, monkeypatch):
    folder = saved(gpt(), tmp_path / "model", word_tokenizer([*WORDS, "one", "more"]))
    assert "2 tokens beyond the model's `vocab_size` (67)" in refused(monkeypatch, folder)


def test_a_model_without_chat_template_is_told_so(tmp_path, monkeypatch):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    folder = saved(gpt(), tmp_path / "model", tokenizer)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: None)
    shown = CliRunner().invoke(app, ["serve", str(folder), "--device", "cpu"])
    assert shown.exit_code == 0 and "has no chat template" in " ".join(shown.stdout.split())
