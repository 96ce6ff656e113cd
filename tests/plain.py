"""A plain Llama with LoRA to test against: float64, padded batches, loops; nothing of the project.

Weights are a dict named as in a Hugging Face state dict. A linear layer may have an adapter
`….lora_A` [r, in] and `….lora_B` [out, r] in the same dict: its weight is then formed in full,
W + scaling B A, so that autograd gives the adapters' gradients without a second path.
`config` is any object with Hugging Face's names for the shape, and `rope_factor`.
"""
import math

import torch


def random_weights(config, seed):
    """Float64 weights large enough that every part of the model changes the output.

    With GPT-2's std = 0.02 attention is uniform to 1e-4 and a wrong mask would hardly show.
    """
    generator = torch.Generator().manual_seed(seed)
    width, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    q_width, kv_width = (n * head_dim for n in (config.num_attention_heads,
                                                config.num_key_value_heads))
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = (width,)
        shapes[name + "post_attention_layernorm.weight"] = (width,)
        shapes[name + "self_attn.q_proj.weight"] = (q_width, width)
        shapes[name + "self_attn.k_proj.weight"] = (kv_width, width)
        shapes[name + "self_attn.v_proj.weight"] = (kv_width, width)
        shapes[name + "self_attn.o_proj.weight"] = (width, q_width)
        shapes[name + "mlp.gate_proj.weight"] = (inner, width)
        shapes[name + "mlp.up_proj.weight"] = (inner, width)
        shapes[name + "mlp.down_proj.weight"] = (width, inner)
    shapes["lm_head.weight"] = (vocab, width)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            weights[name] = 1 + 0.3 * noise                # a norm's gain
        elif "embed" in name:
            weights[name] = noise
        else:
            weights[name] = noise * 1.5 / math.sqrt(shape[1])
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def apply_linear(weights, name, x, scaling):
    matrix = weights[name + ".weight"]
    if scaling and name + ".lora_A" in weights:
        matrix = matrix + scaling * (weights[name + ".lora_B"] @ weights[name + ".lora_A"])
    return torch.einsum("...i,oi->...o", x, matrix)


def apply_norm(weights, name, x, eps):
    rms = ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    return x / rms * weights[name + ".weight"]


def apply_rotary(x, config):
    """Rotate each pair (i, i + Dh/2) of a head [B, L, Dh] by position / factor * theta^(-2i/Dh)."""
    head_dim = x.shape[-1]
    half = head_dim // 2
    positions = torch.arange(x.shape[1], dtype=torch.float64) / config.rope_factor
    columns = [None] * head_dim
    for i in range(half):
        angle = positions * config.rope_theta ** (-2 * i / head_dim)
        rotation = torch.stack([torch.stack([torch.cos(angle), -torch.sin(angle)], -1),
                                torch.stack([torch.sin(angle), torch.cos(angle)], -1)], -2)
        pair = torch.stack([x[:, :, i], x[:, :, i + half]], -1)            # [B, L, 2]
        turned = torch.einsum("lij,blj->bli", rotation, pair)
        columns[i], columns[i + half] = turned[..., 0], turned[..., 1]
    return torch.stack(columns, -1)


def apply_attention(weights, name, x, lengths, config, scaling):
    batch, length, width = x.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = width // heads
    q = apply_linear(weights, name + ".q_proj", x, scaling)
    k = apply_linear(weights, name + ".k_proj", x, scaling)
    v = apply_linear(weights, name + ".v_proj", x, scaling)
    visible = torch.zeros(batch, length, length, dtype=torch.float64)
    for b in range(batch):
        for i in range(length):
            for j in range(i + 1):
                if j < lengths[b]:
                    visible[b, i, j] = 1
    mixed = []
    for head in range(heads):
        kv = head // (heads // kv_heads)
        q_head = apply_rotary(q[:, :, head * size:(head + 1) * size], config)
        k_head = apply_rotary(k[:, :, kv * size:(kv + 1) * size], config)
        v_head = v[:, :, kv * size:(kv + 1) * size]
        powers = torch.einsum("bid,bjd->bij", q_head, k_head) / math.sqrt(size)
        powers = powers - powers.detach().amax(-1, keepdim=True)
        shares = torch.exp(powers) * visible
        shares = shares / shares.sum(-1, keepdim=True)
        mixed.append(torch.einsum("bij,bjd->bid", shares, v_head))
    return apply_linear(weights, name + ".o_proj", torch.cat(mixed, -1), scaling)


def apply_mlp(weights, name, x, scaling):
    gate = apply_linear(weights, name + ".gate_proj", x, scaling)
    up = apply_linear(weights, name + ".up_proj", x, scaling)
    return apply_linear(weights, name + ".down_proj", gate / (1 + torch.exp(-gate)) * up, scaling)


def plain_hidden(weights, config, rows, scaling=0.0):
    """Hidden states after the final norm of token lists, right-padded: [B, L, D].

    scaling  alpha / r of the adapters in `weights`; 0 leaves them off
    """
    lengths = [len(row) for row in rows]
    input_ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for b, row in enumerate(rows):
        for t, token in enumerate(row):
            input_ids[b, t] = token
    x = weights["model.embed_tokens.weight"][input_ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        normed = apply_norm(weights, name + "input_layernorm", x, config.rms_norm_eps)
        x = x + apply_attention(weights, name + "self_attn", normed, lengths, config, scaling)
        normed = apply_norm(weights, name + "post_attention_layernorm", x, config.rms_norm_eps)
        x = x + apply_mlp(weights, name + "mlp", normed, scaling)
    return apply_norm(weights, "model.norm", x, config.rms_norm_eps)


def plain_log_probs(weights, config, rows, scaling=0.0):
    """Log-softmax over the whole vocabulary at every position: [B, L, V]; the head may be tied."""
    hidden = plain_hidden(weights, config, rows, scaling)
    tied = config.tie_word_embeddings
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    scores = torch.einsum("bld,vd->blv", hidden, head)
    scores = scores - scores.detach().amax(-1, keepdim=True)
    return scores - torch.log(torch.exp(scores).sum(-1, keepdim=True))


def plain_logps(weights, config, examples, scaling=0.0):
    """Log-probability of every response, EOS included: [R] float64, nats.

    examples  [(prompt tokens, response tokens)], one row per response: the prompt is repeated
    """
    log_probs = plain_log_probs(weights, config, [list(p) + list(r) for p, r in examples], scaling)
    totals = []
    for b, (prompt, response) in enumerate(examples):
        total = torch.zeros((), dtype=torch.float64)
        for t, token in enumerate(response):               # the position before it predicts it
            total = total + log_probs[b, len(prompt) + t - 1, token]
        totals.append(total)
    return torch.stack(totals)
