"""The SAS encoder: BERT on the same weights, what padding and packing do, its heads and their losses."""

import pytest
import torch
from helpers import ENCODER_BASE, ENCODER_VARIANTS, encoder, left_padded, scramble, token_ids
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from sas_hf import (
    SASEncoderConfig,
    SASEncoderForMaskedLM,
    SASEncoderForMultipleChoice,
    SASEncoderForQuestionAnswering,
    SASEncoderForSequenceClassification,
    SASEncoderForTokenClassification,
    SASEncoderModel,
)


# Names in BERT, and here; in this order.
NAMES = {
    "bert.": "model.",
    "embeddings.word_embeddings": "embeddings.embed_tokens",
    "embeddings.position_embeddings": "embeddings.embed_positions",
    "embeddings.LayerNorm": "embeddings.norm",
    "encoder.layer": "layers",
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.o_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "final_layer_norm",
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
    "cls.predictions.decoder": "lm_head.decoder",
    "cls.predictions.bias": "lm_head.decoder.bias",
}
HEADS = {
    BertModel: SASEncoderModel,
    BertForMaskedLM: SASEncoderForMaskedLM,
    BertForSequenceClassification: SASEncoderForSequenceClassification,
    BertForTokenClassification: SASEncoderForTokenClassification,
    BertForQuestionAnswering: SASEncoderForQuestionAnswering,
    BertForMultipleChoice: SASEncoderForMultipleChoice,
}


def bert_and_ours(bert_class, **fields):
    """A random BERT in evaluation mode, and a SAS encoder with its weights."""
    bert = scramble(bert_class(BertConfig(**ENCODER_BASE | {"num_labels": 3} | fields)))
    ours = HEADS[bert_class](
        SASEncoderConfig(**ENCODER_BASE | {"num_labels": 3, "padding_takes_positions": True} | fields)
    )
    weights = {}
    for name, weight in bert.state_dict().items():
        for theirs, here in NAMES.items():
            name = name.replace(theirs, here)
        weights[name] = weight
    ours.load_state_dict(weights)
    return bert, ours.eval()


def pairs(choices: int | None = None) -> dict[str, torch.Tensor]:
    """Two rows, one padded on the right and one on the left, of two texts each."""
    shape = (2, 9) if choices is None else (2, choices, 9)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, ..., 6:] = 0
    mask[1, ..., :2] = 0
    return {"input_ids": token_ids(*shape), "attention_mask": mask, "token_type_ids": torch.randint(2, shape)}


