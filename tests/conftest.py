"""Settings of every test: one thread, fixed seeds, no network, and deprecations of Transformers are failures."""

import importlib.util
import logging
import os
from pathlib import Path


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


# Of these, the tests make models and inputs. Elsewhere it is the code under test that places them: trainers, the
# harness and the commands, whose loaders draw on the CPU and take no other default.
PLACED_BY_TESTS = ("modeling", "conversion", "serve")


@pytest.fixture(autouse=True)
def tests_device(request):
    """What tests make is on the device of `SAS_HF_TEST_DEVICE`."""
    from helpers import DEVICE  # not before what deprecations are refused

    placed = request.path.relative_to(Path(__file__).parent).parts[0] in PLACED_BY_TESTS
    if DEVICE.type == "cpu" or not placed:
        yield
        return
    with DEVICE:
        yield


@pytest.fixture
def tolerate_deprecations():
    """For code of Transformers that itself calls what it deprecates."""
    logger = transformers_logging.get_logger()
    logger.removeHandler(REFUSAL)
    yield
    logger.addHandler(REFUSAL)


def pytest_collection_modifyitems(items):
    reasons = {}
    if importlib.util.find_spec("vllm") is None:
        reasons["vllm"] = "vLLM is not installed here: `make test-vllm` makes it an environment"
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device, and this machine has none"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def browser():
    from browser import Browser, find_browser  # few tests need one

    binary = find_browser()
    if binary is None:
        pytest.skip("no Chromium here: install one (Debian: apt-get install chromium), or name its file in CHROMIUM")
    with Browser(binary) as started:
        yield started
