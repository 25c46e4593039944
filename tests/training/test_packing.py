"""Packed documents: every token once, none sees or predicts another document's."""

import pytest
import torch
from helpers import gpt, real_text, train_tokenizer
from transformers import default_data_collator

from sas_hf.training import pack_documents
from sas_hf.training.packing import one_row


LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def packed(tokenizer):
    return pack_documents(real_text()[:60], tokenizer, LENGTH)


def test_every_token_stands_once_and_in_order(packed, tokenizer):
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    stream = [
        token for text in real_text()[:60] for token in (start, *tokenizer.encode(text, add_special_tokens=False))
    ]
    tokens = [token for row in packed for token in row["input_ids"]]
    assert tokens == stream[: len(tokens)] and len(stream) - len(tokens) < LENGTH
    assert {len(row[column]) for row in packed for column in packed.column_names} == {LENGTH}


def test_a_document_begins_where_positions_restart_and_its_first_token_is_no_target(packed, tokenizer):
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    several = 0
    for row in packed:
        for place, (token, position, label) in enumerate(
            zip(row["input_ids"], row["position_ids"], row["labels"], strict=True)
        ):
            begins = place == 0 or token == start
            assert (position == 0) == begins and label == (-100 if begins else token)
            several += begins and place > 0
    assert several > 10


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_document_computes_what_it_does_alone(implementation, packed, tokenizer):
    model = gpt("sas_k5_gqa", vocab_size=len(tokenizer))
    model.set_attn_implementation(implementation)
    row = next(row for row in packed if row["position_ids"].count(0) > 1)
    first = row["position_ids"].index(0, 1)
    ids, positions = torch.tensor([row["input_ids"]]), torch.tensor([row["position_ids"]])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=positions).logits[0, first:]
    length = next((place for place in range(1, len(logits)) if positions[0, first + place] == 0), len(logits))
    alone = model(ids[:, first : first + length]).logits[0]
    torch.testing.assert_close(logits[:length], alone, rtol=0, atol=1e-4)
    logits[:length].square().sum().backward()
    inside = embedded.grad[0].abs().sum(-1) > 0
    assert inside[first : first + length].all() and not inside[:first].any()


@pytest.mark.parametrize("variant", ["sas_k5_gqa", "super", "learned"])
def test_a_batch_in_one_row_computes_the_same(variant, packed, tokenizer):
    """What FlashAttention needs, which looks for documents in batches of one row alone; shown by SDPA."""
    model = gpt(variant, vocab_size=len(tokenizer), max_position_embeddings=LENGTH)
    batch = default_data_collator([packed[row] for row in range(4)])
    joined = one_row(batch)
    assert {tuple(values.shape) for values in joined.values()} == {(1, 4 * LENGTH)}
    rows, row = (model(**inputs) for inputs in (batch, joined))
    torch.testing.assert_close(row.logits.view_as(rows.logits), rows.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(row.loss, rows.loss, rtol=0, atol=1e-5)


def test_a_seed_shuffles_documents(tokenizer):
    first, again, other = (
        pack_documents(real_text()[:20], tokenizer, 16, seed=seed)["input_ids"] for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("documents", "length", "message"),
    [
        (["a text"], 1, "`sequence_length` is 1"),
        (["a text"], 500, "fewer than `sequence_length` = 500"),
        ([b"bytes"], 8, "must be texts"),
    ],
)
def test_what_cannot_be_packed(documents, length, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        pack_documents(documents, tokenizer, length)
