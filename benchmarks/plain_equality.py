"""The first table of docs/encoders.md: plain attention of this package beside Transformers' BERT, BART and others.

python benchmarks/plain_equality.py

Each is a random model at the size of its base checkpoint, with biases and norms off their zeros and ones; ours has its
weights. Compared are outputs, loss, gradients and what is generated, for rows padded on the right and on the left.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel

from sas_hf.conversion import convert_model
from sas_hf.conversion.convert import NO_SIMULATION


SMALLER = {"vocab_size": 8000, "pad_token_id": 1}
SEQ2SEQ = SMALLER | {"decoder_start_token_id": 2, "eos_token_id": 2, "bos_token_id": 0, "forced_eos_token_id": None}
BASE = {"d_model": 512, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
BASE |= {"encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}
SOURCES = {  # BERT's and BART's own sizes, but for the vocabulary
    "BertForMaskedLM": SMALLER,
    "BertForSequenceClassification": SMALLER,
    "RobertaForMaskedLM": SMALLER | {"max_position_embeddings": 514},
    "DistilBertForMaskedLM": SMALLER,
    "BartForConditionalGeneration": SEQ2SEQ
    | BASE
    | {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072},
    "MBartForConditionalGeneration": SEQ2SEQ | BASE | {"scale_embedding": True},
    "MarianMTModel": SEQ2SEQ | BASE | {"scale_embedding": True, "activation_function": "swish"},
}
GENERATIONS = {"greedy": {}, "beams": {"num_beams": 4}, "static": {"cache_implementation": "static"}}


def make_source(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(AutoConfig.for_model(model_class.config_class.model_type, **SOURCES[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Three rows of 64 tokens, the second padded on the right, the third on the left, and labels."""
    mask = torch.ones(3, 64, dtype=torch.long)
    mask[1, 40:] = mask[2, :17] = 0
    ids = torch.randint(5, 8000, (3, 64)).masked_fill(mask == 0, 1)
    labels = torch.randint(5, 8000, (3, 48)) if model.config.is_encoder_decoder else ids.masked_fill(mask == 0, -100)
    if "Sequence" in type(model).__name__:
        labels = torch.tensor([1, 0, 1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: PreTrainedModel, inputs: dict[str, torch.Tensor]):
    """Outputs, and the gradient of the embeddings."""
    output = model(**inputs)
    output.loss.backward()
    return output, model.get_input_embeddings().weight.grad


def compare(name: str) -> dict:
    theirs = make_source(name)
    ours, inputs = convert_model(theirs, NO_SIMULATION), make_inputs(theirs)
    (expected, gradient), (found, own_gradient) = step(theirs, inputs), step(ours, inputs)
    real = inputs["attention_mask"].bool()
    logits = [output.logits.detach() for output in (found, expected)]
    if logits[0].shape[:2] == real.shape:
        logits = [each[real] for each in logits]
    row = {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in theirs.parameters()),
        "logits": (logits[0] - logits[1]).abs().max().item(),
        "largest_logit": logits[1].abs().max().item(),
        "loss": (found.loss - expected.loss).abs().item(),
        "gradient": ((own_gradient - gradient).norm() / gradient.norm()).item(),
    }
    if theirs.can_generate() and theirs.config.is_encoder_decoder:
        del inputs["labels"]
        for kind, options in GENERATIONS.items():
            options = options | {"max_new_tokens": 40, "do_sample": False}
            row[kind] = torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))
    with tempfile.TemporaryDirectory() as folder:  # what is on disk is what was compared
        ours.save_pretrained(folder)
        loaded = type(ours).from_pretrained(folder)
    row["after_loading"] = all(map(torch.equal, ours.state_dict().values(), loaded.state_dict().values()))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows = [compare(name) for name in track(arguments.models, "Models")]
    table = Table(title="Plain attention, the same weights, float32", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("model", "logits", "largest", "loss", "gradient", *GENERATIONS):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        generated = [{True: "equal", False: "DIFFERENT", None: "-"}[row.get(kind)] for kind in GENERATIONS]
        numbers = [f"{row[name]:.1e}" for name in ("loss", "gradient")]
        table.add_row(row["model"], f"{row['logits']:.1e}", f"{row['largest_logit']:.3g}", *numbers, *generated)
    Console().print(table)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
