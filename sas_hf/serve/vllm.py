"""The plugin by which vLLM knows the SAS architectures: it calls `register` in each of its processes.

Nothing of vLLM is imported before. That this is imported tells Transformers of the architectures, so that folders load
without code, and those with code without running it. The models are in vllm_models.py; what is served, and what it
costs, is in docs/serving.md.
"""

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..companions import MODEL_TYPES


logger = logging.get_logger(__name__)

# By the architecture that a checkpoint names, the class that serves it.
SERVED = {
    "SASGPTForCausalLM": "SASGPTForCausalLM",
    "SASGPTModel": "SASGPTEmbeddings",
    "SASGPTForSequenceClassification": "SASGPTClassifier",
    "SASEncoderModel": "SASEncoderEmbeddings",
    "SASEncoderForMaskedLM": "SASEncoderEmbeddings",
    "SASEncoderForSequenceClassification": "SASEncoderClassifier",
}


def register() -> None:
    """Tell vLLM of the architectures: their classes, the sizes of their cache, and what cannot be served."""
    try:
        import vllm.config  # noqa: F401  (first: vLLM's modules import one another)
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
        from vllm.transformers_utils.model_arch_config_convertor import (
            MODEL_ARCH_CONFIG_CONVERTORS,
            ModelArchConfigConvertorBase,
        )
    except ImportError as error:  # what is raised here would keep vLLM from serving any model at all
        logger.warning(f"SAS models cannot be served by this version of vLLM (written for 0.32): {error}")
        return

    class Sizes(ModelArchConfigConvertorBase):
        """Of the cache: simulated heads; values are padded to the keys' width."""

        def __init__(self, hf_config: PreTrainedConfig, *args, **kwargs):
            refuse_model(hf_config)
            super().__init__(hf_config, *args, **kwargs)

        def get_total_num_attention_heads(self) -> int:
            return self.hf_config.num_simulated_heads or self.hf_config.num_attention_heads

        def get_total_num_kv_heads(self) -> int:
            return self.hf_config.num_simulated_heads or self.hf_config.num_key_value_heads

        def get_head_size(self) -> int:
            return self.hf_config.simulated_head_dim or self.hf_config.query_head_dim

    class Checks(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config) -> None:
            refuse_writing(model_config.hf_config, model_config.runner_type)
            if model_config.pooler_config is not None:
                set_pooling(model_config, model_config._pooler_config_sources)

        @staticmethod
        def verify_and_update_config(vllm_config) -> None:
            refuse_parallelism(vllm_config.model_config.hf_config, vllm_config.parallel_config)

    for model_type in MODEL_TYPES:
        MODEL_ARCH_CONFIG_CONVERTORS[model_type] = Sizes
    for architecture, model in SERVED.items():
        ModelRegistry.register_model(architecture, f"sas_hf.serve.vllm_models:{model}")
        MODELS_CONFIG_MAP[architecture] = Checks


def refuse_model(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` for what vLLM would serve wrongly, or not at all."""
    architecture = (config.architectures or ["?"])[0]
    if config.model_type in ("sas_seq2seq", "sas_vit") or architecture not in SERVED:
        raise ValueError(
            f"vLLM cannot serve `architectures` {architecture!r}: of the SAS models it serves {', '.join(SERVED)}."
        )
    if config.attention_type == "super":
        raise ValueError(
            "vLLM cannot serve `attention_type='super'`: it mixes values along the tokens of a text, and vLLM holds "
            "the tokens of several texts in one row. Use `transformers serve`, or choose 'efficient'."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"vLLM cannot serve `rope_parameters['rope_type']` {rope!r}: its angles follow from the longest text of "
            "the batch, so that answers would depend on who else asks."
        )


def refuse_writing(config: PreTrainedConfig, runner: str) -> None:
    """Raise a `ValueError` where text is wanted of a model that sees both directions."""
    if runner == "generate" and not config.is_causal:
        raise ValueError(
            "`is_causal` is False in this configuration: such a model cannot write. Use `runner='pooling'` for its "
            "embeddings."
        )


def refuse_parallelism(config: PreTrainedConfig, parallel) -> None:
    """Raise a `ValueError` where vLLM would give each device a share of heads that are made of all heads."""
    size = parallel.tensor_parallel_size
    apart = (config.base_model_tp_plan or {}).get("layers.*.self_attn.o_proj") == "rowwise"
    if size > 1 and not apart:
        raise ValueError(
            f"`tensor_parallel_size` is {size}, but this model's heads are made of one another (simulation, "
            f"`qk_norm`, `attention_type={config.attention_type!r}`); use 1, and `data_parallel_size` or "
            "`pipeline_parallel_size` for more devices."
        )
    if size > 1 and config.num_key_value_heads % size:
        raise ValueError(
            f"`tensor_parallel_size` ({size}) must divide `num_key_value_heads` ({config.num_key_value_heads})."
        )


def set_pooling(model_config, sources: dict[str, str]) -> None:
    """Let a classifier of texts read the tokens that it was trained to read, unless the user says otherwise.

    Args:
        sources: who chose each field of its pooling, as vLLM notes it.
    """
    if model_config.architecture.endswith("ForSequenceClassification") and sources["seq_pooling_type"] != "user":
        kinds = {"last": "LAST", "mean": "MEAN", "first": "CLS"}
        model_config.pooler_config.seq_pooling_type = kinds[model_config.hf_config.classifier_pooling]
