"""Real English text that every CPython brings along, and a tokenizer trained on text, so that examples, checks and a
first training need neither files nor a network; and text from a file.
"""

from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def python_reference() -> str:
    """The Python language reference as `help()` shows it: about 460,000 characters of technical English."""
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_text(path: Path) -> str:
    """The text of a file; a `ValueError` that names it if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error


def split_text(text: str, every: int = 5, size: int = 4000) -> tuple[str, str]:
    """A text to train on and one that is held out: every fifth stretch of 4,000 characters."""
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    return "".join(piece for i, piece in enumerate(pieces) if i % every), "".join(pieces[::every])


def train_tokenizer(text: str, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which knows every text; its first token ends texts. The same text, the same one."""
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
