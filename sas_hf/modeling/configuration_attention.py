"""What the configurations of all SAS architectures share: the fields of the attention kind and of its simulation.

They are declared, resolved and checked here, once; an architecture's configuration adds its backbone.
"""

import difflib
from typing import TYPE_CHECKING, Self, TypeVar, cast

from huggingface_hub.dataclasses import strict as strict_dataclass
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .sharing import forget_travelling_code


logger = logging.get_logger(__name__)

ATTENTION_TYPES = ("mha", "mqa", "gqa", "mla", "tpa", "optimised", "efficient", "super")
SLICING_TYPES = ("optimised", "efficient", "super")  # their heads are slices of the layer's input

# No fields of ours, but stored if given, and read by Transformers' caches.
WINDOWS = ("sliding_window", "attention_chunk_size", "layer_types")

# Accepted by the base class as keyword arguments although they are not dataclass fields.
_EXTRA_KEYWORDS = {
    "attn_implementation",
    "decoder_start_token_id",
    "experts_implementation",
    "name_or_path",
    "num_labels",
    "original_max_position_embeddings",
    "output_attentions",
    "partial_rotary_factor",
    "per_layer_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sep_token_id",
    "torch_dtype",
    "use_return_dict",
}


class AtMost(int):
    """A default of a rank, which holds as far as there are as many heads and features; a given rank never is one."""


Config = TypeVar("Config", bound=PreTrainedConfig)


def strict(config_class: type[Config]) -> type[Config]:
    """huggingface_hub's decorator, but a value of a wrong type is a `ValueError` in our words, as every other is."""
    config_class = strict_dataclass(config_class)
    checked = config_class.__setattr__

    def __setattr__(self, name: str, value: object) -> None:
        try:
            checked(self, name, value)
        except StrictDataclassFieldValidationError as error:
            kind = config_class.__dataclass_fields__[name].type
            wanted = getattr(kind, "__name__", str(kind)).replace(" | ", " or ")
            raise ValueError(f"`{name}` is {value!r}; it must be of type {wanted}.") from error

    config_class.__setattr__ = __setattr__  # type: ignore[method-assign]  # mypy knows no such thing
    return config_class


