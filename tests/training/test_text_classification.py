"""Classifiers of texts from recipes: classes, several labels, ratings, pairs; refused before a model is built."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value
from helpers import USE_CPU, assert_identical, build_nothing, python_environment, real_text
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    pipeline,
)

from sas_hf import SASEncoderForMaskedLM, named_config
from sas_hf.data.labelled_text import Columns, find_labels, from_dataset, number_labels
from sas_hf.data.text import train_word_tokenizer
from sas_hf.training.arguments import training_arguments
from sas_hf.training.recipe import load_recipe
from sas_hf.training.run import train
from sas_hf.training.study import Study, run_study
from sas_hf.training.tasks import find_task
from sas_hf.training.tasks.text_classification import class_measures, rating_measures, several_measures


WORDS = {"bad": ["awful", "dull", "poor"], "fine": ["decent", "fair", "plain"], "good": ["bright", "lovely", "superb"]}
NEUTRAL = ["the", "film", "was", "a", "story", "about", "people", "and", "places"]


def reviews(count, seed=0, names=("bad", "fine", "good")):
    """Texts of three to twelve words, one of which tells the class."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        name = names[number % len(names)]
        words = [rng.choice(NEUTRAL) for _ in range(rng.randint(2, 11))]
        words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS[name]))
        rows.append({"text": f"{' '.join(words)} {number + 1000 * seed}", "label": name})
    return rows


