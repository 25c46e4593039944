"""Checkpoints: looked at before anything is loaded, read without running their code, written whole or not at all."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    cached_file,
    extract_commit_hash,
)

from ..report.files import writing
from .places import check_place


if TYPE_CHECKING:
    from peft import PeftModel


REPORT_NAME = "fidelity.json"
CARD_NAME = "README.md"
AutoClass = type[_BaseAutoModelClass]
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def classes_made_by(auto_class: AutoClass) -> Mapping[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The model class that an Auto class makes of each class of configuration."""
    return cast(Mapping[type[PreTrainedConfig], type[PreTrainedModel]], auto_class._model_mapping)


def read_settings(source: str | Path, revision: str | None = None) -> dict:
    """What the `config.json` of the checkpoint in that folder or at that Hub id says.

    Raises:
        FileNotFoundError: if there is no such folder or checkpoint, or no configuration in it.
        ValueError: for a revision of a folder, which has none; for a configuration that is none, or says in no words
            what it is of.
    """
    check_place(source, revision)
    folder = Path(source)
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds adapters, and no model of its own; `sas-hf export {folder} OUT` makes one of them "
                f"and their SAS model for the Hub, `sas-hf merge {folder} OUT` of any."
            )
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}; it is not a checkpoint folder.")
    try:
        file = Path(cast(str, cached_file(source, CONFIG_NAME, revision=revision)))
    except OSError as error:
        if folder.is_dir():
            raise
        raise FileNotFoundError(
            f"{source} is no folder here, nor a checkpoint that the Hub gives: {str(error).splitlines()[0]}"
        ) from error
    settings = read_object(file)
    model_type, classes = settings.get("model_type"), settings.get("architectures")
    if not isinstance(model_type, str | None):
        raise ValueError(f"`model_type` in {file} is {model_type!r}; it must be one name, such as 'llama'.")
    if not isinstance(classes, str | None) and not (isinstance(classes, list) and all(map(_is_text, classes))):
        raise ValueError(f"`architectures` in {file} is {classes!r}; it must be a list of names of classes.")
    return settings


