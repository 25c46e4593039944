"""The SAS ViT beside Transformers' ViT and DeiT, and beside the second paper's counts: the tables of docs/images.md.

    python benchmarks/vision.py

Random models of ViT-Tiny's width, all parameters scattered, float32: the largest difference between the outputs of a
model of Transformers, the SAS ViT without simulation on its weights, and its conversion with simulation.
"""

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import DeiTConfig, ViTConfig

from sas_hf.configurations import named_config
from sas_hf.conversion import ConversionOptions, compare_models, convert_model
from sas_hf.hub.info import describe


FIELDS = {
    "hidden_size": 192,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "image_size": 96,
    "num_labels": 100,
    "initializer_range": 0.1,
}
SOURCES = {
    "ViTModel": ViTConfig,
    "ViTForImageClassification": ViTConfig,
    "ViTForMaskedImageModeling": ViTConfig,
    "DeiTForImageClassification": DeiTConfig,
    "DeiTForImageClassificationWithTeacher": DeiTConfig,
}
# "You Need to Pay Better Attention", Table 1, exact in Tables 5 and 6: parameters of one attention layer.
PAPER = {
    "mnist": {"standard": 66_048, "optimised": 49_536, "efficient": 33_024, "super": 37_184},
    "cifar100": {"standard": 263_168, "optimised": 197_376, "efficient": 131_584, "super": 197_890},
    "imagenet": {"standard": "2.36M", "optimised": "1.77M", "efficient": "1.18M", "super": "1.22M"},
}


def equality() -> Table:
    table = Table(title="Largest difference of an output, 16 random images")
    for column in ("source", "largest output", "plain", "converted, 3 -> 9 heads", "source: eager against SDPA"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for architecture, config_class in SOURCES.items():
        torch.manual_seed(0)
        source = getattr(transformers, architecture)(config_class(**FIELDS)).eval()
        for parameter in source.parameters():
            parameter.data.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.0))
        pixels = torch.randn(16, 3, 96, 96)
        plain = convert_model(source, ConversionOptions(num_simulated_heads=0, simulated_head_dim=0))
        exact = compare_models(source, plain, [pixels])
        converted = compare_models(source, convert_model(source), [pixels])
        values = (exact.max_abs_difference, converted.max_abs_difference, exact.source_eager_sdpa_difference)
        table.add_row(architecture, f"{exact.max_abs_output:.3g}", *(f"{value:.1e}" for value in values))
    return table


def counts() -> Table:
    table = Table(title="Parameters of one attention layer, and of the whole model")
    for column in ("model", "attention", "paper", "whole model", "tokens"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for task, kinds in PAPER.items():
        for kind in (*kinds, "sas"):
            config = named_config(f"{task}-{kind}")
            costs = describe(config)
            paper = kinds.get(kind, "-")
            table.add_row(
                f"{task}-{kind}",
                f"{costs.attention_parameters // config.num_hidden_layers:,}",
                f"{paper:,}" if isinstance(paper, int) else paper,
                f"{costs.parameters:,}",
                str(costs.context),
            )
    return table


def main() -> None:
    Console().print(equality())
    Console().print(counts())


if __name__ == "__main__":
    main()