def write(path, rows):
    """A table of the kind that the name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
        path.write_text("".join(mark.join(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    return {
        "train": write(folder / "train.csv", reviews(240)),
        "validation": write(folder / "validation.csv", reviews(60, 1)),
    }


SMALL = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 300}


def recipe_of(folder, data, *changes, **model):
    recipe = {
        "task": "text_classification",
        "model": model or {"config": "imdb-standard", "overrides": SMALL},
        "data": data,
        "training": {
            "output_dir": str(folder),
            "num_train_epochs": 6,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 7,  # the last batch is smaller than the others
            "learning_rate": 1e-2,
            "logging_steps": 10,
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "use_cpu": USE_CPU,
        },
    }
    return load_recipe(recipe, list(changes))


def trainer_of(recipe):
    return find_task("text_classification").make_trainer(recipe, training_arguments(recipe))


@pytest.mark.parametrize("kind", ["standard", "super", "sas"])
def test_it_learns_and_what_is_saved_classifies_texts(kind, files, tmp_path):
    model = {"config": f"imdb-{kind}", "overrides": {name: SMALL[name] for name in ("vocab_size",)}}
    results = train(recipe_of(tmp_path / "run", files, **model))
    assert results["eval_accuracy"] > 0.95 and results["eval_f1"] > 0.95 and "perplexity" not in results
    classify = pipeline("text-classification", str(tmp_path / "run"), device="cpu")
    assert classify("a superb story about places")[0]["label"] == "good"
    texts = [row["text"] for row in reviews(60, 1)]
    found = [each["label"] for each in classify(texts)]
    right = np.mean([name == row["label"] for name, row in zip(found, reviews(60, 1), strict=True)])
    assert right == pytest.approx(results["eval_accuracy"])
    config = classify.model.config
    assert config.id2label == {0: "bad", 1: "fine", 2: "good"} and config.problem_type == "single_label_classification"
    assert config.pad_token_id == classify.tokenizer.pad_token_id == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "text-classification" in card and "AutoModelForSequenceClassification.from_pretrained" in card
    assert (tmp_path / "run" / "loss.png").is_file()


def test_the_same_recipe_is_the_same_training_and_a_killed_run_goes_on(files, tmp_path):
    """Its own tokenizer, too: in other processes, whose hashes differ."""
    script = "import sys; from sas_hf.training.recipe import load_recipe; from sas_hf.training.run import train\n"
    script += "train(load_recipe(sys.argv[1], sys.argv[2:]))"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of("x", files).to_dict()))

    def run(name, *changes):
        changes = [f"training.output_dir={tmp_path / name}", "training.save_strategy=steps", *changes]
        command = [sys.executable, "-c", script, str(tmp_path / "recipe.yaml"), "training.save_steps=5", *changes]
        done = subprocess.run(command, env=python_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    whole, again = run("whole", "training.max_steps=10"), run("part", "training.max_steps=10")
    for name in ("all_results.json", "model.safetensors"):  # as if killed after its first checkpoint
        (again / name).unlink()
    for path in (again / "checkpoint-10").iterdir():
        path.unlink()
    (again / "checkpoint-10").rmdir()
    again = run("part", "training.max_steps=10")
    assert_identical(load_file(again / "model.safetensors"), load_file(whole / "model.safetensors"))
    assert (again / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("vocab_size", [60, 200, 2000])
def test_a_word_tokenizer_is_the_same_for_the_same_texts(vocab_size):
    texts = [line for text in real_text() for line in text.splitlines()][:400]
    script = "import json, sys; from sas_hf.data.text import train_word_tokenizer\n"
    script += "texts, size = json.load(sys.stdin); sys.stdout.write("
    script += "train_word_tokenizer(texts, size).backend_tokenizer.to_str())"
    command, given = [sys.executable, "-c", script], json.dumps([texts, vocab_size])
    runs = [
        subprocess.run(command, input=given, env=python_environment(), capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    tokenizer = train_word_tokenizer(texts, vocab_size)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert vocab_size == 60 or len(tokenizer) <= vocab_size
    pair = tokenizer("one", "two")
    assert tokenizer.decode(pair["input_ids"]) == "[CLS] one [SEP] two [SEP]"
    assert pair["token_type_ids"][-1] == 1 and tokenizer("one")["input_ids"] == tokenizer("ONE")["input_ids"]


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "parquet"])
def test_all_tables_hold_the_same(suffix, files, tmp_path):
    data = {
        "train": write(tmp_path / f"train.{suffix}", reviews(240)),
        "validation": write(tmp_path / f"validation.{suffix}", reviews(60, 1)),
    }
    ours, expected = (trainer_of(recipe_of(tmp_path / "x", each)) for each in (data, files))
    for name in ("train_dataset", "eval_dataset"):
        assert getattr(ours, name)[:] == getattr(expected, name)[:]


def test_pairs_are_told_apart_by_token_types(tmp_path):
    """The answer is in which of the two a word is; where it is in the row tells nothing, as lengths vary."""
    rng, rows = random.Random(0), []
    for number in range(400):
        texts = [rng.choices(NEUTRAL, k=rng.randint(0, 8)) for _ in range(2)]
        in_first = number % 2 == 0
        texts[0 if in_first else 1].append("superb")
        rows.append({"a": " ".join(["so", *texts[0]]), "b": f"{' '.join(texts[1])} {number}", "first": in_first})
    data = {
        "train": write(tmp_path / "train.jsonl", rows[:300]),
        "validation": write(tmp_path / "validation.jsonl", rows[300:]),
        "text_column": "a",
        "second_text_column": "b",
        "label_column": "first",
    }
    model = {"config": "imdb-standard", "overrides": {"type_vocab_size": 2, "vocab_size": 400}}
    recipe = recipe_of(tmp_path / "run", data, "training.num_train_epochs=8", **model)
    trainer = trainer_of(recipe)
    row = trainer.train_dataset[0]
    separated = trainer.processing_class.decode(row["input_ids"])
    assert separated.count("[SEP]") == 2 and set(row["token_type_ids"]) == {0, 1}
    assert trainer.model.config.id2label == {0: "False", 1: "True"}
    assert train(recipe)["eval_accuracy"] > 0.9


def test_token_types_are_left_out_where_a_model_has_none(bert, tmp_path):
    """Of a tokenizer that makes them: a model without would refuse them in the first step."""
    rows = [row | {"other": "so it is"} for row in reviews(40)]
    data = {"train": write(tmp_path / "train.csv", rows), "second_text_column": "other"}
    model = {"config": "imdb-standard", "overrides": SMALL, "tokenizer": str(bert / "masked")}
    changes = ("training.eval_strategy=no", "training.max_steps=1")
    trainer = trainer_of(recipe_of(tmp_path / "run", data, *changes, **model))
    trainer.train()
    trainer.save_model()
    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert set(saved("one", "two")) == {"input_ids", "attention_mask"}


def test_ratings_are_predicted(tmp_path):
    value = {"bad": -1.5, "fine": 0.25, "good": 2.0}
    rows = [row | {"label": value[row["label"]]} for row in reviews(300)]
    data = {
        "train": write(tmp_path / "train.csv", rows[:240]),
        "validation": write(tmp_path / "validation.csv", rows[240:]),
    }
    results = train(recipe_of(tmp_path / "run", data))
    assert results["eval_pearson"] > 0.9 and results["eval_spearman"] > 0.8 and results["eval_mse"] < 0.5
    assert results["eval_mse"] == pytest.approx(results["eval_loss"], rel=1e-4)  # 60 texts in batches of 7
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config
    assert config.num_labels == 1 and config.problem_type == "regression"


@pytest.mark.parametrize("form", ["columns", "flags", "names", "classes"])
def test_a_text_may_have_several_labels(form, tmp_path):
    rng, rows = random.Random(0), []
    for number in range(300):
        has = [rng.random() < 0.4 for _ in WORDS]
        words = [word for name, flag in zip(WORDS, has, strict=True) if flag for word in [WORDS[name][number % 3]]]
        words += rng.choices(NEUTRAL, k=4)
        rng.shuffle(words)
        row = {"text": f"{' '.join(words)} {number}"}
        if form == "columns":
            row |= {name: int(flag) for name, flag in zip(WORDS, has, strict=True)}
        elif form == "flags":
            row["label"] = [int(flag) for flag in has]
        else:
            row["label"] = [name for name, flag in zip(WORDS, has, strict=True) if flag]
        rows.append(row)
    if form == "classes":
        features = Features({"text": Value("string"), "label": List(ClassLabel(names=list(WORDS)))})
        dataset = Dataset.from_list(rows, features=features)
        read = from_dataset(dataset, Columns(), "x")
        labels = find_labels(read)
        assert labels.problem_type == "multi_label_classification" and labels.names == list(WORDS)
        expected = [[float(name in row["label"]) for name in WORDS] for row in rows]
        assert number_labels(read, labels) == expected
        return
    suffix = "csv" if form == "columns" else "jsonl"
    data = {
        "train": write(tmp_path / f"train.{suffix}", rows[:240]),
        "validation": write(tmp_path / f"validation.{suffix}", rows[240:]),
    }
    data |= {"label_column": list(WORDS)} if form == "columns" else {}
    data |= {"class_names": list(WORDS)} if form == "flags" else {}
    results = train(recipe_of(tmp_path / "run", data, "training.num_train_epochs=12"))
    assert results["eval_micro_f1"] > 0.9 and results["eval_exact_match"] > 0.8
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config
    assert config.problem_type == "multi_label_classification" and list(config.id2label.values()) == list(WORDS)


def test_measures_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)), rng.integers(0, 3, 50)  # no text of the last class
    predicted, scores = logits.argmax(-1), []
    for number in range(4):
        right = np.sum((predicted == number) & (labels == number))
        precision = right / max(1, np.sum(predicted == number))
        recall = right / max(1, np.sum(labels == number))
        scores.append(2 * precision * recall / max(precision + recall, 1e-12))
    found = class_measures(SimpleNamespace(predictions=logits, label_ids=labels))
    assert found == pytest.approx({"accuracy": np.mean(predicted == labels), "f1": np.mean(scores)})

    truth, guess = rng.normal(size=30), rng.normal(size=(30, 1))
    guess[:, 0] += truth**3
    found = rating_measures(SimpleNamespace(predictions=guess, label_ids=truth))
    ranks = [np.argsort(np.argsort(values)) for values in (guess[:, 0], truth)]
    assert found["spearman"] == pytest.approx(1 - 6 * np.sum((ranks[0] - ranks[1]) ** 2) / (30 * (30**2 - 1)))
    assert found["pearson"] == pytest.approx(np.corrcoef(guess[:, 0], truth)[0, 1]) and found["mse"] > 0
    flat = rating_measures(SimpleNamespace(predictions=np.ones((30, 1)), label_ids=truth))
    assert flat["pearson"] == flat["spearman"] == 0.0

    logits, flags = rng.normal(size=(40, 3)), rng.random((40, 3)) < 0.4
    found = several_measures(SimpleNamespace(predictions=logits, label_ids=flags.astype(float)))
    right = np.sum((logits > 0) & flags)
    precision, recall = right / np.sum(logits > 0), right / np.sum(flags)
    assert found["micro_f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["exact_match"] == np.mean([np.array_equal(a > 0, b) for a, b in zip(logits, flags, strict=True)])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT of three named classes, in another order than the alphabet's, and one for masked tokens."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = train_word_tokenizer([row["text"] for row in reviews(240)], 200)
    config = BertConfig(
        vocab_size=200,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        id2label=dict(enumerate(["good", "bad", "fine"])),
        label2id={"good": 0, "bad": 1, "fine": 2},
    )
    torch.manual_seed(0)
    for name, model_class in (("classifier", BertForSequenceClassification), ("masked", BertForMaskedLM)):
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_a_checkpoint_keeps_the_order_of_its_classes(bert, files, tmp_path):
    trainer = trainer_of(recipe_of(tmp_path / "x", files, checkpoint=str(bert / "classifier")))
    assert list(trainer.model.config.id2label.values()) == ["good", "bad", "fine"]
    expected = ["good", "bad", "fine"].index
    assert trainer.train_dataset["labels"][:] == [expected(row["label"]) for row in reviews(240)]
    numbered = [row | {"label": ["good", "bad", "fine"].index(row["label"])} for row in reviews(240)]
    data = {"train": write(tmp_path / "train.csv", numbered)}
    named = trainer_of(
        recipe_of(tmp_path / "x", data, "training.eval_strategy=no", checkpoint=str(bert / "classifier"))
    )
    assert named.train_dataset["labels"][:] == trainer.train_dataset["labels"][:]
    assert named.model.config.id2label == trainer.model.config.id2label


def test_a_masked_language_model_becomes_a_classifier(bert, files, tmp_path):
    """Its classifier and its pooler, which it has not, begin anew and are told of; all else is the checkpoint's."""
    recipe = recipe_of(tmp_path / "run", files, "training.learning_rate=5e-3", checkpoint=str(bert / "masked"))
    with (
        pytest.warns(UserWarning, match="begins anew: .*masked is a BertForMaskedLM of 3 classes, the texts have 3"),
        pytest.warns(UserWarning, match="masked has no pooler; it begins anew and must be trained, too"),
    ):
        model = trainer_of(recipe).model
    expected = BertForMaskedLM.from_pretrained(bert / "masked").bert.state_dict()
    assert all(torch.equal(model.bert.state_dict()[name], expected[name]) for name in expected)
    ours = SASEncoderForMaskedLM(named_config("imdb-sas", vocab_size=200, pooler_act="tanh"))
    ours.save_pretrained(tmp_path / "sas")
    AutoTokenizer.from_pretrained(bert / "masked").save_pretrained(tmp_path / "sas")
    with pytest.warns(UserWarning, match="has no pooler"):
        results = train(recipe_of(tmp_path / "tuned", files, checkpoint=str(tmp_path / "sas")))
    assert results["eval_accuracy"] > 0.9