LABELS = {
    BertModel: {},
    BertForMaskedLM: {"labels": torch.randint(67, (2, 9))},
    BertForSequenceClassification: {"labels": torch.tensor([2, 0])},
    BertForTokenClassification: {"labels": torch.randint(3, (2, 9))},
    BertForQuestionAnswering: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])},
    BertForMultipleChoice: {"labels": torch.tensor([3, 0])},
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("bert_class", HEADS, ids=lambda c: c.__name__)
@torch.no_grad()
def test_equals_bert(bert_class, implementation):
    bert, ours = bert_and_ours(bert_class, num_labels=2 if bert_class is BertForQuestionAnswering else 3)
    inputs = pairs(4 if bert_class is BertForMultipleChoice else None) | LABELS[bert_class]
    bert.set_attn_implementation(implementation)
    ours.set_attn_implementation(implementation)
    expected, found = bert(**inputs), ours(**inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_equals_bert_in_its_gradients():
    bert, ours = bert_and_ours(BertForSequenceClassification)
    inputs = pairs()
    for model in (bert, ours):
        model(**inputs, labels=torch.tensor([1, 2])).loss.backward()
    first, last = bert.bert.embeddings.word_embeddings.weight.grad, ours.model.embeddings.embed_tokens.weight.grad
    torch.testing.assert_close(last, first)


@pytest.mark.parametrize("variant", ENCODER_VARIANTS)
@torch.no_grad()
def test_padding_changes_nothing(variant):
    """On the left, on the right, and beside other rows."""
    model = encoder(variant, model_class=SASEncoderForSequenceClassification, num_labels=3).double()
    ids, mask = left_padded(9, 5)
    alone = [model(row[real.bool()][None]).logits[0] for row, real in zip(ids, mask, strict=True)]
    left = model(ids, attention_mask=mask).logits
    right = model(ids.roll(-4, 1) * mask.flip(1), attention_mask=mask.flip(1)).logits
    for found in (left, right):
        torch.testing.assert_close(found[1], alone[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(left[0], alone[0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_padding_on_the_left_counts_in_bert():
    bert, ours = bert_and_ours(BertModel)
    ids, mask = left_padded(9, 5)
    expected = bert(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours(ids, attention_mask=mask).last_hidden_state, expected, atol=1e-6, rtol=0)
    ours.config.padding_takes_positions = False
    assert (ours(ids, attention_mask=mask).last_hidden_state - expected)[1].abs().max() > 0.1


@pytest.mark.parametrize("variant", ["mha", "sas_rope", "super", "efficient_sas"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(variant):
    """As `DataCollatorWithFlattening` packs them: positions alone tell them apart."""
    model = encoder(variant).double()
    first, second = token_ids(1, 6), token_ids(1, 5)
    positions = torch.cat((torch.arange(6), torch.arange(5)))[None]
    packed = model(torch.cat((first, second), dim=1), position_ids=positions).logits
    expected = torch.cat((model(first).logits, model(second).logits), dim=1)
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=0)


def test_the_mean_of_real_tokens_is_pooled():
    model = encoder("mean", model_class=SASEncoderForSequenceClassification, num_labels=3)
    ids, mask = left_padded(9, 5)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    expected = torch.stack(
        [model.classifier(row[real.bool()].mean(0)) for row, real in zip(hidden, mask, strict=True)]
    )
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
    assert model.model.pooler is None and not any("pooler" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("problem", "labels", "loss"),
    [
        ("single_label_classification", torch.tensor([2, 0]), F.cross_entropy),
        ("regression", torch.randn(2, 3), F.mse_loss),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1]]), F.binary_cross_entropy_with_logits),
    ],
)
def test_losses_of_classifiers(problem, labels, loss):
    model = encoder("sas", model_class=SASEncoderForSequenceClassification, num_labels=3, problem_type=problem)
    output = model(**pairs(), labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
    # Of two micro-batches alike, each has half of the step's loss.
    counted = model(**pairs() | {"input_ids": token_ids(2, 9)}, labels=labels, num_items_in_batch=2 * labels.numel())
    torch.testing.assert_close(counted.loss, loss(counted.logits, labels) / 2)


@pytest.mark.parametrize(
    ("model_class", "bert_class"),
    [(SASEncoderForMultipleChoice, BertForMultipleChoice), (SASEncoderForMaskedLM, BertForMaskedLM)],
)
def test_losses_know_the_accumulated_batch(model_class, bert_class):
    model = encoder("sas", model_class=model_class)
    inputs = pairs(4 if bert_class is BertForMultipleChoice else None)
    labels = LABELS[bert_class]["labels"]
    counted = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(4 * labels.numel())).loss
    torch.testing.assert_close(4 * counted, model(**inputs, labels=labels).loss)


def test_exports():
    """With free batch and length."""
    model = encoder("sas_rope")
    batch, length = torch.export.Dim("batch", max=8), torch.export.Dim("length", min=2, max=60)
    shape = {0: batch, 1: length}
    example = {"input_ids": token_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    program = torch.export.export(model, (), example, dynamic_shapes=dict.fromkeys(example, shape))
    ids, mask = left_padded(7, 4, 5)
    with torch.no_grad():
        found = program.module()(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found, model(ids, attention_mask=mask).logits)


WRONG = {
    "is_causal": (True, "both directions"),
    "norm_position": ("after", "'post_residual', 'pre', 'post'"),
    "position_embedding_type": ("relative_key", "'learned', 'sinusoidal', 'rope'"),
    "classifier_pooling": ("last", "'first', 'mean'"),
    "pooler_act": ("tanhh", "None or one of"),
    "hidden_act": ("rellu", "must be one of"),
    "type_vocab_size": (-1, "no token types"),
    "type_vocab_sizes": (2, "Did you mean `type_vocab_size`"),
    "mlp_type": ("moe", "'gated', 'plain'|'plain', 'gated'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(name):
    value, remedy = WRONG[name]
    with pytest.raises(ValueError, match=remedy) as error:
        SASEncoderConfig(**ENCODER_BASE | {name: value})
    assert name in str(error.value) and str(value) in str(error.value)


def test_wrong_inputs_are_named():
    model = encoder("mha")
    with pytest.raises(ValueError, match="`max_position_embeddings` = 64"):
        model(token_ids(1, 65))
    assert encoder("rope")(token_ids(1, 65)).logits.isfinite().all()
    with pytest.raises(ValueError, match="exactly one of `input_ids` or `inputs_embeds`"):
        model(attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="`type_vocab_size` of this model is 0"):
        encoder("mean")(token_ids(1, 4), token_type_ids=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[batch, choices, tokens\]"):
        encoder("mha", model_class=SASEncoderForMultipleChoice)(token_ids(2, 5))
