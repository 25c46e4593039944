"""A short training run on streamed text that can be killed: `python streamed.py FOLDER PATTERN kill|twice`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from helpers import USE_CPU, gpt_config, train_tokenizer
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments, default_data_collator, set_seed

from sas_hf import SASGPTForCausalLM
from sas_hf.training import DataRecipe, DurableTrainer, training_data


STEPS, SAVE_EVERY, KILLED_AFTER = 9, 3, 7
LENGTH, ROWS_PER_STEP, BUFFER = 32, 3 * 2, 5


class CountingTokenizer(PreTrainedTokenizerFast):
    """Remembers the texts that it encodes."""

    texts: list[str]

    def __call__(self, texts, **kwargs):
        self.texts += texts
        return super().__call__(texts, **kwargs)


def counting_tokenizer() -> CountingTokenizer:
    tokenizer = CountingTokenizer(
        tokenizer_object=train_tokenizer().backend_tokenizer, pad_token="<pad>", eos_token="<eot>"
    )
    tokenizer.texts = []
    return tokenizer


class Kill(TrainerCallback):
    """The machine goes away between two checkpoints, without a word."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


class Recording(DurableTrainer):
    """Keeps the tokens of every batch that it trains on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.batches.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def run(
    folder: str, files: str, kill: bool = False, resume: str | bool = True, tokenizer=None, **options
) -> DurableTrainer:
    torch.set_num_threads(1)
    set_seed(7)
    tokenizer = tokenizer or train_tokenizer()
    # Dropout makes the run depend on the random state, which a resumed run must take up again.
    config = gpt_config("sas_k5_gqa", vocab_size=len(tokenizer), initializer_range=0.02, hidden_dropout=0.1)
    recipe = DataRecipe(train=files, streaming=True, sequence_length=LENGTH, shuffle_buffer=BUFFER)
    data = training_data(recipe, tokenizer, seed=3)
    arguments = {
        "max_steps": STEPS,
        "save_steps": SAVE_EVERY,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "use_cpu": USE_CPU,
        "disable_tqdm": True,
        "report_to": "none",
    }
    trainer = Recording(
        SASGPTForCausalLM(config),
        TrainingArguments(folder, **(arguments | options)),
        train_dataset=data.train,
        data_collator=default_data_collator,
        callbacks=[*data.callbacks, *([Kill()] if kill else [])],
    )
    trainer.batches = []
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def run_twice(folder: str, files: str) -> None:
    """In each of several processes: a run, and its end once more; what each trained on goes to a file."""
    whole = run(folder, files)
    again = run(folder, files, resume=f"{folder}/checkpoint-6")
    weights = dict(again.model.named_parameters())
    found = {
        "whole": whole.batches,
        "again": again.batches,
        "same": all(torch.equal(weights[name], weight) for name, weight in whole.model.named_parameters()),
    }
    Path(folder, f"process-{whole.args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    folder, files, what = sys.argv[1:]
    run(folder, files, kill=True) if what == "kill" else run_twice(folder, files)
