"""Configuration of the SAS GPT: Llama's fields, the backbone choices of other decoders, and the attention's own."""

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from .configuration_attention import SASAttentionConfig, require_choice, require_positive, strict
from .parallel_plans import PIPELINE_PARALLEL_PLAN, TensorParallelPlan, tensor_parallel_plan


@strict
class SASGPTConfig(SASAttentionConfig):
    r"""
    Configuration of a [`SASGPTModel`]: a decoder-only Transformer whose attention may be simulated larger than it is
    ("SAS: Simulated Attention Score", §3). Without simulation it is a plain GPT in the manner of Llama, GPT-2,
    GPT-NeoX, Qwen, SmolLM3, OLMo 2 or Phi.

    Attention's own fields are those of [`SASAttentionConfig`]. Fields not listed here (`vocab_size`, `hidden_size`,
    `intermediate_size`, `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim`,
    `rope_parameters`, ...) mean what they mean in
    [`~transformers.LlamaConfig`].

    Args:
        attention_output_bias (`bool`, *optional*):
            Whether the output projection has a bias; as `attention_bias` says of all projections when `None`.
        is_causal (`bool`, defaults to `True`):
            `False` turns the model into a bidirectional encoder (no cache, no generation).
        position_embedding_type (`str`, defaults to `"rope"`):
            `"rope"` or `"learned"` absolute positions. RoPE turns the leading
            `head_dim * rope_parameters["partial_rotary_factor"]` features of queries and keys, after simulation.
        no_rope_layers (`list[int]`, *optional*):
            One number per layer, as in [`~transformers.SmolLM3Config`]: 1 for a layer with RoPE, 0 for one without
            positions. `None`: all layers have RoPE.
        norm_type (`str`, defaults to `"rms_norm"`):
            `"rms_norm"` (with `rms_norm_eps`) or `"layer_norm"` (with `layer_norm_eps`).
        norm_position (`str`, defaults to `"pre"`):
            `"pre"`: attention and feed-forward block read normed hidden states; `"post"`: their outputs are normed
            (OLMo 2).
        use_parallel_residual (`bool`, defaults to `False`):
            The feed-forward block reads what attention reads, not what it writes (GPT-NeoX, Phi).
        mlp_type (`str`, defaults to `"gated"`):
            `"gated"` (gate, up and down projection) or `"plain"` (up and down projection).
        hidden_dropout (`float`, defaults to 0.0):
            Dropout of the embeddings and of each residual branch.
        lm_head_bias (`bool`, defaults to `False`):
            Whether the language-modelling head has a bias (Phi).
        classifier_pooling (`str`, defaults to `"last"`):
            What the sequence classifier reads: the `"last"` token or the `"mean"` of the tokens.

    Raises:
        ValueError: for a misspelt field or an impossible combination; the message names the field and valid values.
    """

    model_type = "sas_gpt"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    base_model_pp_plan = PIPELINE_PARALLEL_PLAN  # type: ignore[assignment]  # in the form of Transformers' own models

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: int | float = 0.0

    is_causal: bool = True
    position_embedding_type: str = "rope"
    rope_parameters: RopeParameters | dict | None = None
    no_rope_layers: list[int] | None = None
    norm_type: str = "rms_norm"
    norm_position: str = "pre"
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    use_parallel_residual: bool = False
    mlp_type: str = "gated"
    mlp_bias: bool = False
    hidden_dropout: int | float = 0.0
    lm_head_bias: bool = False
    classifier_pooling: str = "last"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "learned":
            self.rope_parameters = None
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        # Also run by `@strict` afterwards; run here so that the error is a plain ValueError.
        self.validate_architecture()

    @TensorParallelPlan
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the base model; it depends on the attention kind."""
        return tensor_parallel_plan(self)

    def rotates(self, layer_idx: int) -> bool:
        """Whether RoPE turns queries and keys of this layer."""
        if self.no_rope_layers is not None:
            return self.no_rope_layers[layer_idx] == 1
        return self.position_embedding_type == "rope"

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for what cannot be built."""
        super().validate_architecture()
        require_positive(self, "vocab_size", "intermediate_size", "max_position_embeddings")
        require_choice(self, "position_embedding_type", "rope", "learned")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}; it must be one of {', '.join(ACT2FN)}.")
        require_choice(self, "norm_type", "rms_norm", "layer_norm")
        require_choice(self, "norm_position", "pre", "post")
        require_choice(self, "mlp_type", "gated", "plain")
        require_choice(self, "classifier_pooling", "last", "mean")
        if self.use_parallel_residual and self.norm_position == "post":
            raise ValueError(
                "`use_parallel_residual` is written for `norm_position='pre'`, but it is 'post'; choose one of them."
            )
        self._validate_no_rope_layers()

    def _validate_no_rope_layers(self):
        layers = self.no_rope_layers
        if layers is None:
            return
        if self.position_embedding_type != "rope":
            raise ValueError(
                f"`no_rope_layers` ({layers}) chooses layers with RoPE, but `position_embedding_type` is "
                f"{self.position_embedding_type!r}; leave it out."
            )
        if len(layers) != self.num_hidden_layers or not set(layers) <= {0, 1}:
            raise ValueError(
                f"`no_rope_layers` is {layers}; it must hold `num_hidden_layers` ({self.num_hidden_layers}) numbers, "
                "1 for a layer with RoPE and 0 for one without."
            )


__all__ = ["SASGPTConfig"]
