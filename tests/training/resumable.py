"""A short training run that can be killed and resumed: `python resumable.py FOLDER kill|resume`."""

import os
import signal
import sys

import torch
from helpers import USE_CPU, gpt_config, real_text, train_tokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments, set_seed

from sas_hf import SASGPTForCausalLM


STEPS, SAVE_EVERY, KILLED_AFTER = 9, 4, 6


class Kill(TrainerCallback):
    """The machine goes away between two checkpoints, without a word."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: str, kill: bool = False, resume: bool = False, trainer_class=Trainer, **options) -> Trainer:
    torch.set_num_threads(1)
    set_seed(7)
    tokenizer = train_tokenizer()
    # Dropout makes the run depend on the random state, which a resumed run must take up again.
    config = gpt_config(
        "sas_k5_gqa", vocab_size=len(tokenizer), initializer_range=0.02, hidden_dropout=0.1, attention_dropout=0.1
    )
    trainer = trainer_class(
        SASGPTForCausalLM(config),
        TrainingArguments(
            folder,
            max_steps=STEPS,
            save_steps=SAVE_EVERY,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            use_cpu=USE_CPU,
            seed=11,
            disable_tqdm=True,
            report_to="none",
            **options,
        ),
        train_dataset=[tokenizer(text, truncation=True, max_length=24) for text in real_text()[:50]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[Kill()] if kill else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(folder)
    torch.save(trainer.optimizer.state_dict(), f"{folder}/final_optimizer.pt")
    return trainer


if __name__ == "__main__":
    run(sys.argv[1], kill=sys.argv[2] == "kill", resume=sys.argv[2] == "resume")
