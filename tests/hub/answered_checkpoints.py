"""Checkpoints of every kind and head, each beside an input and the answers that whoever loads it must give."""

from pathlib import Path

import torch
from helpers import (
    ENCODER_VARIANTS,
    GPT_VARIANTS,
    SEQ2SEQ_VARIANTS,
    VIT_VARIANTS,
    encoder,
    gpt,
    images,
    seq2seq,
    token_ids,
    train_tokenizer,
    vit,
)
from safetensors.torch import save_file

from sas_hf import (
    SASEncoderForMaskedLM,
    SASEncoderForMultipleChoice,
    SASEncoderForQuestionAnswering,
    SASEncoderForSequenceClassification,
    SASEncoderForTokenClassification,
    SASEncoderModel,
    SASGPTForCausalLM,
    SASGPTForQuestionAnswering,
    SASGPTForSequenceClassification,
    SASGPTForTokenClassification,
    SASGPTModel,
    SASSeq2SeqForConditionalGeneration,
    SASSeq2SeqModel,
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
ENCODER_HEADS = {
    "AutoModel": SASEncoderModel,
    "AutoModelForMaskedLM": SASEncoderForMaskedLM,
    "AutoModelForSequenceClassification": SASEncoderForSequenceClassification,
    "AutoModelForTokenClassification": SASEncoderForTokenClassification,
    "AutoModelForQuestionAnswering": SASEncoderForQuestionAnswering,
    "AutoModelForMultipleChoice": SASEncoderForMultipleChoice,
}
SEQ2SEQ_HEADS = {"AutoModel": SASSeq2SeqModel, "AutoModelForSeq2SeqLM": SASSeq2SeqForConditionalGeneration}
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
    | {f"encoder-{kind}": (kind, "AutoModelForMaskedLM", SASEncoderForMaskedLM) for kind in ENCODER_VARIANTS}
    | {f"encoder-{name}": ("sas_k5_gqa", name, head) for name, head in ENCODER_HEADS.items()}
    | {
        f"seq2seq-{kind}": (kind, "AutoModelForSeq2SeqLM", SEQ2SEQ_HEADS["AutoModelForSeq2SeqLM"])
        for kind in SEQ2SEQ_VARIANTS
    }
    | {f"seq2seq-{name}": ("sas_k5_gqa", name, head) for name, head in SEQ2SEQ_HEADS.items()}
)
HEADS = {"gpt": TEXT_HEADS, "vit": IMAGE_HEADS, "encoder": ENCODER_HEADS, "seq2seq": SEQ2SEQ_HEADS}


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
        make = {"encoder": encoder, "seq2seq": seq2seq}.get(name.partition("-")[0], gpt)
        model = make(kind, model_class=model_class, vocab_size=len(tokenizer), pad_token_id=0)
        shape = (2, 3, 9) if auto_class == "AutoModelForMultipleChoice" else (2, 9)
        answers = {"input": token_ids(*shape, vocab_size=43)}
    answers["output"] = model(answers["input"])[0].contiguous()
    if auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        answers["generated"] = model.generate(answers["input"], max_new_tokens=6, do_sample=False)
    model.save_pretrained(folder)
    save_file(answers, folder.with_suffix(".answers"))
