"""Settings of every test: one thread, fixed seeds, no network, and deprecations of Transformers are failures."""

import importlib.util
import logging
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers.utils import logging as transformers_logging


class _RefuseDeprecations(logging.Handler):
    """Raises where Transformers logs that something we call is deprecated (it rarely uses `warnings` for it)."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            raise FutureWarning(message)


REFUSAL = _RefuseDeprecations()


def pytest_configure(config):
    torch.set_num_threads(1)
    transformers_logging.get_logger().addHandler(REFUSAL)
    for category in ("DeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:transformers")
        config.addinivalue_line("filterwarnings", f"error::{category}:sas_hf")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def tolerate_deprecations():
    """For code of Transformers that itself calls what it deprecates."""
    logger = transformers_logging.get_logger()
    logger.removeHandler(REFUSAL)
    yield
    logger.addHandler(REFUSAL)


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        skip = pytest.mark.skip(reason="vLLM is not installed here: `make test-vllm` makes it an environment")
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(skip)
