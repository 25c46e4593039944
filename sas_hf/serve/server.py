"""`transformers serve` for SAS models: the same server, which knows them, and refuses what it cannot do with them.

Its flags, routes and answers are those of the installed version of Transformers.
"""

import copy
import functools
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import typer
from transformers import PreTrainedTokenizerBase
from transformers.cli.serve import Serve
from transformers.generation import ContinuousBatchingConfig
from transformers.utils.import_utils import is_serve_available

from ..hub.checkpoints import check_vocabulary, read_settings
from ..hub.info import COUNTED
from ..modeling import SASGPTConfig, SASGPTForCausalLM


def serve(arguments: Sequence[str], program: str = "sas-hf serve", tell: Callable[[str], object] = print) -> None:
    """
    Serve a checkpoint over HTTP, as OpenAI's API has it, until the process is told to stop.

    A model that simulates is served with continuous batching in the "base" form of its cache: the pool of Transformers
    holds nothing else.

    Args:
        arguments: MODEL (folder or Hub id) and the flags of `transformers serve`; `["--help"]` shows them.
        program: what the help and usage errors call this.
        tell: gets what a user should know before the first request, one line each.

    Raises:
        ImportError: without what the extra `serve` installs.
        FileNotFoundError: for a MODEL that is none.
        ValueError: for a model that is not one of text from left to right, or has no place in the pool of
            `--continuous-batching`; for a tokenizer with tokens that the model has no embeddings for.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(_server_class(tell))
    typer.main.get_command(app)(list(arguments), prog_name=program, standalone_mode=False)


def _server_class(tell: Callable[[str], object]) -> type[Serve]:
    class Server(Serve):
        # Its signature is the command's: flags, defaults and help texts.
        @functools.wraps(Serve.__init__)  # type: ignore[misc]  # mypy knows no decorated constructors
        def __init__(self, force_model: str | None = None, **flags):
            if not is_serve_available():
                raise ImportError("`sas-hf serve` needs FastAPI, Uvicorn and openai: pip install 'sas_hf[serve]'")
            if force_model is None:
                raise ValueError("`MODEL` is missing: which folder or Hub id shall be served?")
            refuse_unserved(force_model)
            try:
                super().__init__(force_model, **flags)
            finally:
                if hasattr(self, "_generation_state"):
                    self._generation_state.shutdown()  # else the thread of continuous batching outlives the server

        @property
        def server(self):
            """Transformers sets it when the model is loaded, right before it listens."""
            return self._server

        @server.setter
        def server(self, server) -> None:
            for loaded in self._model_manager.loaded_models.values():
                if isinstance(loaded.model, SASGPTForCausalLM):
                    self.prepare(loaded.model, cast(PreTrainedTokenizerBase, loaded.processor))
            self._server = server

        def prepare(self, model: SASGPTForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
            check_vocabulary(tokenizer, model.config.vocab_size, model.name_or_path or "")
            if tokenizer.chat_template is None:
                tell(f"{model.name_or_path} has no chat template: of the routes for text only /v1/completions serves.")
            if self._generation_state._continuous_batching:
                if model.config.simulates:
                    model.config.simulation_cache = "base"
                refuse_pool(model, self._generation_state._cb_config)

    Server.__doc__ = Serve.__doc__
    return Server


def refuse_pool(model: SASGPTForCausalLM, settings: ContinuousBatchingConfig | None) -> None:
    """Raise a `ValueError` where no pool of continuous batching can be made for the model, as at its first request.

    It is made and dropped: the server makes its own for the first request, whose sampling Transformers uses for all.
    """
    manager = model.init_continuous_batching(copy.deepcopy(model.generation_config), copy.deepcopy(settings))
    try:
        manager.warmup()
    except MemoryError as error:
        raise ValueError(f"The pool of `--cb-num-blocks` or `--cb-max-batch-tokens` is too large: {error}.") from error
    del manager
    gc.collect()


def refuse_unserved(name: str) -> None:
    """Raise a `ValueError` for a SAS checkpoint that does not continue text, before anything is loaded."""
    if name.endswith(".gguf"):
        return
    place, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    settings = read_settings(place, revision or None)
    if settings.get("model_type") not in COUNTED:
        return  # of another library: Transformers itself tells
    architectures = settings.get("architectures")
    served = settings["model_type"] == SASGPTConfig.model_type and architectures == [SASGPTForCausalLM.__name__]
    if not served or not settings.get("is_causal", True):
        raise ValueError(
            f"`architectures` of {name} is {architectures}, `is_causal` {settings.get('is_causal', True)}; "
            f"Transformers' server continues text, as of the SAS models a causal {SASGPTForCausalLM.__name__} does. "
            "For others use `transformers.pipeline`, `generate` or sentence-transformers."
        )
