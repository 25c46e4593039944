"""Packed documents: each token and end is predicted once, from its own document; a model trained on them ends."""

import copy

import pytest
import torch
from helpers import USE_CPU, gpt, gpt_config, real_text, train_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator, set_seed

from sas_hf import SASGPTForCausalLM
from sas_hf.training import DurableTrainer, pack_documents
from sas_hf.training.packing import one_row


LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def packed(tokenizer):
    return pack_documents(real_text()[:60], tokenizer, LENGTH)


def special(kind: str):
    """A tokenizer with one token that begins and ends texts, or two, or one that puts them around texts by itself."""
    tokenizer = copy.deepcopy(train_tokenizer())
    if kind == "bos = eos":
        tokenizer.bos_token = tokenizer.eos_token
    elif kind != "eos alone":
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    if kind == "added by itself":
        ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
        around = TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ends)
        tokenizer.backend_tokenizer.post_processor = around
        assert tokenizer.decode(tokenizer("a").input_ids) == "<s>a</s>"
    return tokenizer


KINDS = ["eos alone", "bos = eos", "bos and eos", "added by itself"]


def pieces(rows) -> list[list[tuple[int, int, int]]]:
    """Token, position and label of each stretch whose tokens see each other, by the positions."""
    found = []
    for row in rows:
        for token in zip(row["input_ids"], row["position_ids"], row["labels"], strict=True):
            if token[1] == 0:
                found.append([])
            found[-1].append(token)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, LENGTH])
def test_every_token_and_every_end_is_predicted_once_from_its_own_document(kind, length):
    tokenizer, texts = special(kind), real_text()[:60]
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    documents = [[start, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    rows = pack_documents(texts, tokenizer, length)
    assert {len(row[column]) for row in rows for column in rows.column_names} == {length}
    found, cut, cuts = [], False, 0
    for piece in pieces(rows):
        tokens, positions, labels = map(list, zip(*piece, strict=True))
        assert positions == list(range(len(piece))) and labels == [-100, *tokens[1:]]
        if cut:  # goes on with the token before the cut, to predict the next from
            assert tokens[0] == found[-1][-1]
            found[-1] += tokens[1:]
            cuts += 1
        else:
            found.append(tokens)
        cut = found[-1] != documents[len(found) - 1]
    complete = found[:-1] if cut else found
    assert complete == documents[: len(complete)] and len(documents) - len(complete) <= 1 and cuts > 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_trained_on_texts_ends_them(kind, tmp_path):
    """Saved, loaded and asked as a user does it; also from nothing but the beginning of a text."""
    texts = ["The first text is short.", "Another one says less.", "A third text, and no more."]
    tokenizer = special(kind)
    set_seed(0)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=60,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        use_cpu=USE_CPU,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DurableTrainer(
        SASGPTForCausalLM(gpt_config("sas", vocab_size=len(tokenizer), initializer_range=0.02, eos_token_id=None)),
        arguments,
        train_dataset=pack_documents(texts * 20, tokenizer, 64, seed=0),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    begin = tokenizer.bos_token or tokenizer.eos_token
    for prompt in (begin, f"{begin}The first text is"):
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = model.generate(inputs, max_new_tokens=40, do_sample=False)[0]
        assert made[-1] == tokenizer.eos_token_id and len(made) < 40
        assert tokenizer.decode(made, skip_special_tokens=True) in texts


def test_a_text_that_spells_out_its_ends_has_them_once():
    tokenizer = special("bos and eos")
    expected = tokenizer.encode("<s>spelled out</s><s>not</s>", add_special_tokens=False)
    (row,) = pack_documents(["<s>spelled out</s>", "", "not"], tokenizer, len(expected))
    assert row["input_ids"] == expected


def test_nothing_that_could_end_a_document():
    tokenizer = special("eos alone")
    tokenizer.bos_token, tokenizer.eos_token = "<eot>", None
    with pytest.raises(ValueError, match="no eos token, .* would never learn to stop; set its `eos_token`"):
        pack_documents(["a text"], tokenizer, 8)


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
