"""Labelled texts as tokens, as long as a model can read."""

import inspect

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .labelled_text import LabelledTexts


BATCH = 1000  # texts that the tokenizer gets at once
# RoBERTa and what is made of it, whose positions begin behind the number of the padding token.
COUNT_FROM_PADDING = (
    *("camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that the model has positions for; `None` where it says nothing of them."""
    text_config = config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and config.model_type in COUNT_FROM_PADDING:
        return longest - text_config.pad_token_id - 1
    return longest


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, model_class: type[PreTrainedModel]
) -> None:
    """
    Let a tokenizer make what a classifier of this class reads, and batches of several lengths.

    Raises:
        ValueError: where it has no token to pad with.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "The tokenizer has neither a padding nor an eos token, by which texts of several lengths could be "
                "put together; set its `pad_token`."
            )
        tokenizer.pad_token = tokenizer.eos_token
    known = set(inspect.signature(model_class.forward).parameters)
    if getattr(config, "type_vocab_size", None) == 0:
        known.discard("token_type_ids")
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in known]


def tokenize(
    rows: LabelledTexts, tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[dict[str, list[list[int]]], int]:
    """
    `input_ids` and what else the tokenizer gives, of `longest` tokens at most; and how many texts are cut.

    Raises:
        ValueError: for a text of which the tokenizer makes nothing.
    """
    columns: dict[str, list] = {}
    cut = 0
    for start in range(0, len(rows), BATCH):
        part = slice(start, start + BATCH)
        seconds = None if rows.seconds is None else rows.seconds[part]
        tokens = tokenizer(rows.texts[part], seconds, truncation=True, max_length=longest)
        for name, values in tokens.items():
            columns.setdefault(name, []).extend(values)
        if tokens.encodings is not None:
            cut += sum(bool(encoding.overflowing) for encoding in tokens.encodings)
        else:  # a tokenizer in Python does not say what it cut
            cut += sum(len(ids) == longest for ids in tokens["input_ids"])
    for ids, place in zip(columns["input_ids"], rows.places, strict=True):
        if not ids:
            raise ValueError(f"The tokenizer makes no token of the text in {place}; leave such rows out.")
    return columns, cut
