"""Every attention kind, plain and simulated, learns a real passage by heart with the stock Trainer."""

import pytest
import torch
from helpers import USE_CPU, gpt_config, real_text, train_tokenizer
from transformers import Trainer, TrainingArguments

from sas_hf import SASGPTForCausalLM


VARIANTS = [
    "mha", "gqa", "mqa", "mla", "tpa", "optimised", "efficient", "super",
    "sas", "sas_k5_gqa", "sas_mqa", "mla_sas", "tpa_sas", "optimised_sas", "efficient_sas",
]  # fmt: skip
LENGTH = 48


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_passage_is_memorised_and_reproduced(variant, tmp_path):
    tokenizer = train_tokenizer()
    passage = tokenizer(real_text()[5], return_tensors="pt")["input_ids"][0, :LENGTH]
    assert len(passage) == LENGTH
    config = gpt_config(
        variant, vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, initializer_range=0.02, head_dim=None,
        simulated_head_dim=24 if "sas" in variant else None, query_pre_attn_scalar=None, token_mixing_init="identity",
    )  # fmt: skip
    model = SASGPTForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=120,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=USE_CPU,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": passage, "labels": passage}] * 8)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.05 * losses[0]
    prompt = passage[None, :6]
    generated = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_length=LENGTH,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    assert generated[0].tolist() == passage.tolist()
