"""Train small GPTs that differ in one choice on the same batches and compare their validation loss.

    python benchmarks/learning_curves.py TEXT_DIR OUT.json --variants mha sas-leading sas-all --seeds 0 1

TEXT_DIR holds train.txt and validation.txt. A run that is already in OUT.json is not repeated, so the command may be
stopped and started again. Figures decided by it: the default start and the default rotary width (docs/decisions.md).
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed

from sas_hf import SASGPTConfig, SASGPTForCausalLM
from sas_hf.data.text_files import read_whole


SIMULATED = {"num_simulated_heads": 12, "simulated_head_dim": 48}
ALL_ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.5}}
VARIANTS = {
    "mha": {},
    "sas-leading": SIMULATED,
    "sas-all": SIMULATED | ALL_ROTATED,
    "sas-leading-pytorch": SIMULATED | {"simulation_init": "pytorch"},
    "sas-all-pytorch": SIMULATED | ALL_ROTATED | {"simulation_init": "pytorch"},
    "sas-leading-k5": SIMULATED | {"simulation_kernel_size": 5},
    "sas-all-k5": SIMULATED | ALL_ROTATED | {"simulation_kernel_size": 5},
}
LENGTH = 128


def make_tokenizer(text: str, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Blocks(Dataset):
    """A text as consecutive blocks of LENGTH tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text: str):
        pieces = tokenizer(text.split("\n\n"), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([token for piece in pieces for token in piece])
        self.blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class Curve(TrainerCallback):
    def __init__(self):
        self.points = {}

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.points[state.global_step] = metrics["eval_loss"]


def train(variant: str, seed: int, train_set: Blocks, validation_set: Blocks, steps: int) -> dict:
    set_seed(seed)
    config = SASGPTConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=341,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        **VARIANTS[variant],
    )
    model, curve = SASGPTForCausalLM(config), Curve()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.1,
            adam_beta2=0.95,
            eval_strategy="steps",
            eval_steps=max(1, steps // 4),
            save_strategy="no",
            report_to=[],
            seed=0,  # the same batches for every model; `seed` above changes the start
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=train_set, eval_dataset=validation_set, callbacks=[curve]
        )
        trainer.train()
    return {"variant": variant, "seed": seed, "parameters": model.num_parameters(), "validation_loss": curve.points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["mha", "sas-leading", "sas-all"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()

    text = read_whole(arguments.text / "train.txt")
    tokenizer = make_tokenizer(text[:4_000_000])
    train_set = Blocks(tokenizer, text[: 4 * arguments.steps * 32 * LENGTH])
    validation = read_whole(arguments.text / "validation.txt")[:160_000]
    validation_set = Blocks(tokenizer, validation)

    runs = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for seed in arguments.seeds:
        for variant in arguments.variants:
            if any((run["variant"], run["seed"]) == (variant, seed) for run in runs):
                continue
            run = train(variant, seed, train_set, validation_set, arguments.steps)
            runs.append(run)
            arguments.out.write_text(json.dumps(runs, indent=1) + "\n")
            final = list(run["validation_loss"].values())[-1]
            print(f"{variant:22} seed {seed}  loss {final:.4f}  perplexity {math.exp(final):.2f}", flush=True)


if __name__ == "__main__":
    main()
