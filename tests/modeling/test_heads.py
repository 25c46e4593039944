"""The heads: where their logits come from, and their losses."""

import pytest
import torch
from helpers import gpt, left_padded, scramble, token_ids
from torch.nn import functional as F

from sas_hf import (
    SASEncoderForSequenceClassification,
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    named_config,
)


@pytest.fixture
def classifier():
    return gpt("sas_k5_gqa", model_class=SASGPTForSequenceClassification, num_labels=3)


def padded(side: str):
    ids, mask = left_padded(9, 5, 1)
    return (ids, mask) if side == "left" else (ids.flip(1), mask.flip(1))


@pytest.mark.parametrize(
    ("side", "told_by"),
    # Without a mask padding is seen as text, which is harmless behind the last token alone.
    [(side, told_by) for side in ("left", "right") for told_by in ("mask", "embeddings and mask")]
    + [("right", "pad token")],
)
@torch.no_grad()
def test_sequences_are_classified_by_their_last_token(classifier, side, told_by):
    ids, mask = padded(side)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if told_by == "pad token":
        classifier.config.pad_token_id = 0
        inputs = {}
    if told_by == "embeddings and mask":
        logits = classifier(inputs_embeds=classifier.get_input_embeddings()(ids), **inputs).logits
    else:
        logits = classifier(ids, **inputs).logits
    for row, real in enumerate(mask.bool()):
        alone = classifier(ids[row, real][None])
        torch.testing.assert_close(logits[row], alone.logits[0], atol=1e-4, rtol=0)
        hidden = classifier.model(ids[row, real][None]).last_hidden_state[0, -1]
        torch.testing.assert_close(alone.logits[0], F.linear(hidden, classifier.score.weight), atol=1e-5, rtol=0)


def test_several_rows_of_unknown_length_are_refused(classifier):
    with pytest.raises(ValueError, match="padding token"):
        classifier(token_ids(2, 5))


def test_sequence_classification_losses():
    ids, mask = left_padded(9, 5)
    for problem, labels, loss in (
        ("single_label_classification", torch.tensor([2, 0]), F.cross_entropy),
        ("regression", torch.randn(2, 3), F.mse_loss),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1]]), F.binary_cross_entropy_with_logits),
    ):
        model = gpt("sas", model_class=SASGPTForSequenceClassification, num_labels=3, problem_type=problem)
        output = model(ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(output.loss, loss(output.logits, labels))


def test_causal_loss_is_shifted():
    model, ids = gpt("sas"), token_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_token_classification():
    model = gpt("sas", model_class=SASGPTForTokenClassification, num_labels=3)
    ids, labels = token_ids(2, 9), torch.randint(3, (2, 9))
    labels[1, 5:] = -100
    output = model(ids, labels=labels)
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(output.logits, F.linear(hidden, model.score.weight, model.score.bias))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))


def test_question_answering():
    model = gpt("sas", model_class=SASGPTForQuestionAnswering)
    ids, starts, ends = token_ids(2, 9), torch.tensor([1, 4]), torch.tensor([3, 8])
    output = model(ids, start_positions=starts, end_positions=ends)
    logits = F.linear(model.model(ids).last_hidden_state, model.qa_outputs.weight, model.qa_outputs.bias)
    torch.testing.assert_close(torch.stack((output.start_logits, output.end_logits), dim=-1), logits)
    expected = (F.cross_entropy(output.start_logits, starts) + F.cross_entropy(output.end_logits, ends)) / 2
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["standard", "optimised", "efficient", "super", "sas"])
def test_the_second_papers_text_classifiers(kind, side):
    """IMDB's configuration: an encoder that averages its tokens; padding counts for nothing, and it trains."""
    config = named_config(f"imdb-{kind}", vocab_size=67, initializer_range=0.3, token_mixing_init="normal")
    model = scramble(SASEncoderForSequenceClassification(config))
    ids = token_ids(1, 12)
    padding = torch.zeros(1, 5, dtype=torch.long)
    padded = torch.cat((padding, ids) if side == "left" else (ids, padding), dim=1)
    logits = model(padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=0)

    hidden_states = model.model(ids).last_hidden_state
    torch.testing.assert_close(logits, model.classifier(hidden_states.mean(dim=1)), atol=1e-4, rtol=0)
    model(ids, labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
