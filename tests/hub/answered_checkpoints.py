"""Checkpoints of every kind and head, each beside an input and the answers that whoever loads it must give."""

from pathlib import Path

import torch
from helpers import GPT_VARIANTS, VIT_VARIANTS, gpt, images, token_ids, train_tokenizer, vit
from safetensors.torch import save_file

from sas_hf import (
    SASGPTForCausalLM,
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASGPTModel,
    SASViTForImageClassification,
    SASViTForMaskedImageModeling,
    SASViTModel,
)
from sas_hf.modeling.image_processing_sas_vit import SASViTImageProcessor


TEXT_HEADS = {
    "AutoModelForCausalLM": SASGPTForCausalLM,
    "AutoModel": SASGPTModel,
    "AutoModelForSequenceClassification": SASGPTForSequenceClassification,
    "AutoModelForTokenClassification": SASGPTForTokenClassification,
    "AutoModelForQuestionAnswering": SASGPTForQuestionAnswering,
}
IMAGE_HEADS = {
    "AutoModel": SASViTModel,
    "AutoModelForImageClassification": SASViTForImageClassification,
    "AutoModelForMaskedImageModeling": SASViTForMaskedImageModeling,
}
# Name of a checkpoint → its kind, the Auto class that loads it, and what that makes.
CHECKPOINTS = (
    {kind: (kind, "AutoModelForCausalLM", SASGPTForCausalLM) for kind in GPT_VARIANTS}
    | {f"gpt-{name}": ("sas_mqa", name, head) for name, head in TEXT_HEADS.items()}
    | {f"vit-{kind}": (kind, "AutoModelForImageClassification", SASViTForImageClassification) for kind in VIT_VARIANTS}
    | {f"vit-{name}": ("sas_k5_gqa", name, head) for name, head in IMAGE_HEADS.items()}
)


@torch.no_grad()
def save_checkpoint(name: str, folder: Path) -> None:
    """The checkpoint of that name with its tokenizer or image processor; beside it, an input and the answers to it."""
    kind, auto_class, model_class = CHECKPOINTS[name]
    if model_class in IMAGE_HEADS.values():
        model = vit(kind, model_class=model_class)
        shape = dict(zip(("height", "width"), model.config.image_shape, strict=True))
        SASViTImageProcessor(size=shape, num_channels=model.config.num_channels).save_pretrained(folder)
        answers = {"input": images(model.config)}
    else:
        tokenizer = train_tokenizer()
        tokenizer.save_pretrained(folder)
        model = gpt(kind, model_class=model_class, vocab_size=len(tokenizer), pad_token_id=0)
        answers = {"input": token_ids(2, 9, vocab_size=len(tokenizer))}
    answers["output"] = model(answers["input"])[0].contiguous()
    if auto_class == "AutoModelForCausalLM":
        answers["generated"] = model.generate(answers["input"], max_new_tokens=6, do_sample=False)
    model.save_pretrained(folder)
    save_file(answers, folder.with_suffix(".answers"))
