"""The attention kinds written from their papers' equations, head by head, with no thought of speed.

Independent of the package: they take a state dict and plain numbers. Shapes: x `[T, C]`, one row.
"""

import math

import torch


def rotate(x: torch.Tensor, width: int, theta: float = 10000.0) -> torch.Tensor:
    """RoPE of `[T, D]` on the leading `width` features: the pair (i, i + width/2) turns by t·theta^(-2i/width)."""
    out = x.clone()
    for i in range(width // 2):
        angle = torch.arange(x.shape[0], dtype=x.dtype) * theta ** (-2 * i / width)
        a, b = x[:, i], x[:, i + width // 2]
        out[:, i] = a * angle.cos() - b * angle.sin()
        out[:, i + width // 2] = b * angle.cos() + a * angle.sin()
    return out


def linear(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rms_norm(weights: dict, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]


def head(query, key, value, scale: float, causal: bool) -> torch.Tensor:
    """softmax(q kᵀ · scale) v, of a causal model over the past."""
    scores = query @ key.T * scale
    future = torch.ones_like(scores, dtype=torch.bool).triu(1) & causal
    return scores.masked_fill(future, -math.inf).softmax(-1) @ value


def split(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(x.split(size, dim=-1))


# Each kind: weights, x, configuration -> unrotated per-head lists of queries, keys and values (one key and value per
# query head), and how many leading features RoPE turns.


def mha(weights, x, c):
    repeat = c.num_attention_heads // c.num_key_value_heads
    keys, values = (split(linear(weights, f"{side}_proj", x), c.head_dim) for side in "kv")
    return (
        split(linear(weights, "q_proj", x), c.head_dim),
        [keys[i // repeat] for i in range(c.num_attention_heads)],
        [values[i // repeat] for i in range(c.num_attention_heads)],
        c.head_dim,
    )


def mla(weights, x, c):
    c_q = rms_norm(weights, "q_a_layernorm", linear(weights, "q_a_proj", x), c.rms_norm_eps)
    down = linear(weights, "kv_a_proj_with_mqa", x)
    c_kv = rms_norm(weights, "kv_a_layernorm", down[:, : c.kv_lora_rank], c.rms_norm_eps)
    shared = down[:, c.kv_lora_rank :]
    up = split(linear(weights, "kv_b_proj", c_kv), c.qk_nope_head_dim + c.v_head_dim)
    return (
        split(linear(weights, "q_b_proj", c_q), c.qk_rope_head_dim + c.qk_nope_head_dim),
        [torch.cat((shared, both[:, : c.qk_nope_head_dim]), -1) for both in up],
        [both[:, c.qk_nope_head_dim :] for both in up],
        c.qk_rope_head_dim,
    )


def tpa(weights, x, c):
    def heads(side, rank):
        a = linear(weights, f"{side}_head_proj", x).view(len(x), rank, c.num_attention_heads)
        b = linear(weights, f"{side}_feature_proj", x).view(len(x), rank, c.head_dim)
        full = sum(a[:, r, :, None] * b[:, r, None, :] for r in range(rank)) / rank
        return [full[:, i] for i in range(c.num_attention_heads)]

    return heads("q", c.q_rank), heads("k", c.k_rank), heads("v", c.v_rank), c.head_dim


def optimised(weights, x, c):
    queries, keys = (split(linear(weights, f"{side}_proj", x), c.head_dim) for side in "qk")
    return queries, keys, split(x, c.head_dim), c.head_dim


def efficient(weights, x, c):
    return split(linear(weights, "q_proj", x), c.head_dim), split(x, c.head_dim), split(x, c.head_dim), c.head_dim


def super_(weights, x, c):
    queries, keys, values, width = efficient(weights, x, c)
    w_a = weights["token_mixing.weight"][: len(x), : len(x)]
    w_a = w_a.tril() if c.is_causal else w_a
    return queries, keys, [w_a @ v + weights["token_mixing.bias"][: len(x), None] for v in values], width


KINDS = {
    "mha": mha,
    "mqa": mha,
    "mla": mla,
    "tpa": tpa,
    "optimised": optimised,
    "efficient": efficient,
    "super": super_,
}


def simulate(weights: dict, side: str, heads: list[torch.Tensor], kernel: int) -> list[torch.Tensor]:
    """Equations 5-11: convolution over the features with heads as channels, then a map of the features."""
    x = torch.stack(heads, dim=1)
    prefix = f"{side}_simulation.heads"
    if f"{prefix}.expansion.weight" in weights:
        for name in ("expansion", "residual"):
            source = x if name == "expansion" else x.relu()
            y = torch.nn.functional.conv1d(
                source, weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"], padding=kernel // 2
            )
            x = y if name == "expansion" else x + y
    prefix = f"{side}_simulation.features"
    if f"{prefix}.expansion.weight" in weights:
        x = linear(weights, f"{prefix}.expansion", x)
        x = x + linear(weights, f"{prefix}.residual", x.relu())
    return list(x.unbind(dim=1))


def attention(weights: dict, x: torch.Tensor, config) -> torch.Tensor:
    """One attention layer of any kind, plain or simulated: `[T, C]` to `[T, C]`, PEAA as equation 12 has it."""
    queries, keys, values, width = KINDS[config.attention_type](weights, x, config)
    if config.simulates:
        repeat = config.num_attention_heads // config.num_key_value_heads
        queries = simulate(weights, "q", queries, config.simulation_kernel_size)
        # The simulation convolves the key and value heads themselves, not their repetitions.
        keys = simulate(weights, "k", keys[::repeat], config.simulation_kernel_size)
        values = simulate(weights, "v", values[::repeat], config.simulation_kernel_size)
        if len(keys) < len(queries):  # no head simulation
            keys = [key for key in keys for _ in range(repeat)]
            values = [value for value in values for _ in range(repeat)]
    if getattr(config, "rope_parameters", None) is None:
        width = 0
    scale = config.query_pre_attn_scalar**-0.5
    outputs = [
        head(rotate(q, width), rotate(k, width), v, scale, config.is_causal)
        for q, k, v in zip(queries, keys, values, strict=True)
    ]
    groups = [outputs[i : i + config.num_attention_heads] for i in range(0, len(outputs), config.num_attention_heads)]
    if config.head_aggregation == "concat":  # one matrix over all of them, of the size of a mean
        return linear(weights, "o_proj", torch.cat(outputs, -1) / len(groups))
    return sum(linear(weights, "o_proj", torch.cat(group, -1)) for group in groups) / len(groups)
