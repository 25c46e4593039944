"""Classifiers of texts and masked language models through `sas-hf eval`: right numbers, clear refusals."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import sas_hf
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from typer.testing import CliRunner

from sas_hf import SASEncoderForSequenceClassification, named_config
from sas_hf.cli import app
from sas_hf.data.text import train_word_tokenizer
from sas_hf.eval import PerplexityText, Report, evaluate_masked, evaluate_texts
from sas_hf.report.measures import jackknife_error, macro_f1


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NAMES = ["bad", "fine", "good"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Forty texts of one to 21 words, of three classes."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(WORDS, rng.integers(1, 22))), "label": NAMES[number % 3], "rating": number / 7}
        for number in range(40)
    ]
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row | {"a": row["label"] == "bad", "b": 1}) + "\n" for row in rows))
    return str(path), rows


SIZE = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Of BERT with classes in another order than the alphabet's, of the package's, and of other heads."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_word_tokenizer(WORDS, 60)
    names = ["good", "bad", "fine"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    config = BertConfig(**SIZE, max_position_embeddings=16, initializer_range=0.5, **labels)
    made = {
        "bert": BertForSequenceClassification(config),
        "other": BertForSequenceClassification(config),
        "rater": BertForSequenceClassification(BertConfig(**SIZE, num_labels=1, initializer_range=0.5)),
        "several": BertForSequenceClassification(
            BertConfig(**SIZE, id2label={0: "a", 1: "b"}, problem_type="multi_label_classification")
        ),
        "sas": SASEncoderForSequenceClassification(named_config("imdb-sas", vocab_size=60, num_labels=3, **labels)),
        "masked": BertForMaskedLM(config),
        "headless": BertModel(config),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def logits_of(model_class, folder, rows, longest=512):
    """One text at a time, without padding."""
    model = model_class.from_pretrained(folder).eval()
    tokenizer = train_word_tokenizer(WORDS, 60)
    ids = [tokenizer(row["text"], truncation=True, max_length=longest)["input_ids"] for row in rows]
    with torch.no_grad():
        return model.config, torch.cat([model(torch.tensor([row])).logits for row in ids])


@pytest.mark.parametrize("batch_size", [1, 7, "auto"])
@pytest.mark.parametrize(
    ("name", "model_class"), [("bert", BertForSequenceClassification), ("sas", SASEncoderForSequenceClassification)]
)
def test_classes_are_scored_one_by_one(name, model_class, batch_size, models, texts):
    place, rows = texts
    config, logits = logits_of(model_class, models[name], rows, longest=16 if name == "bert" else 32)
    labels = torch.tensor([config.label2id[row["label"]] for row in rows])
    losses, predicted = F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1)
    result = evaluate_texts(models[name], place, batch_size=batch_size)
    found = result.tasks["text_classification"]
    assert found.metrics["accuracy"].value == pytest.approx((predicted == labels).double().mean().item())
    assert found.metrics["loss"].value == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.metrics["loss"].stderr == pytest.approx(losses.std().item() / 40**0.5, rel=1e-5)
    assert found.scores["loss"] == pytest.approx(losses.tolist(), rel=1e-4, abs=1e-5)
    scores = []
    for number in range(3):
        right = ((predicted == number) & (labels == number)).sum().item()
        scores.append(2 * right / ((predicted == number).sum() + (labels == number).sum()).item())
    assert found.metrics["f1"].value == pytest.approx(np.mean(scores)) and found.metrics["f1"].stderr > 0
    assert bool(result.num_truncated) == bool(found.notes) == (name == "bert")


def test_the_jackknife_is_the_standard_error_of_a_mean():
    """For a mean it is exactly that; for F1 it is near what samples of the same size spread by."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=200)
    assert jackknife_error(lambda a: a.mean(), values) == pytest.approx(values.std(ddof=1) / 200**0.5)
    draws, errors = [], []
    for _ in range(200):
        labels = rng.integers(0, 3, 300)
        predicted = np.where(rng.random(300) < 0.7, labels, rng.integers(0, 3, 300))
        draws.append(macro_f1(predicted, labels))
        errors.append(jackknife_error(macro_f1, predicted, labels) if len(errors) < 10 else errors[-1])
    assert np.mean(errors[:10]) == pytest.approx(np.std(draws), rel=0.15)
    assert jackknife_error(macro_f1, np.array([1]), np.array([1])) is None


