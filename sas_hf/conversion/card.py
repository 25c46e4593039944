"""The model card of a converted checkpoint: the recipe, the measured fidelity and how to load it."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


def model_card(report: dict, local: bool) -> ModelCard:
    """From the report of `convert_checkpoint`; a `local` source is no base model that the Hub could link."""
    fidelity, simulation = report["fidelity"], report["simulation"]
    rows = {
        "max abs difference of the outputs": f"{fidelity['max_abs_difference']:.3g}",
        "max abs output": f"{fidelity['max_abs_output']:.4g}",
        "mean KL divergence": "-" if fidelity["mean_kl"] is None else f"{fidelity['mean_kl']:.3g}",
        "arg-max agreement": f"{fidelity['argmax_agreement']:.2%}",
        "source, eager against SDPA attention": f"{fidelity['source_eager_sdpa_difference']:.3g}",
        "parameters": f"{report['parameters']:,} (source: {report['parameters_source']:,})",
    }
    auto_class = "AutoModel" + report["architecture"].removeprefix("SASGPT").removeprefix("Model")
    data = ModelCardData(
        library_name="transformers",
        tags=["sas", "sas_hf"],
        base_model=None if local else report["source"],
        base_model_relation=None if local else "finetune",
    )
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {Path(report['source']).name} with Simulated Attention Score\n",
        f"Converted by `sas_hf` {report['versions']['sas_hf']} from `{report['source']}` "
        f"({report['source_architecture']}): {simulation['num_simulated_heads'] or 'no'} simulated heads, "
        f"{simulation['simulated_head_dim'] or 'no'} simulated features per head, kernel "
        f"{simulation['simulation_kernel_size']}. It computes what its source computes, ready for fine-tuning.\n",
        f"```python\nimport sas_hf  # registers the architecture\nfrom transformers import {auto_class}\n\n"
        f'model = {auto_class}.from_pretrained("PATH")\n```\n',
        f"## Fidelity\n\nMeasured in float32 on {fidelity['tokens']} tokens of {report['verified_on']}.\n",
        "| measure | value |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    return ModelCard("\n".join(lines) + "\n")
