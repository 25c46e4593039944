"""Look at what heads look at: load an image classifier, predict, and draw the attention of base and simulated heads.

    python examples/attention_maps.py MODEL IMAGE --output maps.png

MODEL is a SAS ViT with head simulation: a checkpoint folder or Hub id. A row of the picture is a base head, which is
what the model's queries and keys would attend to without simulation; beside it are the simulated heads made of it.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import sas_hf  # noqa: F401  registers the architectures
from sas_hf.data import open_image


matplotlib.use("agg")
from matplotlib import pyplot as plt


@torch.no_grad()
def attention_maps(model, pixels: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `[num_labels]`, and how much each patch is attended to in a layer: by base heads `[H, rows, columns]` and
    by simulated heads `[Ĥ, rows, columns]`, averaged over the tokens that attend.

    Args:
        pixels: `[1, channels, height, width]`.
    """
    model.set_attn_implementation("eager")  # the one that gives weights
    attention = model.base_model.layers[layer].attention
    seen = {}
    hook = attention.register_forward_pre_hook(lambda module, args: seen.update(hidden_states=args[0]))
    output = model(pixels, output_attentions=True)
    hook.remove()

    query = attention.project_queries(seen["hidden_states"])
    key, _ = attention.expand(*attention.project_state(seen["hidden_states"]))
    repeats = query.shape[2] // key.shape[2]
    key = key.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5
    prefix, grid = model.config.num_prefix_tokens, model.config.grid_shape
    maps = (weights[0].mean(dim=1)[:, prefix:] for weights in (scores.softmax(-1), output.attentions[layer]))
    return output.logits[0], *(weights.unflatten(1, grid) for weights in maps)


def draw(image, base: torch.Tensor, simulated: torch.Tensor, title: str, path: Path) -> None:
    """The image, then per base head a row: its map and those of the simulated heads j with j mod H = that head."""
    heads, groups = len(base), len(simulated) // len(base)
    size = (1.6 * (groups + 2) + 0.7, 1.7 * heads + 0.5)
    even = base[0].numel()  # times a weight: 1 where a patch has its even share
    most = even * float(max(base.max(), simulated.max()))
    figure, axes = plt.subplots(heads, groups + 2, figsize=size, layout="constrained", squeeze=False)
    for row in range(heads):
        panels = [("image", None), (f"base {row}", base[row])]
        panels += [(f"simulated {row + heads * group}", simulated[row + heads * group]) for group in range(groups)]
        for axis, (name, values) in zip(axes[row], panels, strict=True):
            axis.set_axis_off()
            if values is None and row > 0:
                continue
            axis.set_title(name, fontsize=8)
            if values is None:
                axis.imshow(image, cmap="gray")
            else:
                shown = axis.imshow(even * values, cmap="magma", vmin=0, vmax=most)
    figure.colorbar(shown, ax=axes, shrink=0.8, label="attention to a patch, 1: its even share")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("image", type=Path)
    parser.add_argument("--layer", type=int, default=-1, help="which layer, -1: the last")
    parser.add_argument("--classes", help="their names, with commas; by default the model's")
    parser.add_argument("--output", type=Path, default=Path("attention_maps.png"))
    arguments = parser.parse_args()

    model = AutoModelForImageClassification.from_pretrained(arguments.model).eval()
    if not getattr(model.config, "num_simulated_heads", None):
        parser.error(f"{arguments.model} has no simulated heads; convert it, or train one with simulation")
    layers = model.config.num_hidden_layers
    if not -layers <= arguments.layer < layers:
        parser.error(f"--layer is {arguments.layer}, but the model has {layers} layers, 0 to {layers - 1}")
    image = open_image(arguments.image, model.config.num_channels)
    pixels = AutoImageProcessor.from_pretrained(arguments.model)(image, return_tensors="pt")["pixel_values"]
    logits, base, simulated = attention_maps(model, pixels, arguments.layer)

    probabilities, classes = logits.softmax(-1).topk(min(3, len(logits)))
    names = arguments.classes.split(",") if arguments.classes else list(model.config.id2label.values())
    if len(names) != len(logits):
        parser.error(f"--classes names {len(names)} classes, but the model has {len(logits)}")
    best = [f"{names[int(c)]} {p:.0%}" for p, c in zip(probabilities, classes, strict=True)]
    draw(image, base, simulated, ", ".join(best), arguments.output)
    print(f"{', '.join(best)}; picture in {arguments.output}")


if __name__ == "__main__":
    main()