@strict
class SASAttentionConfig(PreTrainedConfig):
    r"""
    The part of a configuration that says how attention is computed.

    Args:
        attention_type (`str`, defaults to `"mha"`):
            `"mha"` (multi-query and grouped-query attention are `"mha"` with fewer `num_key_value_heads`; `"mqa"`
            and `"gqa"` are accepted and checked against it), `"mla"`, `"tpa"`, `"optimised"`, `"efficient"` or
            `"super"`. All but `"super"` may be simulated.
        q_lora_rank, kv_lora_rank (`int`, *optional*):
            Ranks of MLA's latents; two thirds and one third of `hidden_size` by default, or what narrow heads allow.
        qk_rope_head_dim, qk_nope_head_dim, v_head_dim (`int`, *optional*):
            Features of an MLA head: rotated and not, and values; half of `head_dim` (made even), `head_dim` and
            `head_dim`.
        q_rank, k_rank, v_rank (`int`, defaults to 6, 2, 2):
            Ranks of TPA's queries, keys and values; by default fewer where there are fewer heads or features.
        token_mixing_init (`str`, defaults to `"identity"`):
            Start of Super attention's W^A: `"identity"` (as Efficient attention) or `"normal"`.
        num_simulated_heads (`int`, *optional*):
            Ĥ, a multiple of `num_attention_heads`: heads that the head simulation makes of them (equations 5-7).
            `None`: no head simulation.
        simulated_head_dim (`int`, *optional*):
            D̂ ≥ `head_dim`: features per query and key head that the feature simulation makes (equations 8-11).
            `None`: no feature simulation. (MLA: at least `qk_rope_head_dim + qk_nope_head_dim`.)
        simulate_value_features (`bool`, defaults to `False`):
            A feature simulation of values, too, which keeps their width. The paper has none (§3.4).
        simulation_kernel_size (`int`, defaults to 1):
            κ, odd: kernel of the head convolutions along the features. 1 is the MLP form of equations 2-4.
        head_aggregation (`str`, defaults to `"mean"`):
            What the output projection W^O reads of the Ĥ / H groups of simulated heads: their `"mean"` (PEAA, equation
            12), or all heads, divided by the number of groups (`"concat"`): W^O then has a part for each group, which
            PEAA has in common.
        simulation_act (`str`, defaults to `"relu"`):
            Non-linearity of the simulation; `"identity"` is the linear ablation of §4.3.
        simulation_init (`str`, defaults to `"near_identity"`):
            `"near_identity"` starts every simulated head near a copy of its base head, `"pytorch"` as the modules of
            the paper's Appendix L start.
        simulation_cache (`str`, defaults to `"expanded"`):
            What generation caches: `"expanded"` the simulated keys and values (fast), `"base"` the keys and values
            before simulation, unrotated (small: expanded anew at every step).
        recompute_simulation (`bool`, defaults to `True`):
            Keep the base heads for the backward pass and simulate them again there, instead of keeping what the
            simulation makes of them. The numbers do not change.
        compile_simulation (`bool`, defaults to `False`):
            Simulate each side of attention (queries, keys, values) by one function that `torch.compile` makes: maps,
            biases, activations and rotation in as few passes over memory as it finds. Where compiling fails it runs
            uncompiled, with one warning. Nothing changes under `eager`, or where the whole model is compiled.
        query_pre_attn_scalar (`float`, *optional*):
            Scores are divided by its square root. Defaults to `simulated_head_dim`, or `head_dim` without feature
            simulation; a converted model keeps its source's.
        qk_norm (`str`, *optional*):
            RMSNorm (with `rms_norm_eps`) of queries and keys before simulation and RoPE: `"per_head"` over the
            `head_dim` features of each (Qwen3) or `"all_heads"` over the whole projection (OLMo 2). "mha", "mqa" and
            "gqa" only.

    A subclass has Transformers' `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `initializer_range`, and
    under these names or by its `attribute_map` also `attention_bias` (of the base projections),
    `attention_output_bias` (of the output projection), `attention_dropout`, `is_causal`, `max_position_embeddings`
    (positions that token mixing has parameters for) and `rms_norm_eps` (of MLA's latents, queries and keys).
    """

    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_type: str = "mha"
    num_simulated_heads: int | None = None
    simulated_head_dim: int | None = None
    simulate_value_features: bool = False
    simulation_kernel_size: int = 1
    head_aggregation: str = "mean"
    simulation_act: str = "relu"
    simulation_init: str = "near_identity"
    simulation_cache: str = "expanded"
    recompute_simulation: bool = True
    compile_simulation: bool = False
    query_pre_attn_scalar: int | float | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    q_rank: int = AtMost(6)
    k_rank: int = AtMost(2)
    v_rank: int = AtMost(2)
    token_mixing_init: str = "identity"
    qk_norm: str | None = None

    def __post_init__(self, **kwargs):
        kwargs = self.take_aliases(kwargs)
        refuse_misspelt_fields(self, kwargs)
        forget_travelling_code(self, kwargs)
        # TRL reads it of every architecture that is not Transformers' own.
        self.auto_map = kwargs.pop("auto_map", {})
        resolve_attention_fields(self)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> Self:
        """As in Transformers, which sets the fields among `kwargs` once all others are checked: these are, too.

        Raises:
            ValueError: for an impossible combination.
        """
        found = super().from_dict(config_dict, **kwargs)
        (found[0] if isinstance(found, tuple) else found).validate_architecture()
        return found

    if TYPE_CHECKING:

        @property
        def num_labels(self) -> int:
            """A number in every configuration that was made; Transformers' annotation says that there may be none."""
            ...

        @num_labels.setter
        def num_labels(self, num_labels: int) -> None: ...

    def take_aliases(self, keywords: dict) -> dict:
        """Set the fields that `keywords` have under another name (`attribute_map`); the base class would do so after
        what follows from them was worked out. Returns the other keywords."""
        for name in keywords.keys() & self.attribute_map.keys():
            setattr(self, name, keywords[name])
        return {name: value for name, value in keywords.items() if name not in self.attribute_map}

    def to_dict(self) -> dict:
        """As in Transformers; an `auto_map` that names nothing is left out."""
        output = super().to_dict()
        if output.get("auto_map") == {}:
            del output["auto_map"]
        return output

    @property
    def query_head_dim(self) -> int:
        """Width of queries and keys as the base projection makes them, before feature simulation."""
        if self.attention_type == "mla":
            return cast(int, self.qk_rope_head_dim) + cast(int, self.qk_nope_head_dim)
        return cast(int, self.head_dim)

    @property
    def simulates(self) -> bool:
        """Whether any simulation is on."""
        features = self.simulated_head_dim is not None or self.simulate_value_features
        return self.num_simulated_heads is not None or features

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
        if getattr(self, "rope_parameters", None) is None:
            return 0
        whole = self.qk_rope_head_dim if self.attention_type == "mla" else self.head_dim
        width = int(whole * self.rope_parameters.get("partial_rotary_factor", 1.0))
        return width + width % 2

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for what cannot be built."""
        validate_attention_fields(self)


def refuse_misspelt_fields(config: PreTrainedConfig, keywords: dict) -> None:
    """Raise a `ValueError` when an unknown keyword looks like a misspelt field of `config`.

    The base class stores any keyword it does not know as an attribute, so `num_simulated_head=36` would silently
    give a model without simulation. Keywords that resemble no field are left to the base class. In a configuration
    that was saved before, a near miss may be another version's field, so there it is only warned about.
    """
    config_class = type(config)
    fields = sorted(config_class.__dataclass_fields__)
    known = _EXTRA_KEYWORDS | set(GenerationConfig().to_dict()) | set(PreTrainedConfig().to_dict())
    for name in keywords:
        if name.startswith("_") or name in known:
            continue
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.8)
        if near:
            message = (
                f"{config_class.__name__} has no field `{name}` (value {keywords[name]!r}). Did you mean `{near[0]}`?"
            )
            if config.transformers_version is None:
                raise ValueError(message)
            logger.warning_once(message)


def resolve_attention_fields(config: PreTrainedConfig) -> None:
    """Fill the attention fields that follow from others: kv heads, head size and the score scale.

    `num_key_value_heads` is 1 for "mqa" and `num_attention_heads` for "mha" when not given; `head_dim` is
    `hidden_size / num_attention_heads`; `query_pre_attn_scalar` is the width of the queries that meet the keys.
    """
    if config.num_key_value_heads is None:
        if config.attention_type == "mqa":
            config.num_key_value_heads = 1
        elif config.attention_type != "gqa":
            config.num_key_value_heads = config.num_attention_heads
    if config.head_dim is None and config.num_attention_heads > 0:
        config.head_dim = config.hidden_size // config.num_attention_heads
        if config.hidden_size % config.num_attention_heads != 0:
            raise ValueError(
                f"`hidden_size` ({config.hidden_size}) is not a multiple of `num_attention_heads` "
                f"({config.num_attention_heads}); choose such a multiple or give `head_dim` explicitly."
            )
    if config.attention_type == "mla":
        defaults = {
            "qk_rope_head_dim": lambda: (config.head_dim + 3) // 4 * 2,  # even, as pairs are rotated
            "qk_nope_head_dim": lambda: config.head_dim,
            "v_head_dim": lambda: config.head_dim,
            "q_lora_rank": lambda: min(
                2 * config.hidden_size // 3, config.num_attention_heads * config.query_head_dim
            ),
            "kv_lora_rank": lambda: min(
                config.hidden_size // 3,
                config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim),
            ),
        }
        for name, value in defaults.items():
            if getattr(config, name) is None:
                setattr(config, name, value())
    for name in ("q_rank", "k_rank", "v_rank"):
        rank = getattr(config, name)
        if isinstance(rank, AtMost):
            limit = min(config.num_attention_heads, config.head_dim or 0) if config.attention_type == "tpa" else rank
            setattr(config, name, min(int(rank), int(limit)))
    if config.query_pre_attn_scalar is None:
        config.query_pre_attn_scalar = config.simulated_head_dim or config.query_head_dim


def validate_attention_fields(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` that names field, value and remedy for an impossible combination of attention fields."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    require_positive(config, "hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(
            f"`rope_parameters['rope_type']` is {rope_type!r}; it must be one of "
            f"{', '.join(map(repr, sorted({'default', *ROPE_INIT_FUNCTIONS})))}."
        )

    for name in WINDOWS:
        value = getattr(config, name, None)
        if value is not None and set(value if isinstance(value, list) else [value]) != {"full_attention"}:
            raise ValueError(
                f"`{name}` is {value!r}, but every layer attends to all tokens, and Transformers' caches would forget "
                "some of them; leave it out."
            )
    require_choice(config, "attention_type", *ATTENTION_TYPES)
    require_choice(config, "simulation_init", "near_identity", "pytorch")
    require_choice(config, "head_aggregation", "mean", "concat")
    require_choice(config, "simulation_cache", "expanded", "base")
    require_choice(config, "token_mixing_init", "identity", "normal")
    if kv_heads is None:
        raise ValueError(
            "`num_key_value_heads` is needed with `attention_type='gqa'`: a divisor of `num_attention_heads` "
            f"({heads}) between 2 and {heads - 1}."
        )
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"`num_key_value_heads` ({kv_heads}) must divide `num_attention_heads` ({heads}); "
            f"possible values: {[n for n in range(1, heads + 1) if heads % n == 0]}."
        )
    if config.attention_type == "mqa" and kv_heads != 1:
        raise ValueError(f"`attention_type='mqa'` has one key/value head, but `num_key_value_heads` is {kv_heads}.")
    if config.attention_type == "gqa" and not 1 < kv_heads < heads:
        raise ValueError(
            f"`attention_type='gqa'` needs `num_key_value_heads` between 1 and `num_attention_heads` ({heads}), got "
            f"{kv_heads}; use 'mqa' for one key/value head and 'mha' for as many as queries."
        )

    if config.attention_type not in ("mha", "mqa", "gqa") and kv_heads != heads:
        raise ValueError(
            f"`num_key_value_heads` ({kv_heads}) must equal `num_attention_heads` ({heads}) with "
            f"`attention_type={config.attention_type!r}`; leave it out."
        )
    require_choice(config, "qk_norm", None, "per_head", "all_heads")
    if config.qk_norm is not None and config.attention_type not in ("mha", "mqa", "gqa"):
        raise ValueError(
            f"`qk_norm` ({config.qk_norm!r}) norms projected queries and keys, which `attention_type="
            f"{config.attention_type!r}` does not have; leave it out or choose 'mha', 'mqa' or 'gqa'."
        )
    if config.attention_type in SLICING_TYPES and config.head_dim * heads != config.hidden_size:
        raise ValueError(
            f"`attention_type={config.attention_type!r}` slices its input into heads, so `head_dim` "
            f"({config.head_dim}) x `num_attention_heads` ({heads}) must be `hidden_size` ({config.hidden_size})."
        )
    if config.attention_type == "mla":
        value_width = config.qk_nope_head_dim + config.v_head_dim
        require_positive(config, "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        _require_rank(config, "q_lora_rank", config.hidden_size, heads * config.query_head_dim)
        _require_rank(config, "kv_lora_rank", config.hidden_size, heads * value_width)
    if config.attention_type == "tpa":
        for name in ("q_rank", "k_rank", "v_rank"):
            _require_rank(config, name, heads, config.head_dim)
    if config.attention_type == "super" and config.simulates:
        raise ValueError(
            "`attention_type='super'` cannot be simulated (its values are mixed along the tokens); leave out "
            "`num_simulated_heads`, `simulated_head_dim` and `simulate_value_features`, or choose 'efficient'."
        )

    simulated_heads, kernel = config.num_simulated_heads, config.simulation_kernel_size
    if simulated_heads is not None and (simulated_heads < heads or simulated_heads % heads != 0):
        below = max(1, simulated_heads // heads) * heads
        raise ValueError(
            f"`num_simulated_heads` ({simulated_heads}) must be a multiple of `num_attention_heads` ({heads}), "
            f"for instance {below} or {below + heads}."
        )
    if config.head_aggregation == "concat" and simulated_heads in (None, heads):
        raise ValueError(
            f"`head_aggregation='concat'` is of several groups of simulated heads, but `num_simulated_heads` is "
            f"{simulated_heads}; leave it out, or simulate {2 * heads} heads or more."
        )
    if config.simulated_head_dim is not None and config.simulated_head_dim < config.query_head_dim:
        source = "`qk_rope_head_dim + qk_nope_head_dim`" if config.attention_type == "mla" else "`head_dim`"
        raise ValueError(
            f"`simulated_head_dim` ({config.simulated_head_dim}) must be at least {source} ({config.query_head_dim})."
        )
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(
            f"`simulation_kernel_size` ({kernel}) must be odd and positive, so that padding keeps the feature "
            f"length; for instance {max(1, kernel - 1)} or {max(1, kernel + 1)}."
        )
    if config.simulation_act != "identity" and config.simulation_act not in ACT2FN:
        raise ValueError(
            f"`simulation_act` is {config.simulation_act!r}; it must be 'relu' (the paper's), 'identity' (the linear "
            f"ablation) or another activation that Transformers knows."
        )
    if not 0 < config.query_pre_attn_scalar < float("inf"):  # nor NaN
        raise ValueError(
            f"`query_pre_attn_scalar` ({config.query_pre_attn_scalar}) must be positive and finite: scores are "
            "divided by its square root."
        )
    if not 0 <= config.attention_dropout <= 1:
        name = config.attribute_map.get("attention_dropout", "attention_dropout")
        raise ValueError(f"`{name}` is {config.attention_dropout}; it must be between 0 and 1.")
    query_width = config.simulated_head_dim or config.query_head_dim
    whole = config.qk_rope_head_dim if config.attention_type == "mla" else config.head_dim
    if config.rotary_dim > query_width + query_width % 2:  # an odd width is rounded up, as in Transformers
        raise ValueError(
            f"`rope_parameters['partial_rotary_factor']` asks for {config.rotary_dim} rotated features, but queries "
            f"and keys have {query_width}; the factor is relative to {whole} features and must be at most "
            f"{query_width / whole:g}."
        )


def require_choice(config: PreTrainedConfig, name: str, *choices: str | None) -> None:
    """Raise a `ValueError` unless the field is one of the choices.

    `Literal` annotations would do so too, but with an error of huggingface_hub that is not a `ValueError`.
    """
    if getattr(config, name) not in choices:
        raise ValueError(f"`{name}` is {getattr(config, name)!r}; it must be one of {', '.join(map(repr, choices))}.")


def require_positive(config: PreTrainedConfig, *names: str) -> None:
    """Raise a `ValueError` unless each of the fields is 1 or more."""
    for name in names:
        value = getattr(config, name)
        if value is None or value < 1:
            raise ValueError(f"`{name}` is {value}; it must be a positive integer.")


def _require_rank(config: PreTrainedConfig, name: str, rows: int, columns: int) -> None:
    require_positive(config, name)
    rank = getattr(config, name)
    if rank > min(rows, columns):
        raise ValueError(
            f"`{name}` ({rank}) exceeds the smaller side of the {rows} x {columns} matrix that it factors; it must be "
            f"at most {min(rows, columns)}."
        )
