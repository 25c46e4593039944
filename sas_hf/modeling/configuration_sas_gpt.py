"""Configuration of the SAS GPT: Llama's fields, the backbone choices of GPT-2 checkpoints, and the attention's own."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from .configuration_attention import (
    refuse_misspelt_fields,
    require_choice,
    resolve_attention_fields,
    validate_attention_fields,
)
from .sharing import forget_travelling_code


@strict
class SASGPTConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SASGPTModel`]: a decoder-only Transformer whose attention may be simulated larger than it is
    ("SAS: Simulated Attention Score", §3). Without simulation it is a plain GPT in Llama's or GPT-2's manner.

    Fields not listed here (`vocab_size`, `hidden_size`, `intermediate_size`, `num_hidden_layers`,
    `num_attention_heads`, `num_key_value_heads`, `head_dim`, `rope_parameters`, ...) mean what they mean in
    [`~transformers.LlamaConfig`].

    Args:
        attention_type (`str`, defaults to `"mha"`):
            `"mha"` (multi-query and grouped-query attention are `"mha"` with fewer `num_key_value_heads`; `"mqa"`
            and `"gqa"` are accepted and checked against it), `"mla"`, `"tpa"`, `"optimised"`, `"efficient"` or
            `"super"`. All but `"super"` may be simulated.
        q_lora_rank, kv_lora_rank (`int`, *optional*):
            Ranks of MLA's latents; two thirds and one third of `hidden_size` by default.
        qk_rope_head_dim, qk_nope_head_dim, v_head_dim (`int`, *optional*):
            Features of an MLA head: rotated and not, and values; half of `head_dim`, `head_dim` and `head_dim`.
        q_rank, k_rank, v_rank (`int`, defaults to 6, 2, 2):
            Ranks of TPA's queries, keys and values.
        token_mixing_init (`str`, defaults to `"identity"`):
            Start of Super attention's W^A: `"identity"` (as Efficient attention) or `"normal"`.
        num_simulated_heads (`int`, *optional*):
            Ĥ, a multiple of `num_attention_heads`: heads that the head simulation makes of them (equations 5-7).
            `None`: no head simulation.
        simulated_head_dim (`int`, *optional*):
            D̂ ≥ `head_dim`: features per query and key head that the feature simulation makes (equations 8-11).
            `None`: no feature simulation. (MLA: at least `qk_rope_head_dim + qk_nope_head_dim`.)
        simulation_kernel_size (`int`, defaults to 1):
            κ, odd: kernel of the head convolutions along the features. 1 is the MLP form of equations 2-4.
        simulation_act (`str`, defaults to `"relu"`):
            Non-linearity of the simulation; `"identity"` is the linear ablation of §4.3.
        simulation_init (`str`, defaults to `"near_identity"`):
            `"near_identity"` starts every simulated head near a copy of its base head, `"pytorch"` as the modules of
            the paper's Appendix L start.
        simulation_cache (`str`, defaults to `"expanded"`):
            What generation caches: `"expanded"` the simulated keys and values (fast), `"base"` the keys and values
            before simulation, unrotated (small: expanded anew at every step).
        query_pre_attn_scalar (`float`, *optional*):
            Scores are divided by its square root. Defaults to `simulated_head_dim`, or `head_dim` without feature
            simulation; a converted model keeps its source's.
        attention_output_bias (`bool`, *optional*):
            Whether the output projection has a bias; as `attention_bias` says of all projections when `None`.
        is_causal (`bool`, defaults to `True`):
            `False` turns the model into a bidirectional encoder (no cache, no generation).
        position_embedding_type (`str`, defaults to `"rope"`):
            `"rope"` or `"learned"` absolute positions. RoPE turns the leading
            `head_dim * rope_parameters["partial_rotary_factor"]` features of queries and keys, after simulation.
        norm_type (`str`, defaults to `"rms_norm"`):
            `"rms_norm"` (with `rms_norm_eps`) or `"layer_norm"` (with `layer_norm_eps`).
        mlp_type (`str`, defaults to `"gated"`):
            `"gated"` (gate, up and down projection) or `"plain"` (up and down projection).
        hidden_dropout (`float`, defaults to 0.0):
            Dropout of the embeddings and of each residual branch.
        classifier_pooling (`str`, defaults to `"last"`):
            What the sequence classifier reads: the `"last"` token or the `"mean"` of the tokens.

    Raises:
        ValueError: for a misspelt field or an impossible combination; the message names the field and valid values.
    """

    model_type = "sas_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
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

    attention_type: str = "mha"
    num_simulated_heads: int | None = None
    simulated_head_dim: int | None = None
    simulation_kernel_size: int = 1
    simulation_act: str = "relu"
    simulation_init: str = "near_identity"
    simulation_cache: str = "expanded"
    query_pre_attn_scalar: int | float | None = None
    is_causal: bool = True
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    q_rank: int = 6
    k_rank: int = 2
    v_rank: int = 2
    token_mixing_init: str = "identity"

    position_embedding_type: str = "rope"
    rope_parameters: RopeParameters | dict | None = None
    norm_type: str = "rms_norm"
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    mlp_type: str = "gated"
    mlp_bias: bool = False
    hidden_dropout: int | float = 0.0
    classifier_pooling: str = "last"

    def __post_init__(self, **kwargs):
        refuse_misspelt_fields(self, kwargs)
        forget_travelling_code(self, kwargs)
        resolve_attention_fields(self)
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "learned":
            self.rope_parameters = None
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        # Also run by `@strict` afterwards; run here so that the error is a plain ValueError.
        self.validate_architecture()

    @property
    def query_head_dim(self) -> int:
        """Width of queries and keys as the base projection makes them, before feature simulation."""
        if self.attention_type == "mla":
            return self.qk_rope_head_dim + self.qk_nope_head_dim
        return self.head_dim

    @property
    def projects_to_cached_heads(self) -> bool:
        """Whether the base projection's state is `num_key_value_heads` x `head_dim` keys and as many values."""
        return self.attention_type in ("mha", "mqa", "gqa", "optimised")

    @property
    def qk_head_dim(self) -> int | None:
        """`None` where every cached tensor has `num_key_value_heads` x `head_dim` numbers per token, else a width.

        Transformers reads this name to learn that a static cache must take its shape from the first state it sees.
        """
        if self.projects_to_cached_heads and not self.simulates:
            return None
        return self.simulated_head_dim or self.query_head_dim

    @property
    def rotary_dim(self) -> int:
        """Number of leading query and key features that RoPE turns (0 with learned positions)."""
        if self.rope_parameters is None:
            return 0
        whole = self.qk_rope_head_dim if self.attention_type == "mla" else self.head_dim
        width = int(whole * self.rope_parameters.get("partial_rotary_factor", 1.0))
        return width + width % 2

    @property
    def simulates(self) -> bool:
        """Whether any simulation is on."""
        return self.num_simulated_heads is not None or self.simulated_head_dim is not None

    def validate_architecture(self):
        """Raise a `ValueError` for what cannot be built."""
        validate_attention_fields(self)
        require_choice(self, "position_embedding_type", "rope", "learned")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}; it must be one of {', '.join(ACT2FN)}.")
        require_choice(self, "norm_type", "rms_norm", "layer_norm")
        require_choice(self, "mlp_type", "gated", "plain")
        require_choice(self, "classifier_pooling", "last", "mean")
        query_width = self.simulated_head_dim or self.query_head_dim
        whole = self.qk_rope_head_dim if self.attention_type == "mla" else self.head_dim
        if self.rotary_dim > query_width + query_width % 2:  # an odd width is rounded up, as in Transformers
            raise ValueError(
                f"`rope_parameters['partial_rotary_factor']` asks for {self.rotary_dim} rotated features, but queries "
                f"and keys have {query_width}; the factor is relative to {whole} features and must be at most "
                f"{query_width / whole:g}."
            )


__all__ = ["SASGPTConfig"]
