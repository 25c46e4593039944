"""Masked language models from recipes: what is masked, when it is masked anew, and that it learns."""

import json

import pytest
import torch
from datasets import Dataset
from helpers import USE_CPU, build_nothing, real_text
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

from sas_hf.data.masking import MaskingCollator, masked_rows
from sas_hf.data.text import train_tokenizer, train_word_tokenizer
from sas_hf.training.arguments import training_arguments
from sas_hf.training.packing import MaskedPacker
from sas_hf.training.recipe import load_recipe
from sas_hf.training.reporting import read_log
from sas_hf.training.run import train
from sas_hf.training.tasks import find_task


ADJECTIVES = ["big", "red", "hot", "far", "old", "low", "dim", "new", "odd", "shy", "dry", "raw", "wet", "wan"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 400}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sentences of six words, four of them always the same."""
    folder = tmp_path_factory.mktemp("texts")
    pairs = [(a, b) for a in range(len(ADJECTIVES)) for b in range(len(ADJECTIVES))]
    for part, held_out in (("train", False), ("validation", True)):
        lines = [f"the {ADJECTIVES[a]} sun is {ADJECTIVES[b]} now" for a, b in pairs if ((a + b) % 4 == 0) == held_out]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return {part: str(folder / f"{part}.jsonl") for part in ("train", "validation")}


def recipe_of(folder, data, *changes, **model):
    recipe = {
        "task": "masked_language_modeling",
        "model": model or {"config": "imdb-standard", "overrides": SMALL},
        "data": {"sequence_length": 16, "cache": str(folder / "cache")} | data,
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 80,
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-2,
            "logging_steps": 40,
            "eval_strategy": "steps",
            "eval_steps": 40,
            "save_strategy": "no",
            "use_cpu": USE_CPU,
        },
    }
    return load_recipe(recipe, list(changes))


def trainer_of(recipe):
    return find_task(recipe.task).make_trainer(recipe, training_arguments(recipe))


@pytest.mark.parametrize("packed", [True, False])
def test_it_learns_and_fills_masks(packed, files, tmp_path):
    results = train(recipe_of(tmp_path, files, f"data.packed={str(packed).lower()}"))
    lines = read_log(tmp_path / "run")
    accuracies = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    assert results["eval_accuracy"] == accuracies[-1] > 0.6
    assert "perplexity" not in results and not any("perplexity" in line for line in lines)
    assert {line["tokens"] for line in lines} == ({40 * 32 * 16, 80 * 32 * 16} if packed else {None})
    fill = pipeline("fill-mask", str(tmp_path / "run"), device="cpu")
    assert fill("the odd [MASK] is far now")[0]["token_str"] == "sun"


def test_training_masks_anew_and_every_evaluation_the_same(files, tmp_path):
    trainers = [trainer_of(recipe_of(tmp_path, files, f"training.seed={seed}")) for seed in (1, 2)]
    tokenizer = trainers[0].processing_class
    evaluated = [next(iter(trainer.get_eval_dataloader())) for trainer in (trainers[0], trainers[0], trainers[1])]
    for batch in evaluated[1:]:
        for name in ("input_ids", "labels"):
            assert torch.equal(batch[name], evaluated[0][name])
    rows = [trainers[0].train_dataset[number] for number in range(64)]
    assert set(rows[0]) == {"input_ids"}
    first, again = (trainers[0].data_collator([dict(row) for row in rows]) for _ in range(2))
    assert not torch.equal(first["labels"], again["labels"])
    ids = torch.tensor([row["input_ids"] for row in rows])
    masked = first["labels"] != -100
    assert torch.equal(first["labels"][masked], ids[masked]) and torch.equal(first["input_ids"][~masked], ids[~masked])
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    assert not (masked & special).any()
    assert 0.1 < masked.float().sum() / (~special).sum() < 0.2  # of 0.15


def test_the_share_of_masked_tokens_is_the_recipes(files, tmp_path):
    trainer = trainer_of(recipe_of(tmp_path, files, "data.mlm_probability=0.6"))
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        batch = trainer.data_collator([dataset[number] for number in range(len(trainer.eval_dataset))])
        special = torch.isin(batch["input_ids"], torch.tensor([2, 3]))
        assert 0.5 < (batch["labels"] != -100).sum() / (~special).sum() < 0.7


def test_documents_are_packed_or_a_row_each():
    texts = ["one two three", "four", "five six seven eight nine ten"]
    tokenizer = train_word_tokenizer(texts, 100)
    packed, apart = (list(MaskedPacker(tokenizer, 5, packed).pack(texts)) for packed in (True, False))
    whole = [token for row in packed for token in row["input_ids"]]
    expected = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert whole == expected[: len(whole)] and len(expected) - len(whole) < 5
    assert [len(row["input_ids"]) for row in packed] == [5] * len(packed)
    cut = tokenizer(texts, truncation=True, max_length=5)["input_ids"]
    assert [row["input_ids"] for row in apart] == cut and [len(row) for row in cut] == [5, 3, 5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_rows_are_padded_with_their_labels(side):
    tokenizer = train_word_tokenizer(["one two three four five six"], 60)
    tokenizer.padding_side = side
    rows = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in ("one two three four", "five")]})
    masked = masked_rows(rows, tokenizer, 0.15)
    torch.manual_seed(7)
    assert masked[:] == masked_rows(rows, tokenizer, 0.15)[:] != masked_rows(rows, tokenizer, 0.15, seed=4)[:]
    batch = MaskingCollator(tokenizer)([masked[0], masked[1]])
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    for row, number in zip(masked, range(2), strict=True):
        real = batch["attention_mask"][number].bool()
        assert batch["labels"][number][real].tolist() == row["labels"]
        assert (batch["labels"][number][~real] == -100).all() and any(label != -100 for label in row["labels"])


def test_a_batch_of_short_texts_has_something_masked():
    """Its mean loss would be that of nothing."""
    tokenizer = train_word_tokenizer(["one two"], 60)
    collator, row = MaskingCollator(tokenizer, mlm_probability=0.02), {"input_ids": tokenizer("one")["input_ids"]}
    torch.manual_seed(0)
    assert all((collator([dict(row)])["labels"] != -100).any() for _ in range(20))
    with pytest.raises(ValueError, match="Nothing is masked in 1000 tries .* tokens that are not special"):
        collator([{"input_ids": tokenizer("")["input_ids"]}])


def test_a_bert_goes_on(files, tmp_path):
    tokenizer = train_word_tokenizer([f"the sun is now {' '.join(ADJECTIVES)}"], 120)
    config = BertConfig(
        vocab_size=120, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    trainer = trainer_of(recipe_of(tmp_path, files, checkpoint=str(tmp_path / "bert")))
    assert type(trainer.model) is BertForMaskedLM
    before = trainer.evaluate()["eval_loss"]
    train(recipe_of(tmp_path, files, checkpoint=str(tmp_path / "bert")))
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "run")) is BertForMaskedLM
    assert AutoTokenizer.from_pretrained(tmp_path / "run").mask_token == "[MASK]"
    losses = [line["eval_loss"] for line in read_log(tmp_path / "run") if "eval_loss" in line]
    assert losses[-1] < before - 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.mlm_probability=0"], "`data.mlm_probability` is 0; it must be between 0 and 1"),
        (["data.mlm_probability=1.5"], "`data.mlm_probability` is 1.5; it must be between 0 and 1"),
        (["data.sequence_length=64"], "`data.sequence_length` is 64, but the model's `max_position_embeddings` is 32"),
        (["model.tokenizer=@gpt"], "The tokenizer has no mask token"),
        (["model.config=sas-125m", "model.overrides={}"], "sas-125m is a sas_gpt that has no AutoModelForMaskedLM"),
        (["data.streaming=true"], "`data.streaming` is True, but `task: masked_language_modeling` does not look"),
        (["training.train_sampling_strategy=group_by_length"], "all sequences are of one length"),
        (["training.label_smoothing_factor=0.1"], "what is masked has one right token"),
        (["training.metric_for_best_model=perplexity"], "an evaluation of this task has loss, accuracy"),
        (["data.train=nowhere.txt"], "`data.train` names nowhere.txt, which does not exist"),
        (["model.lora={rr: 1}"], "`model.lora` has no field 'rr'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_model_is_built(changes, message, files, tmp_path, monkeypatch):
    train_tokenizer("\n".join(real_text()), 300).save_pretrained(tmp_path / "gpt")
    changes = [change.replace("@gpt", str(tmp_path / "gpt")) for change in changes]
    build_nothing(monkeypatch, AutoModelForMaskedLM)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(recipe_of(tmp_path, files, *changes, "training.max_steps=2"))
    assert not (tmp_path / "run" / "recipe.yaml").exists()
