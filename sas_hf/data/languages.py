"""The languages of a multilingual tokenizer, and how a model is told which one to translate into."""

from collections.abc import Collection
from typing import cast

from transformers import GenerationConfig, PreTrainedTokenizerBase


def set_languages(
    tokenizer: PreTrainedTokenizerBase,
    languages: tuple[str | None, str | None],
    fields: tuple[str, str],
    *,
    keep: bool = False,
) -> None:
    """
    Tell a tokenizer which languages source and target are in, where it marks texts by them (mBART, NLLB, M2M100).

    Args:
        languages: of source and target, as the tokenizer writes them.
        fields: what the two are called in errors.
        keep: a language that is not given is the one that the tokenizer was saved with.

    Raises:
        ValueError: for a language that is missing, or for which the tokenizer has no token; for one that is given to
            a tokenizer without languages.
    """
    knows_languages = hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "tgt_lang")
    name = type(tokenizer).__name__
    for field, language, attribute in zip(fields, languages, ("src_lang", "tgt_lang"), strict=True):
        if not knows_languages:
            if language is not None:
                raise ValueError(
                    f"`{field}` is {language!r}, but the tokenizer ({name}) has no languages; leave it out."
                )
            continue
        if language is None and keep:
            language = getattr(tokenizer, attribute)
        of_class = getattr(tokenizer, "lang_code_to_id", None)
        codes: Collection[str] = of_class if of_class else getattr(tokenizer, "extra_special_tokens", ())
        known = ", ".join(sorted(codes))
        if language is None:
            raise ValueError(
                f"`{field}` is not given, but the tokenizer ({name}) marks texts by their language; it knows {known}."
            )
        if language not in codes:
            raise ValueError(f"`{field}` is {language!r}, for which the tokenizer has no token; it knows {known}.")
        setattr(tokenizer, attribute, language)


def language_token(tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool] | None:
    """The token of the target's language, and whether targets begin with it (else they end with it); `None` where
    targets have none."""
    language = getattr(tokenizer, "tgt_lang", None)
    if language is None:
        return None
    ids: list[int] = tokenizer(text_target="1")["input_ids"]
    find = getattr(tokenizer, "get_lang_id", None) or tokenizer.convert_tokens_to_ids  # M2M100 writes es as __es__
    token = cast(int, find(language))
    return (token, ids[0] == token) if token in (ids[0], ids[-1]) else None


def begin_with_language(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """
    Let generations begin with the target's language, as the tokenizer's targets do.

    Returns:
        the token that decoders start with, where it is the language (mBART); `None` where it stays.
    """
    found = language_token(tokenizer)
    if found is None:
        return None
    token, in_front = found
    if in_front:
        settings.forced_bos_token_id = token
        return None
    settings.decoder_start_token_id = token
    return token
