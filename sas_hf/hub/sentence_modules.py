"""What sentence-transformers keeps beside a model: the list of its modules (`modules.json`), settings and folders.

It computes an embedding by the modules in that list, of which the first is the model itself. They are carried along
whole or refused: with one of them missing, it would compute another embedding without a word.
"""

import json
import re
import shutil
from pathlib import Path, PurePosixPath

from huggingface_hub import list_repo_files

from .checkpoints import optional_file, required_file


MODULES_NAME = "modules.json"
SETTINGS_NAME = "config_sentence_transformers.json"
# Of its transformer, by the model type that it had when the file was written (as sentence-transformers lists them).
TRANSFORMER_SETTINGS = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
PACKAGE = "sentence_transformers."
TRANSFORMERS = ("Transformer", "MLMTransformer")  # the model itself, in the checkpoint's own folder
OTHERS = (
    "Pooling",
    "Normalize",
    "Dense",
    "LayerNorm",
    "Dropout",
    "WeightedLayerPooling",
    "CNN",
    "LSTM",
    "SpladePooling",
)
CARRIED = (".json", ".safetensors", ".txt")


def find_sentence_modules(
    source: str | Path, revision: str | None = None, error_class: type[ValueError] = ValueError
) -> list[str]:
    """Names of the files of a checkpoint that sentence-transformers reads beside the model; none if it is not for it.

    Raises:
        ValueError: of `error_class`, if `modules.json` is damaged or names what cannot be carried: code of its own, a
            second model, weights in a pickle.
    """
    file = optional_file(source, MODULES_NAME, revision)
    if file is None:
        return []
    remedy = f"or take {MODULES_NAME} out of the source, to go on with the model alone"
    names = [MODULES_NAME]
    for kind, path in _read_modules(file, error_class):
        if not kind.startswith(PACKAGE):
            raise error_class(
                f"{MODULES_NAME} of {source} names the module {kind!r}, which is code of its own: it is never run nor "
                f"carried along. Give {PACKAGE[:-1]} modules of its own, {remedy}."
            )
        name = kind.rpartition(".")[2]
        if name not in TRANSFORMERS + OTHERS or (name in TRANSFORMERS and path):
            where = f" in the folder {path!r}" if path else ""
            raise error_class(
                f"{MODULES_NAME} of {source} names the module {kind!r}{where}; beside the model in the folder itself, "
                f"{', '.join(OTHERS)} are carried along. Save it with its model in the folder itself, {remedy}."
            )
        for part in _files_in(source, path, revision) if path else ():
            if part.endswith((".bin", ".pt", ".pth", ".pkl")):
                raise error_class(
                    f"{source} holds {part}, a pickle, which could run code when loaded; save it as safetensors: "
                    f'SentenceTransformer("{source}").save_pretrained(FOLDER), {remedy}.'
                )
            if part.endswith(CARRIED):
                names.append(part)
    settings = (SETTINGS_NAME, *TRANSFORMER_SETTINGS)
    return names + [name for name in settings if optional_file(source, name, revision) is not None]


def copy_sentence_modules(source: str | Path, revision: str | None, folder: Path) -> None:
    """Copy what [`find_sentence_modules`] finds to the checkpoint in `folder`."""
    for name in find_sentence_modules(source, revision):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(required_file(source, name, revision), folder / name)


def _read_modules(file: Path, error_class: type[ValueError]) -> list[tuple[str, str]]:
    """The modules' types and folders."""
    try:
        modules = [(module["type"], module["path"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise error_class(f"{file} is no list of modules ({error!r}); mend or remove it.") from error
    for kind, path in modules:
        if not (isinstance(kind, str) and isinstance(path, str) and re.fullmatch(r"[\w.-]*", path)) or path == "..":
            raise error_class(f"{file} names the module {kind!r} in {path!r}, which is no folder beside it; mend it.")
    return modules


def _files_in(source: str | Path, path: str, revision: str | None) -> list[str]:
    """Names of the files in a folder of the checkpoint; of the usual ones, where the Hub cannot be asked."""
    if Path(source).is_dir():
        folder = Path(source) / path
        return sorted(f"{path}/{file.name}" for file in folder.iterdir()) if folder.is_dir() else []
    try:
        names = list_repo_files(str(source), revision=revision)
    except Exception:  # of whichever HTTP library
        usual = [f"{path}/{name}" for name in ("config.json", "model.safetensors", "pytorch_model.bin")]
        return [name for name in usual if optional_file(source, name, revision) is not None]
    return [name for name in names if str(PurePosixPath(name).parent) == path]
