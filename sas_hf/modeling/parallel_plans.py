"""How text models are spread over devices: their tensor- and pipeline-parallel plans, as Transformers reads them.

A plan names modules of the base model and how each is split (`transformers.distributed.tensor_parallel`).
"""

from transformers import PreTrainedConfig


# The linear maps of each kind that make its heads. Not named, and so whole on every device: the down-projections of
# MLA, norms, simulation and token mixing.
_HEAD_PROJECTIONS = {
    "mla": ("q_b_proj", "kv_b_proj"),
    "tpa": tuple(f"{side}_{factor}_proj" for side in "qkv" for factor in ("head", "feature")),
    "optimised": ("q_proj", "k_proj"),
    "efficient": ("q_proj",),
    "super": ("q_proj",),
}

PIPELINE_PARALLEL_PLAN = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


class TensorParallelPlan(property):
    """A configuration's `base_model_tp_plan`, made of its fields whenever it is asked for; nothing else can be set.

    Up to 5.19, Transformers sets the plan that it found, with "embed_tokens" where embeddings are tied. Our plans name
    them, by the name they have.
    """

    def __set__(self, config: PreTrainedConfig, plan: dict[str, str]) -> None:
        if plan != self.__get__(config) | {"embed_tokens": "embedding_rowwise"}:
            super().__set__(config, plan)


def tensor_parallel_plan(config: PreTrainedConfig, embeddings: str = "embed_tokens") -> dict[str, str]:
    """The way to split each module of the base model of a SAS GPT, by the module's name. A tied head is its
    embeddings: both are split, or neither could be."""
    plan = attention_plan(config, "layers.*.self_attn") | feed_forward_plan(config, "layers.*.mlp")
    return {embeddings: "embedding_rowwise"} | plan


def encoder_parallel_plan(config: PreTrainedConfig) -> dict[str, str]:
    """The same of a SAS encoder."""
    return tensor_parallel_plan(config, "embeddings.embed_tokens")


def seq2seq_parallel_plans(config: PreTrainedConfig) -> dict[str, dict[str, str]]:
    """The same of both halves of a SAS encoder–decoder, "encoder" and "decoder"; each place has its own attention."""
    decoder = encoder_parallel_plan(config.place("decoder"))
    return {
        "encoder": encoder_parallel_plan(config.place("encoder")),
        "decoder": decoder | attention_plan(config.place("cross"), "layers.*.encoder_attn"),
    }


def attention_plan(config: PreTrainedConfig, name: str) -> dict[str, str]:
    """
    Of the attention layers that `name` matches.

    Where heads have nothing in common (MHA and GQA without simulation and norm), each device computes its own heads
    from projection to output, as in Llama; their number must then be a multiple of the devices'. Everything else mixes
    heads or learns parameters that they share. There each device computes a part of the projections, all gather them,
    simulate and attend whole, and split again for the output projection, as in OLMo 2: parameters that are not split
    see all heads on every device, so their gradients are those of one device, also when they are accumulated.
    """
    apart = (
        config.attention_type in ("mha", "gqa")
        and config.num_key_value_heads not in (None, 1)  # None: about to be refused
        and not config.simulates
        and config.qk_norm is None
    )
    names = _HEAD_PROJECTIONS.get(config.attention_type, ("q_proj", "k_proj", "v_proj"))
    plan = {f"{name}.{projection}": "colwise" if apart else "colwise_gather_output" for projection in names}
    return plan | {f"{name}.o_proj": "rowwise" if apart else "rowwise_split_input"}


def feed_forward_plan(config: PreTrainedConfig, name: str) -> dict[str, str]:
    """Of the feed-forward blocks that `name` matches."""
    inner = ("gate_proj", "up_proj") if config.mlp_type == "gated" else ("up_proj",)
    return {f"{name}.{projection}": "colwise" for projection in inner} | {f"{name}.down_proj": "rowwise"}
