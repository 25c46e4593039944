"""The shipped configurations for `accelerate launch`, read by accelerate's own launcher and plugin."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from helpers import gpt

import sas_hf.training


FOLDER = Path(sas_hf.training.__file__).parent / "accelerate"


def launched_with(file: str) -> dict[str, str]:
    """The environment that `accelerate launch --config_file` gives each process."""
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(FOLDER / file), "--main_process_port", "0", "train.py"]
    )
    arguments, configuration, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(configuration.deepspeed_config)
        return prepare_deepspeed_cmd_env(arguments)[1]
    assert arguments.multi_gpu or arguments.use_fsdp
    return prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize(
    "file, kind",
    [
        ("ddp.yaml", DistributedType.MULTI_GPU),
        ("fsdp2.yaml", DistributedType.FSDP),
        ("deepspeed_zero3.yaml", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_reads_it(file, kind):
    configuration = load_config_from_file(str(FOLDER / file))  # refuses unknown keys
    assert configuration.distributed_type == kind
    assert configuration.num_processes == 2
    assert launched_with(file)["ACCELERATE_MIXED_PRECISION"] == "no"


def test_fsdp_wraps_our_decoder_layers(monkeypatch):
    for name, value in launched_with("fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward
    model = gpt()
    plugin.set_auto_wrap_policy(model)  # refuses a class that the model does not have
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(model.model.layers[0])}


def test_zero_stage_3():
    environment = launched_with("deepspeed_zero3.yaml")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert environment["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"  # the training arguments' own
