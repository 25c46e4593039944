"""A tiny random SAS GPT with its tokenizer, a text, and the text's questions in the columns of stock tasks."""

import random
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from toy_benchmarks import BENCHMARKS, toy_rows
from transformers import PreTrainedTokenizerFast

import sas_hf.eval.evaluation
from sas_hf import SASGPTConfig, SASGPTForCausalLM
from sas_hf.eval import make_continuation_task
from sas_hf.eval.task_loading import leaf_names


@pytest.fixture(scope="session")
def text():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(300)]
    return "\n".join(" ".join(rng.choices(words, k=rng.randint(5, 20))).capitalize() + "." for _ in range(400))


@pytest.fixture(scope="session")
def tokenizer(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text.splitlines(),
        trainers.BpeTrainer(
            vocab_size=384, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def config():
    return SASGPTConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_simulated_heads=4,
        simulated_head_dim=24,
        max_position_embeddings=512,
        initializer_range=0.2,  # predictions that differ from context to context
        eos_token_id=0,
    )


@pytest.fixture(scope="session")
def checkpoint(config, tokenizer, tmp_path_factory):
    """Folder of the model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    SASGPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint):
    return SASGPTForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def never_loaded(monkeypatch):
    """Fails the test when a model is loaded."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded before the error")

    monkeypatch.setattr(sas_hf.eval.evaluation, "SASHFLM", load)


@pytest.fixture(scope="session")
def arc_rows(text):
    """Questions in the columns of ARC, with three to five choices."""
    sentences = text.splitlines()
    rng = random.Random(1)
    rows = []
    for number in range(8):
        labels = "ABCDE"[: rng.randint(3, 5)]
        choices = {"text": rng.sample(sentences, len(labels)), "label": list(labels)}
        question = sentences[number].rstrip(".") + "?"
        rows.append({"id": str(number), "question": question, "choices": choices, "answerKey": rng.choice(labels)})
    return rows


@pytest.fixture
def write_parquet():
    def write(rows: list[dict], *parts) -> Path:
        path = Path(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    return write


@pytest.fixture
def data(tmp_path, text, arc_rows, write_parquet):
    """Local folder with the validation splits of arc_easy and sas_continuation."""
    folder = tmp_path / "data"
    write_parquet(arc_rows, folder, "allenai", "ai2_arc", "ARC-Easy", "validation.parquet")
    make_continuation_task(text, folder, num_questions=10)
    return folder


@pytest.fixture(scope="session")
def benchmark_rows(text):
    """Function: so many rows of a benchmark, different for every benchmark."""
    return partial(toy_rows, text.splitlines())


@pytest.fixture(scope="session")
def benchmarks(benchmark_rows, tmp_path_factory):
    """Local folder with all ten benchmarks: validation splits, MMLU's dev and test."""
    folder = tmp_path_factory.mktemp("benchmarks")

    def write(name: str, split: str, count: int) -> None:
        path = folder / name / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(benchmark_rows(name, count)), path)

    for number, name in enumerate(BENCHMARKS):
        if name != "cais/mmlu":
            write(name, "validation", 6 + number)
    for number, task in enumerate(leaf_names(["mmlu"])):
        for split, count in (("dev", 5), ("test", 1 + number % 2)):
            write(f"cais/mmlu/{task.removeprefix('mmlu_')}", split, count)
    return folder


@pytest.fixture
def hub(benchmark_rows, tmp_path, monkeypatch):
    """Working directory with the seven datasets of Table 1 under their names on the Hub, in the Hub's layout.

    `datasets.load_dataset` reads a folder of that name before it would ask the Hub.
    """
    folder = tmp_path / "hub"
    configs: dict[str, list[str]] = {}
    for name in list(BENCHMARKS)[:7]:
        dataset, _, config = name.rpartition("/")
        configs.setdefault(dataset, []).append(config)
        for split in ("train", "validation", "test"):
            path = folder / dataset / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(benchmark_rows(name, 7)), path)
    for dataset, names in configs.items():
        lines = ["---", "configs:"]
        for name in names:
            lines += [f"- config_name: {name}", "  data_files:"]
            for split in ("train", "validation", "test"):
                lines += [f"  - split: {split}", f"    path: {name}/{split}-*"]
        (folder / dataset / "README.md").write_text("\n".join([*lines, "---", ""]))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder
