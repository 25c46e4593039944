"""Model cards: what a checkpoint is, how it was made and measured, how to load it, and metadata that the Hub accepts.

The metadata of a source's own card that still holds (licence, language, base model) is carried along; nothing is made
up. The Hub checks cards on its own side with rules that no package holds; what huggingface_hub documents of them is
followed here: metadata is a mapping, `base_model` holds Hub ids, a pipeline tag is one of the Hub's tasks.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import transformers
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, PreTrainedModel

from .. import modeling
from ..modeling.sharing import auto_class_name
from ..version import __version__
from .checkpoints import CARD_NAME, optional_file


PIPELINE_TAGS = {  # the Hub's tasks; masked images, multiple choice and text to text have none
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
}
TAGS = ["sas", "sas_hf"]
TERMS = ("license", "license_name", "license_link", "language")
CARRIED = (*TERMS, "base_model", "base_model_relation")
LOADING, FIDELITY = "How to load", "Fidelity"


def read_card(source: str | Path, revision: str | None = None) -> ModelCard | None:
    """The card of the checkpoint in that folder or at that Hub id, if it has one.

    Raises:
        ValueError: if its metadata is no YAML mapping.
    """
    file = optional_file(source, CARD_NAME, revision)
    if file is None:
        return None
    try:
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{file} has metadata that cannot be read ({str(error).splitlines()[0]}); mend or remove what stands "
            "between its `---` lines."
        ) from error


def conversion_card(report: dict, source_card: ModelCard | None) -> ModelCard:
    """The card of a converted checkpoint, from the report of `convert_checkpoint` and its source's card.

    A source on the Hub is the base model; of a local one, its own card's base model is.
    """
    simulation = report["simulation"]
    simulated = f"{_simulation(SimpleNamespace(**simulation))}, kernel {simulation['simulation_kernel_size']}"
    card = _card_of(
        report,
        source_card,
        f"{_title(report['source'])} with Simulated Attention Score",
        f"Converted by `sas_hf` {report['versions']['sas_hf']} from {_origin(report)}: {simulated}. "
        f"{_promise(report)}\n\n"
        f"{_not_carried(report)}Recipe:\n\n```json\n{json.dumps(report['options'] | simulation, indent=2)}\n```\n",
    )
    sentences = _loading_sentences("import sas_hf  # registers the architecture\n") if _embeds(report) else ""
    _set_section(card, LOADING, sentences + _loading_with_package(getattr(modeling, report["architecture"])))
    _set_section(card, FIDELITY, _fidelity(report))
    return card


def restoration_card(report: dict, sas_card: ModelCard | None) -> ModelCard:
    """The card of a checkpoint that `restore_checkpoint` wrote, from its report and the card of what it restored."""
    card = _card_of(
        report,
        sas_card,
        f"{_title(report['source'])} as {report['architecture']}",
        f"Restored by `sas_hf` {report['versions']['sas_hf']} from {_origin(report)}, whose simulation changed "
        f"nothing and was left out. {_promise(report)}\n\n{_not_carried(report)}",
    )
    return _with_loading_by_transformers(card, report)


def folding_card(report: dict, sas_card: ModelCard | None) -> ModelCard:
    """The card of a checkpoint that `fold_checkpoint` wrote, from its report and the card of what it folded."""
    folded = report["folded"]
    card = _card_of(
        report,
        sas_card,
        f"{_title(report['source'])} as {report['architecture']}",
        f"Folded by `sas_hf` {report['versions']['sas_hf']} from {_origin(report)}, whose simulation is linear: its "
        f"maps are multiplied into {folded['num_attention_heads']} plain heads of {folded['head_dim']} features. "
        f"{_promise(report)}\n\n{_not_carried(report)}",
    )
    return _with_loading_by_transformers(card, report)


def _with_loading_by_transformers(card: ModelCard, report: dict) -> ModelCard:
    """The card of a checkpoint of Transformers' own, with how to load it and its fidelity."""
    loading = f"from transformers import {report['architecture']}\n\n"
    sentences = _loading_sentences() if _embeds(report) else ""
    _set_section(
        card,
        LOADING,
        f'{sentences}```python\n{loading}model = {report["architecture"]}.from_pretrained("PATH")\n```\n',
    )
    _set_section(card, FIDELITY, _fidelity(report))
    return card


def _embeds(report: dict) -> bool:
    """Whether the checkpoint has modules of sentence-transformers."""
    return bool(report.get("sentence_modules"))


def _loading_sentences(first: str = "", arguments: str = "") -> str:
    return (
        f"```python\n{first}from sentence_transformers import SentenceTransformer\n\n"
        f'model = SentenceTransformer("PATH"{arguments})\n```\n\n'
    )


def _card_of(report: dict, source_card: ModelCard | None, title: str, text: str) -> ModelCard:
    """A card with the metadata of the source's that still holds."""
    carried: dict[str, Any] = (
        {} if source_card is None else {name: getattr(source_card.data, name, None) for name in CARRIED}
    )
    if not Path(report["source"]).is_dir():
        carried |= {"base_model": report["source"], "base_model_relation": "finetune"}
    data = _completed(ModelCardData(**carried), _model_class(report["architecture"]), _embeds(report))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}")


def _model_class(architecture: str) -> type[PreTrainedModel]:
    return getattr(modeling, architecture, None) or getattr(transformers, architecture)


def _title(source: str) -> str:
    return (Path(source).resolve() if Path(source).is_dir() else Path(source)).name


def _origin(report: dict) -> str:
    at = f" at revision `{report['revision']}`" if report.get("revision") else ""
    at += f" (commit `{report['commit'][:12]}`)" if report.get("commit") else ""
    return f"`{report['source']}`{at}, a {report['source_architecture']}"


def _promise(report: dict) -> str:
    saved = report.get("dtype_saved")
    weights = "" if saved is None else f" Its weights are saved in {saved}."
    lossy = report.get("lossy")
    if lossy is not None:
        return (
            f"Its attention was replaced ({lossy}), fitted on {report['fitted_on']}: it does not compute what its "
            f"source computes. How far it is off stands below; it is meant to be fine-tuned.{weights}"
        )
    unrounded = report.get("fidelity_unrounded")
    if unrounded is not None:
        return (
            f"When it was made, it computed what its source computes with its weights {_rounding(report)}, in which "
            "it is saved; from the source as it is the outputs differed by up to "
            f"{unrounded['max_abs_difference']:.3g}."
        )
    return f"When it was made, it computed what its source computes.{weights}"


def _rounding(report: dict) -> str:
    return f"{'folded and ' if 'folded' in report else ''}rounded to {report['dtype_saved']}"


def _not_carried(report: dict) -> str:
    """What of the source a conversion did not take along, if it says so."""
    rows = {
        f"weights of the source's files that a {report['source_architecture']} does not use": report.get(
            "weights_left_out"
        ),
        "computed anew, not read from the source's weights": report.get("weights_recomputed"),
        "fields of the source's config.json that its class in Transformers does not know either": list(
            report.get("fields_unknown") or ()
        ),
        "files of the source that are not here": report.get("files_left_out"),
    }
    told = "".join(
        f"- {name}: {', '.join(f'`{item}`' for item in found[:8])}"
        + (f" and {len(found) - 8} more\n" if len(found) > 8 else "\n")
        for name, found in rows.items()
        if found
    )
    return f"Not taken along:\n\n{told}\n" if told else ""


def export_card(
    model: PreTrainedModel, name: str, card: ModelCard | None, report: dict | None, embeds: bool = False
) -> ModelCard:
    """The card of an export: the checkpoint's own, if it has one, with what an export adds.

    Args:
        model: the exported model.
        name: a title for a checkpoint without a card.
        card: the checkpoint's own; its text is kept, all but how to load.
        report: the checkpoint's fidelity report, if it has one.
        embeds: the checkpoint has modules of sentence-transformers.
    """
    model_class = type(model)
    if card is None:
        config = model.config
        card = ModelCard(
            f"---\n{_completed(ModelCardData(), model_class, embeds).to_yaml()}\n---\n\n# {name}\n\n"
            f"A {model_class.__name__} of {model.num_parameters():,} parameters: {_architecture(config)}.\n"
        )
    else:
        _completed(cast(ModelCardData, card.data), model_class, embeds)
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], "custom_code"]))
    sentences = _loading_sentences(arguments=", trust_remote_code=True") if embeds else ""
    _set_section(card, LOADING, sentences + _loading_with_package(model_class) + _loading_without_package(model_class))
    if report is not None and _section(FIDELITY).search(card.text) is None:
        _set_section(card, FIDELITY, _fidelity(report))
    return card


