"""What one process and two processes both do: the same inputs, the same training, the same gradients.

Run under `torchrun`, `python two_processes.py` does it sharded; equality.py does it whole and compares.
"""

from pathlib import Path

import torch
from helpers import GPT_VARIANTS, real_text, token_ids, train_tokenizer
from transformers import DataCollatorForLanguageModeling, PrinterCallback, Trainer, TrainingArguments

from sas_hf import SASGPTForCausalLM


STEPS, GLOBAL_BATCH, PROCESSES = 20, 8, 2
TENSOR_PARALLEL = tuple(GPT_VARIANTS)
GENERATE = ("gqa", "sas_k5_gqa", "mla_sas", "super")
PIPELINE = ("sas_k5_gqa", "learned", "super")


def load(folder: Path, **options) -> SASGPTForCausalLM:
    return SASGPTForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()


def train(model: SASGPTForCausalLM, folder: Path, processes: int) -> list[float]:
    """The losses of 20 steps of the stock Trainer, whose batches do not depend on the number of processes."""
    tokenizer = train_tokenizer()
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // 2 // processes,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        weight_decay=0.1,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        seed=11,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[tokenizer(text, truncation=True, max_length=24) for text in real_text()[:100]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def inputs() -> torch.Tensor:
    """Two batches of token ids `[2, B, T]`."""
    return token_ids(2, 3, 11)


def logits_and_gradients(model: SASGPTForCausalLM, ids: torch.Tensor) -> tuple[dict, dict]:
    """Logits with and without autograd (sharded maps take other paths), and gradients accumulated over two batches."""
    with torch.no_grad():
        logits = {"inference": model(ids[0]).logits}
    for batch in ids:
        output = model(batch, labels=batch)
        output.loss.backward()
    logits["training"] = output.logits.detach()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


def greedy(model: SASGPTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
