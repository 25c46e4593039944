"""The models: a SAS GPT of two layers for tokens; for vectors one layer of attention, read from one query."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..modeling import SASEncoderConfig, SASEncoderPreTrainedModel, SASGPTConfig, SASGPTForCausalLM
from ..modeling.kinds import make_attention
from .tasks import Task


HIDDEN_SIZE = 32
# Of weights at the start: what keeps a signal's variance where there is one layer; less where residual branches add to
# each other, which then learn recall in hundreds of steps instead of thousands.
READER_SPREAD = HIDDEN_SIZE**-0.5
GPT_SPREAD = 0.05


class Reader(SASEncoderPreTrainedModel):
    """
    Attention to a sequence of vectors from one query, then a feed-forward block: `[B, T, inputs]` to `[B, outputs]`.

    Args:
        inputs, outputs: widths of the sequence and of what is asked for.
        query_width: of the query that comes with a sequence; 0: it is a parameter.
    """

    def __init__(self, config: SASEncoderConfig, inputs: int, outputs: int, query_width: int = 0):
        super().__init__(config)
        width = config.hidden_size
        self.embed = nn.Linear(inputs, width)
        self.embed_query = nn.Linear(query_width, width) if query_width else nn.Embedding(1, width)
        self.attention = make_attention(config, 0)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, outputs)
        self.post_init()

    def forward(
        self, sequence: torch.Tensor, labels: torch.Tensor, query: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """
        Args:
            sequence: `[B, T, inputs]`.
            labels: `[B, outputs]`, of which the loss is the mean squared error.
            query: `[B, 1, query_width]`, or `None`.
        """
        if query is None:
            query = sequence.new_zeros(len(sequence), 1, dtype=torch.long)
        query = self.embed_query(query)
        fetched, _ = self.attention(query, key_value_states=self.embed(sequence))
        hidden = self.norm(query + fetched)
        predicted = self.down(nn.functional.gelu(self.up(hidden))).squeeze(1)
        return SequenceClassifierOutput(loss=nn.functional.mse_loss(predicted, labels), logits=predicted)


def shape_of(task: Task, level: int) -> dict[str, torch.Size]:
    """Of one row of a batch, what has which shape, the row's own dimension of 1 included."""
    with torch.device("cpu"):  # also where a model is made without numbers
        return {name: part.shape for name, part in task.make_batch(level, 1, torch.Generator()).items()}


def config_of(task: Task, level: int, fields: dict) -> SASGPTConfig | SASEncoderConfig:
    """
    Args:
        fields: of attention, and what else differs from the model that all variants share.
    """
    shared: dict[str, Any] = {
        "hidden_size": HIDDEN_SIZE,
        "recompute_simulation": False,  # nothing is to be saved at this size, and the arithmetic stays what it is
    }
    if task.vocab_size is None:
        shared |= {"num_hidden_layers": 1, "intermediate_size": 4 * HIDDEN_SIZE, "vocab_size": 1}
        shared |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "initializer_range": READER_SPREAD}
        return SASEncoderConfig(**shared | fields)
    shared |= {"num_hidden_layers": 2, "intermediate_size": 2 * HIDDEN_SIZE, "vocab_size": task.vocab_size}
    shared |= {"tie_word_embeddings": False, "initializer_range": GPT_SPREAD}
    return SASGPTConfig(**shared | {"max_position_embeddings": shape_of(task, level)["input_ids"][1]} | fields)


def make_model(task: Task, level: int, config: SASGPTConfig | SASEncoderConfig) -> Reader | SASGPTForCausalLM:
    """A random one, to be trained."""
    if isinstance(config, SASGPTConfig):
        return SASGPTForCausalLM(config).train()
    shape = shape_of(task, level)
    widths = [shape[name][-1] if name in shape else 0 for name in ("sequence", "labels", "query")]
    return Reader(config, *widths).train()