def _architecture(config: PreTrainedConfig) -> str:
    """Layers and attention, of every place that has its own."""
    if not config.is_encoder_decoder:
        return f"{config.num_hidden_layers} layers, {_attention(config)}"
    own = {name: _attention(config.place(name)) for name in ("encoder", "decoder", "cross")}
    alike = len(set(own.values())) == 1
    attention = own["encoder"] if alike else "; ".join(f"{name}: {text}" for name, text in own.items())
    return f"{config.encoder_layers} layers of the encoder, {config.decoder_layers} of the decoder, {attention}"


def _attention(config: PreTrainedConfig) -> str:
    return f"{config.attention_type} attention of {config.num_attention_heads} heads, {_simulation(config)}"


def _simulation(config: PreTrainedConfig | SimpleNamespace) -> str:
    """In words, of a configuration or of what a conversion's report holds of it."""
    text = (
        f"{config.num_simulated_heads or 'no'} simulated heads, {config.simulated_head_dim or 'no'} simulated "
        "features per head"
    )
    text += ", values' features simulated" if config.simulate_value_features else ""
    act = getattr(config, "simulation_act", "relu")  # reports of earlier conversions do not say it
    text += "" if act == "relu" else f", activation {act}"
    return text + (", an output projection for each group of heads" if config.head_aggregation == "concat" else "")


def trained_card(
    model, name: str, auto_class: str, training: dict, report: dict | None, start: ModelCard | None
) -> ModelCard:
    """The card of a model that a recipe trained, of whatever architecture, or of adapters.

    What it started from on the Hub is its base model; of a local one, its own card's base model is.

    Args:
        model: the trained model, a `PreTrainedModel` or peft's around one.
        name: its title.
        auto_class: that loads it, such as "AutoModelForCausalLM".
        training: what the last entry of the report's `trained_since` says.
        report: of the conversion that it started from, if it did.
        start: the card of what it started from, of which nothing but metadata still holds.
    """
    adapted = hasattr(model, "peft_config")
    # peft has a class for each kind of model that it knows (`task_type`), and one for all others.
    known_to_peft = adapted and model.active_peft_config.task_type is not None
    model = model.get_base_model() if adapted else model
    is_ours = type(model).__module__.startswith(f"{modeling.__name__}.")
    place = training["started_from"]
    carried: dict[str, Any] = {} if start is None else {field: getattr(start.data, field, None) for field in CARRIED}
    if _is_hub_id(place) and training["is_checkpoint"]:
        carried |= {"base_model": place, "base_model_relation": "adapter" if adapted else "finetune"}
    data = _with_hub_ids(ModelCardData(**carried, library_name="peft" if adapted else "transformers"))
    data.pipeline_tag = PIPELINE_TAGS.get(auto_class)
    data.tags = [*(TAGS if is_ours else []), "generated_from_trainer"]
    began = f"It began as `{place}`" + (f" at revision `{training['revision']}`." if training["revision"] else ".")
    if report is not None:
        began += (
            f" That goes back to `{report['source']}` ({report['source_architecture']}), which `sas_hf` converted; "
            "the fidelity below is the conversion's, from before it was trained, and says nothing of this model."
        )
    card = ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nA {type(model).__name__}, "
        f"trained by `sas_hf` {__version__}: {training['task'].replace('_', ' ')}, {training['steps']:,} steps, "
        f"{training['trained']}. {began}\n"
    )
    first = "import sas_hf  # registers the architecture\n" if is_ours else ""
    package, arguments = "transformers", ""
    if adapted:
        package = "peft"
        auto_class = auto_class.replace("Auto", "AutoPeft", 1) if known_to_peft else "AutoPeftModel"
        arguments = ', import_allowlist=["sas_hf"]' if is_ours and not known_to_peft else ""
    _set_section(
        card,
        LOADING,
        f"```python\n{first}from {package} import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("PATH"{arguments})  # this repository\'s id, or a folder\n```\n',
    )
    if report is not None:
        _set_section(card, FIDELITY, _fidelity(report))
    return card


