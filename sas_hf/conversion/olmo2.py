"""OLMo 2 checkpoints: norms behind attention and feed-forward block, and of all query and all key heads at once."""

from .family import LLAMA_FIELDS, SourceFamily, same, text_architectures


OLMO2 = SourceFamily(
    model_type="olmo2",
    architectures=text_architectures("Olmo2", without=("ForTokenClassification", "ForQuestionAnswering")),
    fields=LLAMA_FIELDS | same("attention_bias"),
    constants={"norm_position": "post", "qk_norm": "all_heads"},
)