def test_decoders_classify_padded_texts(files, tmp_path):
    model = {"config": "sas-125m", "tokenizer": "python-reference"}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 2048, "head_dim": 8}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_simulated_heads": 4, "simulated_head_dim": 12}
    trainer = trainer_of(recipe_of(tmp_path / "run", files, **model | {"overrides": small}))
    config = trainer.model.config
    assert config.pad_token_id == trainer.processing_class.pad_token_id == config.eos_token_id
    rows = [trainer.train_dataset[number] for number in range(5)]
    batch = trainer.data_collator(rows)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    trainer.model.eval()
    labels = batch.pop("labels")
    together = trainer.model(**batch).logits
    alone = torch.cat([trainer.model(torch.tensor([row["input_ids"]])).logits for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert labels.tolist() == [row["labels"] for row in rows]


def test_texts_beyond_the_positions_are_cut_aloud(files, tmp_path):
    long = [row | {"text": row["text"] + " and places" * (number == 7) * 20} for number, row in enumerate(reviews(60))]
    data = {"train": write(tmp_path / "train.csv", long)}
    with pytest.warns(
        UserWarning, match=r"1 of 60 texts of .*train.csv have more than 32 tokens \(the model's positi"
    ):
        trainer = trainer_of(recipe_of(tmp_path / "x", data, "training.eval_strategy=no"))
    assert max(map(len, trainer.train_dataset["input_ids"])) == 32
    assert trainer.train_dataset[7]["input_ids"][-1] == trainer.processing_class.sep_token_id
    changes = ("training.eval_strategy=no", "data.sequence_length=9")
    with pytest.warns(UserWarning, match=r"more than 9 tokens \(`data.sequence_length`\)"):
        assert max(map(len, trainer_of(recipe_of(tmp_path / "x", data, *changes)).train_dataset["input_ids"])) == 9


def test_some_texts_are_held_out_at_random(tmp_path):
    """Of a file that is sorted by class, where the first ones were of one class."""
    rows = sorted(reviews(90), key=lambda row: row["label"])
    data = {"train": write(tmp_path / "train.csv", rows), "validation_documents": 30}
    trainers = [trainer_of(recipe_of(tmp_path / "x", data, f"training.seed={seed}")) for seed in (1, 2)]
    held_out = [trainer.eval_dataset["input_ids"][:] for trainer in trainers]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 30 and len(trainers[0].train_dataset) == 60
    assert set(trainers[0].eval_dataset["labels"]) == {0, 1, 2}
    assert not any(ids in held_out[0] for ids in trainers[0].train_dataset["input_ids"])


def rows_with(change, number=5):
    rows = reviews(30)
    rows[number] |= change
    return rows


REFUSED = {
    "no column": (
        {},
        ["data.text_column=words"],
        "`data.text_column` is 'words', which .* Its columns are text, label",
    ),
    "near column": ({}, ["data.label_column=labels"], "`data.label_column` is 'labels'.*did you mean 'label'"),
    "no second": ({}, ["data.second_text_column=b"], "`data.second_text_column` is 'b', which .* does not have"),
    "empty text": ({"train": rows_with({"text": "  "})}, [], r"which is empty in line 7 of .*train.csv; leave such"),
    "empty label": (
        {"train": rows_with({"label": ""})},
        [],
        "`data.label_column` is 'label', which is empty in line 7",
    ),
    "one class": ({"train": reviews(9, 0, ["bad"])}, [], "All texts of .*train.csv have the label 'bad'; there must"),
    "other label": (
        {"validation": rows_with({"label": "odd"})},
        [],
        "holds 'odd' in line 7 of .*validation.csv, which is none of the labels bad, fine, good",
    ),
    "no such number": (
        {
            "train": [row | {"label": 1 + number % 3} for number, row in enumerate(reviews(30))],
            "validation": [row | {"label": number % 3} for number, row in enumerate(reviews(30, 1))],
        },
        [],
        "holds '0' in line 2 of .*validation.csv, which is none of the labels 1, 2, 3",
    ),
    "no such class": ({}, ["data.class_names=[bad,fine,good,best]"], "No text of .*train.csv has the label 'best'"),
    "other class": ({}, ["data.class_names=[bad,good]"], "but .*train.csv has 'fine', too"),
    "whole floats": (
        {"train": [{"text": "a", "label": 1.0}, {"text": "b", "label": 2.0}]},
        [],
        "are whole, such as 1.0",
    ),
    "no number": (
        {},
        ["model.overrides.problem_type=regression"],
        "`data.label_column` holds 'bad' in line 2 of .*, which is no number",
    ),
    "one label each": (
        {},
        ["model.overrides.problem_type=multi_label_classification"],
        "`problem_type` is 'multi_label_classification', but `data.label_column` holds 'bad'",
    ),
    "no kind": ({}, ["model.overrides.problem_type=classes"], "`problem_type` is 'classes'; it must be"),
    "lists as text": ({"train": rows_with({"label": "[0 1]"})}, [], r"holds '\[0 1\]', a list as text"),
    "nan among ratings": (
        {"train": [row | {"label": number / 7 if number else "nan"} for number, row in enumerate(reviews(30))]},
        [],
        "holds the number '0.14.*' in line 3 of .*, but 'nan' in line 2",
    ),
    "a class with a space": (
        {"train": rows_with({"label": "good "})},
        [],
        "holds 'good' and 'good ', which seem",
    ),
    "a class in capitals": ({"train": rows_with({"label": "Good"})}, [], "holds 'Good' and 'good', which seem to be"),
    "two forms of Unicode": (
        {"train": rows_with({"label": "caf\u00e9"}) + rows_with({"label": "cafe\u0301"})},
        [],
        r"holds 'cafe\\u0301' and 'caf\\xe9', which seem to be one label",
    ),
    "zeros in front": (
        {"train": [row | {"label": ["1", "2", "01"][number % 3]} for number, row in enumerate(reviews(30))]},
        [],
        "holds '01' and '1', which seem to be one label",
    ),
    "same file": ({}, ["data.validation=@train"], "train.csv, which is trained on, too"),
    "same texts": ({"validation": reviews(30)[::-1]}, [], "All texts to validate on are trained on, too"),
    "two validations": ({}, ["data.validation_documents=5"], "are both given"),
    "split of a file": ({}, ["data.validation=null", "data.validation_split=test"], "only a dataset of the Hub has"),
    "all held out": ({}, ["data.validation=null", "data.validation_documents=30"], "must be at least 1 and less"),
    "number of labels": ({}, ["model.overrides.num_labels=4"], "`model.overrides.num_labels` is 4, but the data say"),
    "positions": ({}, ["data.sequence_length=33"], "is 33, but the model has positions for 32 tokens"),
    "no classifier": ({}, ["model.config=mnist-sas"], "mnist-sas is a sas_vit that is no text classifier"),
    "conversion": ({}, ["model.conversion={}"], "`model.conversion` is {}, of a checkpoint"),
    "other metric": ({}, ["training.metric_for_best_model=pearson"], "an evaluation has accuracy, f1, loss"),
    "no metric": ({}, ["training.metric_for_best_model=bleu"], "an evaluation of this task has loss, accuracy, f1"),
    "small vocabulary": ({}, ["model.overrides.vocab_size=9"], "tokens, but the model's `vocab_size` is 9"),
    "lora": ({}, ["model.lora={rr: 1}"], "`model.lora` has no field 'rr'"),
    "text file": ({}, ["data.train=@text"], "is read as text; labelled texts are in tables"),
    "no file": ({}, ["data.train=nowhere.csv"], "`data.train` names nowhere.csv, which does not exist"),
    "streaming": ({}, ["data.streaming=true", "training.max_steps=1"], "does not look at it"),
}


@pytest.mark.filterwarnings("ignore:.*are trained on, too")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_before_a_model_is_built(name, tmp_path, monkeypatch):
    tables, changes, message = REFUSED[name]
    (tmp_path / "notes.txt").write_text("text")
    data = {
        part: write(tmp_path / f"{part}.csv", tables.get(part, reviews(30, seed)))
        for part, seed in (("train", 0), ("validation", 1))
    }
    places = {"@train": data["train"], "@text": str(tmp_path / "notes.txt")}
    for short, place in places.items():
        changes = [change.replace(short, place) for change in changes]
    build_nothing(monkeypatch, AutoModelForSequenceClassification)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(recipe_of(tmp_path / "run", data, *changes))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"a": 1}, {"a": 2}], r"in row 1 of x that holds {'a': 1} \(dict\), which is neither text nor a number"),
        ([b"x", b"y"], r"holds b'x' \(bytes\)"),
        ([[b"x"], [b"y"]], r"holds \[b'x'\] \(bytes\)"),
        ([[], []], "No text of x has any label"),
        ([["a", "b"], ["B"]], "holds 'B' and 'b', which seem to be one label"),
    ],
)
def test_what_is_no_label_is_refused(labels, message):
    rows = Dataset.from_list([{"text": "t", "label": label} for label in labels])
    with pytest.raises(ValueError, match=message):
        find_labels(from_dataset(rows, Columns(), "x"))