def test_ratings_and_several_labels_are_scored(models, texts):
    place, rows = texts
    _, logits = logits_of(BertForSequenceClassification, models["rater"], rows)
    ratings = np.array([row["rating"] for row in rows])
    found = evaluate_texts(models["rater"], place, label_column="rating").tasks["text_classification"].metrics
    assert found["pearson"].value == pytest.approx(np.corrcoef(logits[:, 0], ratings)[0, 1], rel=1e-4)
    assert found["mse"].value == pytest.approx(((logits[:, 0].numpy() - ratings) ** 2).mean(), rel=1e-4)
    assert set(found) == {"pearson", "spearman", "mse"} and all(metric.stderr > 0 for metric in found.values())
    _, logits = logits_of(BertForSequenceClassification, models["several"], rows)
    flags = torch.tensor([[row["label"] == "bad", True] for row in rows])
    predicted = logits > 0
    found = evaluate_texts(models["several"], place, label_column=["a", "b"]).tasks["text_classification"].metrics
    right = (predicted & flags).sum() * 2 / (predicted.sum() + flags.sum())
    assert found["micro_f1"].value == pytest.approx(right.item())
    assert found["exact_match"].value == pytest.approx((predicted == flags).all(-1).double().mean().item())
    expected = F.binary_cross_entropy_with_logits(logits, flags.float())
    assert found["loss"].value == pytest.approx(expected.item(), rel=1e-5)


def test_one_label_of_several_is_no_rating(models, texts):
    place, _ = texts
    model = BertForSequenceClassification(
        BertConfig(**SIZE, id2label={0: "a"}, problem_type="multi_label_classification", initializer_range=0.5)
    ).eval()
    found = evaluate_texts(model, place, label_column=["a"], tokenizer=models["bert"], batch_size=1)
    metrics = found.tasks["text_classification"].metrics
    assert set(metrics) == {"micro_f1", "exact_match", "loss"}
    with pytest.raises(ValueError, match="a text has a list of labels"):
        evaluate_texts(model, place, label_column="b", tokenizer=models["bert"])


def test_numbered_labels_are_the_models_numbers(models, texts, tmp_path):
    place, rows = texts
    order = ["good", "bad", "fine"].index
    lines = ["text,label", *(f"{row['text']},{order(row['label'])}" for row in rows)]
    (tmp_path / "numbered.csv").write_text("\n".join(lines))
    numbered, named = (evaluate_texts(models["bert"], each) for each in (str(tmp_path / "numbered.csv"), place))
    assert numbered.tasks["text_classification"].scores == named.tasks["text_classification"].scores


def test_the_command_compares_several_models(models, texts, tmp_path):
    run = sas_hf("eval", models["bert"], models["other"], "--texts", texts[0], "--report", tmp_path, "--limit", 30)
    assert run.returncode == 0, run.stderr
    saved = json.loads((tmp_path / "report.json").read_text())
    first, second = (each["tasks"]["text_classification"] for each in saved["results"])
    (differences,) = saved["comparisons"]["differences"].values()
    found = {each["name"]: each for each in differences}
    for metric in ("accuracy", "loss"):
        gaps = np.array(second["scores"][metric]) - np.array(first["scores"][metric])
        each = found[f"text_classification: {metric}"]
        assert each["difference"] == pytest.approx(gaps.mean()) and each["num_samples"] == 30
        assert each["stderr"] == pytest.approx(gaps.std(ddof=1) / 30**0.5)
    assert "f1" in (tmp_path / "report.md").read_text()


