"""Checkpoints: looked at before anything is loaded, read without running their code, written whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file


REPORT_NAME = "fidelity.json"
CARD_NAME = "README.md"


def read_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of the checkpoint in that folder or at that Hub id.

    Raises:
        FileNotFoundError: if there is no such folder or checkpoint, or no configuration in it.
        ValueError: for an architecture that neither Transformers nor sas_hf knows.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}; it is not a checkpoint folder.")
    # What cannot be a Hub id ("name" or "owner/name") is a path.
    is_path = folder.is_absolute() or str(source).startswith(".") or len(folder.parts) > 2
    if not folder.is_dir() and (folder.exists() or is_path):
        raise FileNotFoundError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}.")
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"{source} is no folder here, nor a checkpoint that the Hub gives: {str(error).splitlines()[0]}"
        ) from error


def optional_file(source: str | Path, name: str, revision: str | None = None) -> Path | None:
    """A file of the checkpoint (from the cache when the Hub cannot be reached), or `None` if it has no such file."""
    found = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def refuse_existing(output: Path) -> None:
    """Raise a `FileExistsError` unless `output` is free or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose another output.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well and vanishes when it does not."""
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep others from reading a shared checkpoint
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_model(model: PreTrainedModel, folder: Path, source: str | Path, revision: str | None) -> None:
    """Save, with the source's generation configuration to the letter.

    Transformers loads generation configurations with contradictions, of which the Hub has many, but refuses to save
    them; what the source says is none of our business.
    """
    file = optional_file(source, GENERATION_CONFIG_NAME, revision)
    if model.can_generate() and file is not None:
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    if file is not None:
        shutil.copyfile(file, folder / GENERATION_CONFIG_NAME)


def load_tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or `None` if it has none."""
    if not any(optional_file(source, name, revision) for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
