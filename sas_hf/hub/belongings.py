"""What lies beside a checkpoint's weights and belongs to it: its files by name, and the terms it may be used under."""

from pathlib import Path

from huggingface_hub import list_repo_files

from .checkpoints import optional_file


LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def find_licences(source: str | Path, revision: str | None) -> list[Path]:
    """Files with the terms that the source may be used under."""
    names = [name for name in source_files(source, revision) or () for form in LICENCES if Path(name).match(form)]
    files = (optional_file(source, name, revision) for name in dict.fromkeys(names) if "/" not in name)
    return [file for file in files if file is not None]


def source_files(source: str | Path, revision: str | None) -> list[str] | None:
    """Names of a checkpoint's files, those of folders with a slash; `None` where the Hub cannot be asked."""
    folder = Path(source)
    if folder.is_dir():
        return [path.name + ("/" if path.is_dir() else "") for path in sorted(folder.iterdir())]
    try:
        return list_repo_files(str(source), revision=revision)
    except Exception:  # of whichever HTTP library: the list is only told, and its absence too
        return None