def load_config(source: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """The checkpoint's configuration; none of its code is run.

    Raises:
        ValueError: if Transformers cannot make one of what it says; it meets a value of a wrong type in any error.
    """
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (AttributeError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Transformers cannot make a configuration of {Path(source) / CONFIG_NAME} ({type(error).__name__}: "
            f"{reason}); mend it."
        ) from error


def _is_text(value: object) -> bool:
    return isinstance(value, str)


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


def required_file(source: str | Path, name: str, revision: str | None = None) -> Path:
    """A file of the checkpoint that is known to be there."""
    found = optional_file(source, name, revision)
    if found is None:
        raise FileNotFoundError(f"{source} has no {name}.")
    return found


def find_commit(source: str | Path, revision: str | None = None, file: str = CONFIG_NAME) -> str | None:
    """The commit that a revision of a Hub repository with this file stands for; `None` for other folders."""
    found = optional_file(source, file, revision)
    return extract_commit_hash(None if found is None else str(found), None)


def read_report(source: str | Path, revision: str | None = None) -> dict | None:
    """The fidelity report of the checkpoint, or `None` if it has none.

    Raises:
        ValueError: if it is damaged.
    """
    file = optional_file(source, REPORT_NAME, revision)
    return None if file is None else read_object(file)


def read_object(file: Path) -> dict:
    """What a JSON file says; a `ValueError` if it is damaged or holds no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); mend or remove it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; mend or remove it.")
    return content


def read_adapter(source: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """The base model of the peft adapters in that folder or at that Hub id, and its revision; `None` for others, and
    for a model with adapters beside it.

    Raises:
        FileNotFoundError: if no base is named, or a folder that is not there.
        ValueError: if the adapters' configuration is damaged.
    """
    if Path(source).is_dir() and (Path(source) / CONFIG_NAME).is_file():
        return None
    check_place(source, revision)
    try:
        file = optional_file(source, ADAPTER_CONFIG_NAME, revision)
    except OSError:  # of a gated repository, say; `read_settings` says so
        return None
    if file is None:
        return None
    settings = read_object(file)
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise FileNotFoundError(
            f"`base_model_name_or_path` in {file} is {base!r}, where no model is; if it has moved (the `base` of a "
            "run moves with its folder), write there where it is now."
        )
    return base, None if Path(base).is_dir() else settings.get("revision")


def refuse_existing(output: Path) -> None:
    """Raise a `FileExistsError` unless `output` is free or an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose another output.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well and vanishes when it does not."""
    path = path.absolute()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with writing(path):
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


def load_model(
    model_class: type[PreTrainedModel] | AutoClass,
    source: str | Path,
    revision: str | None,
    error_class: type[ValueError] = ValueError,
    *,
    new_head: bool | Collection[str] = False,
    **options,
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of weights in the checkpoint that are not the model's.

    Args:
        model_class: or an Auto class.
        new_head: weights outside the base model that are missing or of another shape begin anew; so does the pooler,
            which encoders without a classifier may lack, with a warning. Names: of modules of these names alone.
        options: of `from_pretrained`, such as `config`; by default the checkpoint's own dtype, safetensors alone, and
            no code of the checkpoint.

    Raises:
        ValueError: of `error_class`, if weights are damaged, missing, misshapen or not finite, or an adapter is there.
        OSError: if there are no safetensors weights.
    """
    if optional_file(source, ADAPTER_CONFIG_NAME, revision) is not None:
        # Transformers would put it on the model, and tell of its weights alone which are missing.
        raise error_class(
            f"{source} holds a model and a peft adapter ({ADAPTER_CONFIG_NAME}), and only one can be meant; move the "
            "adapter to a folder of its own."
        )
    defaults = {"revision": revision, "dtype": "auto", "trust_remote_code": False, "use_safetensors": True}
    try:
        # With the loading info it is a pair, which Transformers' annotation does not say.
        loaded: Any = model_class.from_pretrained(
            source,
            ignore_mismatched_sizes=True,  # reported below, not as a RuntimeError
            output_loading_info=True,
            **defaults | options,
        )
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise error_class(f"The weights of {source} are damaged ({error}); download or save them again.") from error
    model, loading = cast(tuple[PreTrainedModel, dict], loaded)
    inside = f"{model.base_model_prefix}."

    def may_be_new(name: str) -> bool:
        named = new_head if isinstance(new_head, bool) else not set(new_head).isdisjoint(name.split("."))
        return named and not name.startswith(inside)

    absent = sorted(name for name in loading["missing_keys"] if not may_be_new(name))
    if new_head is True and any(name.startswith(f"{inside}pooler.") for name in absent):
        absent = [name for name in absent if not name.startswith(f"{inside}pooler.")]
        warnings.warn(f"{source} has no pooler; it begins anew and must be trained, too.", stacklevel=2)
    if absent:
        raise error_class(f"{source} lacks weights of {type(model).__name__}: {', '.join(absent[:5])}.")
    misshapen = [weight for weight in loading["mismatched_keys"] if not may_be_new(weight[0])]
    if misshapen:
        name, found, expected = min(misshapen)
        raise error_class(
            f"{source} holds {name} as {list(found)}, but its config.json asks for {list(expected)}; they do not "
            "belong together."
        )
    _require_finite(model.named_parameters(), source, error_class)
    return model, sorted(loading["unexpected_keys"])


def load_adapter(model: PreTrainedModel, place: str, revision: str | None = None) -> "PeftModel":
    """
    The model with the peft adapter in that folder or at that Hub id on it. Where tokens were added before the adapter
    was trained, peft keeps the grown embeddings with it, and the model's grow first.

    Raises:
        ValueError: if weights of the adapter are damaged, missing, misshapen, not finite, or not the model's.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    start = read_object(required_file(place, ADAPTER_CONFIG_NAME, revision)).get("init_lora_weights")
    if str(start).startswith("pissa_niter"):
        raise ValueError(
            f"{place} began by a decomposition that is drawn anew each time (`init_lora_weights` {start!r}), and so "
            "does not belong to the base any more; save it as LoRA, by peft's "
            "`path_initial_model_for_weight_conversion`."
        )
    try:
        weights = load_peft_weights(place, device="cpu", revision=revision)
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise ValueError(f"The weights of {place} are damaged ({error}); download or save them again.") from error
    _require_finite(weights.items(), place, ValueError)
    rows = embedding_rows(weights, model)
    if rows is not None and rows != cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]:
        _require_grown_embeddings(weights, model, place)
        model.resize_token_embeddings(rows, mean_resizing=False)  # what the new rows hold comes from the adapter
    try:
        with warnings.catch_warnings():
            # peft asks Transformers by a former name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = PeftModel.from_pretrained(model, place, revision=revision)
            # The same weights again, for what `from_pretrained` tells in a warning at most.
            loading = adapted.load_adapter(place, adapted.active_adapter, revision=revision)
    except KeyError as error:  # of a module that is to be replaced as a whole
        raise ValueError(f"{place} lacks weights of its adapter: {error.args[0]}.") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{place} does not fit {model.config.name_or_path}: {reason}") from error
    if adapted.active_peft_config.is_prompt_learning:
        return adapted  # peft loads its prompts strictly, apart from what it reports
    # What layers share, as VBLoRA's vectors, is in the files once.
    parameters = dict(adapted.named_parameters(remove_duplicate=False))
    there = {id(parameter) for name, parameter in parameters.items() if name not in loading.missing_keys}
    missing = [name for name in loading.missing_keys if id(parameters.get(name)) not in there]
    # Biases of the base that were trained, too, peft saves and does not miss.
    saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing += [name for name in saved.keys() - weights.keys() if name.endswith(".bias")]
    if missing:
        absent = ", ".join(sorted(missing)[:5])
        raise ValueError(f"{place} lacks weights of its adapter: {absent}.")
    # Of a module that is replaced as a whole peft may write a second copy, under its name in memory.
    copies = [f"{name.removesuffix('.weight')}.modules_to_save.weight" for name in weights]
    if unknown := set(loading.unexpected_keys) - set(copies):
        named = ", ".join(sorted(unknown)[:5])
        raise ValueError(
            f"{place} holds weights that {model.config.name_or_path} has no place for: {named}; they do not belong "
            "together."
        )
    return adapted


def embedding_rows(weights: dict[str, torch.Tensor], model: PreTrainedModel) -> int | None:
    """How many tokens the embedding has that an adapter for this model brings along, `None` if it brings none."""
    name = _adapter_name(model, model.get_input_embeddings())
    adapted = f"{name.removesuffix('weight')}base_layer.weight"  # of embeddings that are adapted themselves
    found = weights.get(name, weights.get(adapted))
    return None if found is None else len(found)


def _require_grown_embeddings(weights: dict[str, torch.Tensor], model: PreTrainedModel, place: str) -> None:
    """An adapter of a model that has grown must bring the output's rows along, too, unless they are the input's."""
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    if not tied and (name := _adapter_name(model, head)) not in weights:
        raise ValueError(
            f"{place} holds embeddings for added tokens, but lacks their rows of the output ({name}); save the "
            "adapter again with `save_embedding_layers=True`."
        )


def _adapter_name(model: PreTrainedModel, wanted: torch.nn.Module) -> str:
    """What peft calls the weight of a module of the model."""
    return next(f"base_model.model.{name}.weight" for name, module in model.named_modules() if module is wanted)


def _require_finite(
    weights: Iterable[tuple[str, torch.Tensor]], source: str | Path, error_class: type[ValueError]
) -> None:
    for name, weight in weights:
        # Quantised weights are finite by their kind; those that lie elsewhere (on disk, or in another process, under
        # DeepSpeed) are not at hand.
        if not weight.is_floating_point() or weight.itemsize < 2 or weight.is_meta or not weight.numel():
            continue
        if not all(torch.isfinite(extreme) for extreme in weight.detach().aminmax()):
            raise error_class(f"{source} is damaged: {name} holds NaN or infinite numbers.")


def load_processor(
    model_class: type[PreTrainedModel], source: str | Path, revision: str | None
) -> PreTrainedTokenizerBase | BaseImageProcessor | None:
    """What makes inputs for models of this class: an image processor or a tokenizer, or `None` if there is none."""
    load = load_image_processor if "image" in model_class.input_modalities else load_tokenizer
    return load(source, revision)


def tokens_beyond(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[tuple[int, str]]:
    """Tokens that a text can have and a model of this size has no embeddings for, with their numbers, sorted.

    Special tokens may be beyond it: many tokenizers got a padding token that their model was never given, and some
    classes of Transformers add theirs to any.
    """
    special = set(tokenizer.all_special_tokens)
    return sorted(
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= vocab_size and token not in special
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str | Path) -> None:
    """Raise a `ValueError` if there are [`tokens_beyond`]."""
    if beyond := tokens_beyond(tokenizer, vocab_size):
        raise ValueError(
            f"The tokenizer of {source} has {len(beyond)} tokens beyond the model's `vocab_size` ({vocab_size}), the "
            f"first {beyond[0][1]!r} with number {beyond[0][0]}; take them out of it, or give the model embeddings "
            f"for them: model.resize_token_embeddings({beyond[-1][0] + 1})."
        )


def load_tokenizer(source: str | Path, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, or `None` if it has none."""
    if not any(optional_file(source, name, revision) for name in TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    tokenizer.init_kwargs.pop("auto_map", None)
    return _without_code(tokenizer)


def load_image_processor(source: str | Path, revision: str | None) -> BaseImageProcessor | None:
    """The checkpoint's image processor, or `None` if it has none."""
    if not any(optional_file(source, name, revision) for name in (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME)):
        return None
    return _without_code(AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False))


def load_preparation(
    source: str | Path, revision: str | None
) -> tuple[PreTrainedTokenizerBase | None, BaseImageProcessor | None]:
    """Tokenizer and image processor of a checkpoint, each `None` where there is none; of adapters that have none
    beside them, those of their base."""
    tokenizer, processor = load_tokenizer(source, revision), load_image_processor(source, revision)
    if adapter := read_adapter(source, revision):
        tokenizer = load_tokenizer(*adapter) if tokenizer is None else tokenizer
        processor = load_image_processor(*adapter) if processor is None else processor
    return tokenizer, processor


def _without_code(processor):
    """A checkpoint's `auto_map` names code of its own, which is not carried along."""
    vars(processor).pop("auto_map", None)
    return processor
