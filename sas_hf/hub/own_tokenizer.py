"""Texts in, the folder of a tokenizer for a model of one's own out."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from ..data.text import train_tokenizer
from ..data.text_files import COLUMN, documents_in, find_files
from ..report.files import one_at_a_time
from .checkpoints import new_folder, refuse_existing


SMALLEST = 257  # tokens: one for each byte, and one that ends texts


@one_at_a_time("output")
def make_tokenizer(
    text: str | list[str],
    output: str | Path,
    size: int = 2048,
    column: str = COLUMN,
    *,
    progress: Callable[[str], None] = lambda message: None,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it for `AutoTokenizer.from_pretrained`; it knows every text.

    Args:
        text: text files, or tables (CSV, JSON lines, parquet), or patterns that name them.
        output: the new folder; must not exist, or be empty.
        size: tokens at most; of little text there are fewer.
        column: of tables.
        progress: called with a line of text at each stage.

    Raises:
        FileExistsError: if `output` holds something.
        FileNotFoundError: for a file that is not there.
        ValueError: for a size that does not hold all bytes, or if there is no text.
    """
    output = Path(output)
    refuse_existing(output)
    if size < SMALLEST:
        raise ValueError(f"`size` is {size}; it must be at least {SMALLEST}: one for each byte, and one to end texts.")
    files = find_files(text, "text")
    if files is None:
        raise FileNotFoundError(f"`text` is {text!r}, which is no file here.")
    documents = [document for file in files for document in documents_in(file, column) if document]
    if not any(document.strip() for document in documents):
        raise ValueError(f"`text`: there is no text in {', '.join(map(str, files))}.")
    progress(f"Learning {size:,} tokens of {sum(map(len, documents)):,} characters")
    tokenizer = train_tokenizer("\n".join(documents), size)
    with new_folder(output) as folder:
        tokenizer.save_pretrained(folder)
    return tokenizer
