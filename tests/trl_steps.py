"""A step of each of TRL's trainers, on a checkpoint's folder or a live model; runs with and without sas_hf."""

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)


TEXTS = ["def f(x): return x", "The statement is executed", "A name", "class C: pass"]
ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "prompt": [{"prompt": text} for text in TEXTS],
    "preference": [{"prompt": text, "chosen": " is good", "rejected": " the the"} for text in TEXTS],
    "judged": [{"prompt": text, "completion": " is good", "label": row < 2} for row, text in enumerate(TEXTS)],
}


def reward(completions, **_) -> list[float]:
    return [float(sum(map(ord, text))) for text in completions]


# Trainer, arguments, rows, options of the arguments, arguments of the trainer.
STEPS = {
    "sft": (SFTTrainer, SFTConfig, "text", {"max_length": 16}, {}),
    "sft-packed": (SFTTrainer, SFTConfig, "text", {"max_length": 16, "packing": True}, {}),
    "dpo": (DPOTrainer, DPOConfig, "preference", {}, {}),
    "kto": (KTOTrainer, KTOConfig, "judged", {}, {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        "prompt",
        {"num_generations": 2, "max_completion_length": 4},
        {"reward_funcs": reward},
    ),
    "reward": (RewardTrainer, RewardConfig, "preference", {}, {}),
}


class KeepLogs(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        self.first = getattr(self, "first", logs)


def step(kind: str, model: str | PreTrainedModel, output: str, lora=False, tokenizer=None, **loading):
    """
    An optimizer step. Gives the trainer, and what it logged of the step.

    Args:
        kind: of `STEPS`.
        model: a folder, or a live model (with its `tokenizer`).
        output: a new folder.
        loading: arguments of `from_pretrained` for a folder.
    """
    trainer_class, arguments_class, rows, options, others = STEPS[kind]
    options = options | ({"model_init_kwargs": loading} if loading else {})
    options |= {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    arguments = arguments_class(output, **options, bf16=False, use_cpu=True, report_to=[], save_strategy="no")
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], task_type=task) if lora else None
    kept = KeepLogs()
    trainer = trainer_class(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(ROWS[rows]),
        processing_class=tokenizer,
        peft_config=adapters,
        callbacks=[kept],
        **others,
    )
    trainer.train()
    return trainer, kept.first
