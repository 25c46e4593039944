"""Texts: those in files, and one that every CPython brings along, with a tokenizer trained on text, so that examples,
checks and a first training need neither files nor a network.
"""

import codecs
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import TextIO

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def read_text(path: str | Path) -> str:
    """
    The text in a file, without a byte order mark, its lines ended by `\\n`.

    Raises:
        ValueError: for a file that is not text in UTF-8; names the file and the first byte that is none.
        OSError: for one that cannot be read.
    """
    check_text(path)
    with open_text(path) as file:
        return file.read()


@contextmanager
def open_text(path: str | Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file to read text from; raises as [`read_text`], as far as it is read. `newline` as in `open`."""
    try:
        with open(Path(path).expanduser(), encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        check_text(path)
        raise


def check_text(path: str | Path, size: int | None = None) -> None:
    """Raise as [`read_text`] does, for a file's first `size` bytes (rounded up to 1 MiB) or all of it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(Path(path).expanduser(), "rb") as file:
        while True:
            data = chunk = file.read(2**20)
            wrong = chunk.find(b"\0")
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                data, wrong = error.object, error.start  # with what the last chunk ended in
            if wrong >= 0:
                raise ValueError(
                    f"{path} is not text in UTF-8: its byte {file.tell() - len(data) + wrong:,} is "
                    f"0x{data[wrong]:02x}; convert it to UTF-8 (by iconv, for instance), or unpack it."
                )
            if not chunk or (size is not None and file.tell() >= size):
                return


def python_reference() -> str:
    """The Python language reference as `help()` shows it: about 460,000 characters of technical English."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def split_text(text: str, every: int = 5, size: int = 4000) -> tuple[str, str]:
    """
    A text to train on and one that is held out: of stretches of `size` characters the first of each `every`.

    Returns:
        both, each with its stretches in their order.
    """
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    return "".join(piece for i, piece in enumerate(pieces) if i % every), "".join(pieces[::every])


def train_tokenizer(text: str, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer, which knows every text; its first token ends texts. The same text, the same one.

    Args:
        text: to learn pieces from, line by line.
        vocab_size: tokens, of which 256 are the bytes and one is the end; fewer where the text has no more pieces.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def train_word_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A tokenizer as BERT's: words in lower case, rare ones in pieces; `[CLS] text [SEP]`, or `[CLS] text [SEP] second
    [SEP]`. The same texts, the same tokenizer.

    Args:
        vocab_size: tokens at most, unless the letters of the texts are more; of few texts there are fewer.
    """
    texts, special = list(texts), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

    def wordpiece(model: models.WordPiece) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    trained = wordpiece(models.WordPiece(unk_token="[UNK]"))
    letters = Counter(letter for text in texts for letter in trained.normalizer.normalize_str(text))
    common = sorted(letters, key=lambda letter: (-letters[letter], letter))[:1000]
    # The trainer numbers what goes on within words in another order each time, and by numbers it decides between
    # pieces that are as frequent, unless it is given them.
    inside = [f"##{letter}" for letter in sorted(common) if not letter.isspace()]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*special, *inside], show_progress=False)
    trained.train_from_iterator(texts, trainer)
    tokenizer = wordpiece(models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