def test_labels_that_look_alike_may_be_named(tmp_path):
    names = ["Good", "good", "7", "07", "nan"]
    rows = [row | {"label": names[number % 5]} for number, row in enumerate(reviews(30))]
    data = {"train": write(tmp_path / "train.csv", rows), "class_names": names}
    trainer = trainer_of(recipe_of(tmp_path / "x", data, "training.eval_strategy=no"))
    assert trainer.train_dataset["labels"][:5] == [0, 1, 2, 3, 4]


def test_smoothing_of_ratings_is_refused(tmp_path):
    rows = [row | {"label": len(row["text"]) / 7} for row in reviews(40)]
    data = {"train": write(tmp_path / "train.csv", rows)}
    changes = ["training.label_smoothing_factor=0.1", "training.eval_strategy=no"]
    with pytest.raises(ValueError, match="`training.label_smoothing_factor` is 0.1, which is of classes"):
        train(recipe_of(tmp_path / "run", data, *changes))


def test_studies_compare_what_the_labels_are_measured_by(files, tmp_path):
    value = {"bad": -1.5, "fine": 0.25, "good": 2.0}
    rated = {}
    for part, seed in (("train", 0), ("validation", 1)):
        rows = [row | {"label": value[row["label"]]} for row in reviews(60, seed)]
        rated[part] = write(tmp_path / f"{part}.csv", rows)

    def study(data, name, **fields):
        recipe = recipe_of("x", data, "training.max_steps=8").to_dict()
        del recipe["training"]["output_dir"]
        variants = {"standard": {}, "efficient": {"model": {"config": "imdb-efficient"}}}
        return Study(recipe=recipe, variants=variants, seeds=[0, 1], output=str(tmp_path / name), **fields)

    report = run_study(study(files, "classes", metric="f1"))
    grid = report.grids()[0]
    assert grid.header[:4] == ["variant", "validation accuracy", "macro F1", "validation loss"]
    assert report.draw().axes[0].get_ylabel() == "macro F1"
    for run in report.runs:
        saved = json.loads((tmp_path / "classes" / run.variant / f"seed-{run.seed}" / "all_results.json").read_text())
        assert run.metrics["f1"] == saved["eval_f1"] and run.chance == {"accuracy": 1 / 3}
    grid = run_study(study(rated, "ratings")).grids()[0]
    assert grid.header[1:4] == ["Pearson's r", "Spearman's rank correlation", "mean squared error"]
    with pytest.raises(ValueError, match="`f1` is no `metric` of the task text_classification; known are pearson"):
        run_study(study(rated, "other", metric="f1"))