def test_masked_tokens_are_found_the_same_every_time(models, texts):
    place, rows = texts
    torch.manual_seed(5)
    results = [evaluate_masked(models["masked"], PerplexityText(place), batch_size=size) for size in (1, 9)]
    first, second = (result.tasks["masked_tokens"] for result in results)
    assert first.questions == second.questions and first.metrics["accuracy"] == second.metrics["accuracy"]
    assert first.metrics["loss"].value == pytest.approx(second.metrics["loss"].value, rel=1e-5)
    # With everything hidden that can be, the model knows where: what it says there is scored, and nothing else.
    found = evaluate_masked(models["masked"], PerplexityText(place), mlm_probability=0.999, limit=1)
    found = found.tasks["masked_tokens"]
    words = min(len(rows[0]["text"].split()), 14)  # and two tokens around them, of 16 positions
    assert found.details["masked_tokens"] == words and found.num_samples == 1 and found.num_available > 40
    assert np.mean(first.scores["loss"]) == pytest.approx(first.metrics["loss"].value)
    assert np.mean(first.scores["accuracy"]) == pytest.approx(first.metrics["accuracy"].value)
    report = Report([results[0], evaluate_masked(models["masked"], PerplexityText(place))])
    assert all(each.difference == pytest.approx(0, abs=1e-6) for each in next(iter(report.comparisons.values())))


def test_a_masked_loss_is_that_of_the_hidden_tokens(models, texts):
    """Of a text of one row: as the model itself gives it for the same masks."""
    from datasets import Dataset

    from sas_hf.data.masking import masked_rows

    place, rows = texts
    tokenizer = train_word_tokenizer(WORDS, 60)
    ids = [tokenizer(row["text"], truncation=True, max_length=16)["input_ids"] for row in rows[:1]]
    masked = masked_rows(Dataset.from_dict({"input_ids": ids}), tokenizer, 0.15)[0]
    model = BertForMaskedLM.from_pretrained(models["masked"]).eval()
    with torch.no_grad():
        expected = model(**{name: torch.tensor([values]) for name, values in masked.items()}).loss
    found = evaluate_masked(models["masked"], PerplexityText(place), limit=1).tasks["masked_tokens"]
    assert found.metrics["loss"].value == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bert", "--texts", "T", "--tasks", "piqa"], "Give either `--tasks` or `--perplexity`"),
        (["bert", "--texts", "T", "--stride", "2"], "`--stride` is 2, but labelled texts are scored without it"),
        (
            ["bert", "--texts", "T", "--mlm-probability", "0.2"],
            "`--mlm-probability` is 0.2, but there is no `--masked",
        ),
        (
            ["masked", "--masked-text", "T", "--label-column", "x"],
            "`--label-column` is 'x', but there are no `--texts`",
        ),
        (
            ["bert", "--texts", "T", "--label-column", "labels"],
            "`label_column` is 'labels', which .* did you mean 'label'",
        ),
        (
            ["bert", "--texts", "T", "--label-column", "rating"],
            "holds '0' in line 1 of .*, which is none of the labels",
        ),
        (["masked", "--texts", "T"], "holds a BertForMaskedLM, which has no classifier: it is no text classifier yet"),
        (["bert", "--masked-text", "T"], "holds a BertForSequenceClassification, which has no classifier"),
        (["masked", "--masked-text", "T", "--mlm-probability", "1"], "`mlm_probability` is 1.0; it must be between"),
        (["masked", "--masked-text", "none.txt"], "there is no such file"),
        (["imdb-standard", "--texts", "T"], "is a named configuration, which has no weights"),
        (["masked", "--perplexity", "T"], "no causal language model head; `sas-hf eval` scores others"),
        (["sas", "--perplexity", "T"], "needs a causal decoder; score this model on a task of its own"),
        (["bert", "--images", "T"], "which has no image classifier; .* a classifier of texts with `--texts`"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, message, models, texts):
    places = [models.get(part, texts[0] if part == "T" else part) for part in arguments]
    run = CliRunner().invoke(app, ["eval", *places])
    assert run.exit_code == 1
    assert re.search(message, " ".join(run.stderr.split())), run.stderr