def _completed(data: ModelCardData, model_class: type[PreTrainedModel], embeds: bool = False) -> ModelCardData:
    """The metadata with library, tags and task, and without base models that are no Hub ids.

    Args:
        embeds: the checkpoint has modules of sentence-transformers.
    """
    data.library_name = "sentence-transformers" if embeds else "transformers"
    ours = TAGS if model_class.__module__.startswith(modeling.__name__) else []
    ours = ["sentence-transformers", *ours] if embeds else ours
    data.tags = list(dict.fromkeys([*([data.tags] if isinstance(data.tags, str) else data.tags or []), *ours]))
    if embeds:
        data.pipeline_tag = data.pipeline_tag or "sentence-similarity"
    task = PIPELINE_TAGS.get(auto_class_name(model_class))
    if task == "feature-extraction" and "image" in model_class.input_modalities:
        task = "image-feature-extraction"
    data.pipeline_tag = data.pipeline_tag or task
    return _with_hub_ids(data)


def _with_hub_ids(data: ModelCardData) -> ModelCardData:
    """The metadata without base models that are no Hub ids (a folder, say)."""
    named = data.base_model if isinstance(data.base_model, list) else [data.base_model]
    ids = [name for name in named if isinstance(name, str) and _is_hub_id(name)]
    data.base_model = (ids[0] if len(ids) == 1 else ids) or None
    if not ids:
        data["base_model_relation"] = None
    return data


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def _loading_with_package(model_class: type[PreTrainedModel]) -> str:
    name = auto_class_name(model_class)
    return (
        f"```python\nimport sas_hf  # registers the architecture\nfrom transformers import {name}\n\n"
        f'model = {name}.from_pretrained("PATH")  # this repository\'s id, or a folder\n```\n'
    )


def _loading_without_package(model_class: type[PreTrainedModel]) -> str:
    name = auto_class_name(model_class)
    return (
        f"\nWithout `sas_hf`, the code in this repository (from `sas_hf` {__version__}, Apache-2.0) does it; look at "
        f"it before you trust it:\n\n```python\nfrom transformers import {name}\n\n"
        f'model = {name}.from_pretrained("PATH", trust_remote_code=True)\n```\n\n'
        "`AutoTokenizer`, `AutoImageProcessor` and `pipeline` take the same argument, and ask without it.\n"
    )


def _fidelity(report: dict) -> str:
    fidelity = report["fidelity"]
    unrounded, own = report.get("fidelity_unrounded"), report.get("in_saved_dtype")
    saved = report.get("dtype_saved")
    rows = {
        "weights saved in": saved or "-",
        "compared": ", ".join(fidelity.get("compared") or ()) or "-",
        "max abs difference of the outputs": f"{fidelity['max_abs_difference']:.3g}",
        "max abs output": f"{fidelity['max_abs_output']:.4g}",
        "mean KL divergence": _number(fidelity["mean_kl"]),
        "arg-max agreement": _share(fidelity["argmax_agreement"]),
        "source, eager against SDPA attention": f"{fidelity['source_eager_sdpa_difference']:.3g}",
        "perplexity": _perplexities(fidelity),
        "parameters": f"{report['parameters']:,} (source: {report['parameters_source']:,})",
    }
    if unrounded is not None:
        rows |= {
            "against the unrounded source: max abs difference": f"{unrounded['max_abs_difference']:.3g}",
            "against the unrounded source: mean KL, arg-max agreement": (
                f"{_number(unrounded['mean_kl'])}, {_share(unrounded['argmax_agreement'])}"
            ),
        }
    if own is not None:
        rows[f"computing in {saved}: max abs difference to the source in float32"] = (
            f"{_number(own['max_abs_difference'])} (source in {saved}: {_number(own['source_max_abs_difference'])})"
        )
    against = f"its source (weights {_rounding(report)})" if unrounded is not None else "its source"
    amount = f"{fidelity['images']} images" if fidelity.get("images") else f"{fidelity['tokens']} tokens"
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return (
        f"When it was made, the saved checkpoint was measured against {against} in float32 on {amount} "
        f"({report['verified_on']}).\n\n| measure | value |\n|---|---|\n{table}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _perplexities(fidelity: dict) -> str:
    found = (fidelity.get("perplexity"), fidelity.get("perplexity_source"))
    return "-" if None in found else f"{found[0]:.4g} (source: {found[1]:.4g})"


def _section(heading: str) -> re.Pattern:
    return re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", flags=re.MULTILINE | re.DOTALL)


def _set_section(card: ModelCard, heading: str, body: str) -> None:
    """Replace the section of that heading, or add it at the end."""
    section, text = f"## {heading}\n\n{body.strip()}\n", card.text.strip()
    replaced, count = _section(heading).subn(lambda _: section + "\n", text, count=1)
    card.text = (replaced if count else f"{text}\n\n{section}").strip() + "\n"
