"""What is named as a checkpoint: a folder here, or a repository of the Hub? Light to import: commands ask it first."""

import difflib
import functools
from pathlib import Path


SECONDS_TO_ASK = 10  # the Hub whether it has a repository


def check_place(source: str | Path, revision: str | None = None) -> None:
    """Decide at once whether `source` is a folder here or a repository of the Hub.

    The Hub's client asks for each file six times, with pauses, before it says that it cannot have it; here it is
    asked once for the repository, unless something of it is in the cache.

    Raises:
        FileNotFoundError: if it is neither; with the folder whose name is nearest.
        ValueError: for a revision of a folder, which has none.
    """
    folder = Path(source)
    if not is_folder(source):
        _ask_the_hub(str(source))
    elif revision is not None:
        raise ValueError(f"`revision` ({revision!r}) is of a repository on the Hub, but {folder} is a folder here.")


def is_folder(source: str | Path) -> bool:
    """Whether `source` is a folder here, or else may be a repository of the Hub, which is not asked.

    Raises:
        FileNotFoundError: if it can be neither; with the folder whose name is nearest.
    """
    folder = Path(source)
    if folder.is_dir():
        return True
    # What cannot be a Hub id ("name" or "owner/name") is a path.
    is_path = folder.is_absolute() or str(source).startswith((".", "~")) or len(folder.parts) > 2
    if folder.is_symlink() and not folder.exists():
        raise FileNotFoundError(f"{folder} is a link to {folder.readlink()}, which does not exist.")
    if folder.exists() or is_path:
        told = "is not a folder" if folder.exists() else f"does not exist{nearest_folder(folder)}"
        raise FileNotFoundError(f"{folder} {told}.")
    return False


@functools.cache  # answers, not errors
def _ask_the_hub(name: str) -> None:
    from huggingface_hub import constants, model_info
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.file_download import repo_folder_name

    try:
        if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")).is_dir():
            return
        model_info(name, timeout=SECONDS_TO_ASK)
        return
    except GatedRepoError:  # what is asked next tells how to get in
        return
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, HFValidationError) else "it has none of that name"
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set, and the cache has nothing of it"
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500:  # a mirror, say, that answers other questions
            return
        reason = f"{constants.ENDPOINT} answers with an error of its own ({status}); try again later"
    except ValueError:
        reason = f"{constants.ENDPOINT} (HF_ENDPOINT) answers no JSON, as a page to log in at does; it is no Hub"
    except Exception as error:  # of whichever HTTP library
        reason = f"it cannot be reached ({error}), and the cache has nothing of it"
    raise FileNotFoundError(
        f"{name} is no folder here, nor a checkpoint that the Hub gives: {reason}{nearest_folder(Path(name))}."
    ) from None


def nearest_folder(folder: Path) -> str:
    """Of a mistyped path, which folder beside it may have been meant."""
    if not folder.parent.is_dir():
        return ""
    names = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    found = difflib.get_close_matches(folder.name, names, n=1, cutoff=0.75)
    return f"; there is {folder.with_name(found[0])}" if found else ""
