"""The mathematics in float64 NumPy, written naively: what every kernel and the whole model are compared with."""

from __future__ import annotations

import math

import numpy as np

Weights = dict[str, np.ndarray]


def gpt_loss_and_gradients(
    weights: Weights, n_layer: int, n_head: int, exact_gelu: bool, ids: np.ndarray, targets: np.ndarray, eps: float
) -> tuple[np.ndarray, float, Weights]:
    """Logits (B, T, V), mean cross entropy over targets that are not -1, and its gradient for every weight.

    ids, targets (B, T); weights by GPT-2's names, linear ones (n_out, n_in). Each step's backward stands in
    reverse order, and quotes the line that it inverts.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    g = {name: np.zeros_like(value) for name, value in w.items()}
    B, T = ids.shape
    C = w["wte.weight"].shape[1]
    scale = (C // n_head) ** -0.5

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def linear_backward(dy, x, name):  # y = x W^T + b
        g[f"{name}.weight"] += np.einsum("bto,bti->oi", dy, x)
        if f"{name}.bias" in w:
            g[f"{name}.bias"] += dy.sum((0, 1))
        return dy @ w[f"{name}.weight"]

    def layer_norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normal = (x - mean) / np.sqrt(var + eps)
        return normal * w[f"{name}.weight"] + w.get(f"{name}.bias", 0), (normal, var)

    def layer_norm_backward(dy, saved, name):  # y = (x - mean) / sqrt(var + eps) * weight + bias
        normal, var = saved
        g[f"{name}.weight"] += (dy * normal).sum((0, 1))
        if f"{name}.bias" in w:
            g[f"{name}.bias"] += dy.sum((0, 1))
        d = dy * w[f"{name}.weight"]
        d = d - d.mean(-1, keepdims=True) - normal * (d * normal).mean(-1, keepdims=True)
        return d / np.sqrt(var + eps)

    def heads(x):
        return x.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)  # (B, n_head, T, head_dim)

    def merged(x):
        return x.swapaxes(1, 2).reshape(B, T, C)  # (B, T, C)

    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    saved = []
    for n in range(n_layer):
        h = f"h.{n}"
        a, norm_1 = layer_norm(x, f"{h}.ln_1")
        q, k, v = (heads(part) for part in np.split(linear(a, f"{h}.attn.c_attn"), 3, axis=-1))
        out, _, _ = attention(q, k, v, scale=scale)
        x = x + linear(merged(out), f"{h}.attn.c_proj")
        m, norm_2 = layer_norm(x, f"{h}.ln_2")
        f = linear(m, f"{h}.mlp.c_fc")
        x = x + linear(gelu(f, exact_gelu), f"{h}.mlp.c_proj")
        saved.append((a, norm_1, q, k, v, out, m, norm_2, f))
    last, norm_f = layer_norm(x, "ln_f")
    head = "lm_head.weight" if "lm_head.weight" in w else "wte.weight"
    logits = last @ w[head].T
    loss, dlogits = cross_entropy(logits, targets)

    # logits = last head^T
    g[head] += np.einsum("btv,btc->vc", dlogits, last)
    dx = layer_norm_backward(dlogits @ w[head], norm_f, "ln_f")
    for n in reversed(range(n_layer)):
        h = f"h.{n}"
        a, norm_1, q, k, v, out, m, norm_2, f = saved[n]
        # x = x + c_proj(gelu(c_fc(m)))
        df = linear_backward(dx, gelu(f, exact_gelu), f"{h}.mlp.c_proj") * gelu_derivative(f, exact_gelu)
        dx = dx + layer_norm_backward(linear_backward(df, m, f"{h}.mlp.c_fc"), norm_2, f"{h}.ln_2")
        # x = x + c_proj(attention(c_attn(a)))
        dout = heads(linear_backward(dx, merged(out), f"{h}.attn.c_proj"))
        dqkv = np.concatenate([merged(d) for d in attention_backward(q, k, v, dout, scale=scale)], axis=-1)
        dx = dx + layer_norm_backward(linear_backward(dqkv, a, f"{h}.attn.c_attn"), norm_1, f"{h}.ln_1")
    # x = wte[ids] + wpe[:T]
    np.add.at(g["wte.weight"], ids, dx)
    g["wpe.weight"][:T] += dx.sum(0)
    return logits, loss, g


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over the targets (...) that are not -1 of -log softmax(logits)[target], and its gradient (..., V)."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    counted = targets >= 0
    one_hot = np.eye(logits.shape[-1])[np.maximum(targets, 0)] * counted[..., None]
    n = max(1, counted.sum())
    return float(-(log_p * one_hot).sum() / n), (np.exp(log_p) * counted[..., None] - one_hot) / n


def gelu(x: np.ndarray, exact: bool) -> np.ndarray:
    """x times the normal distribution function at x: exact, or GPT-2's tanh form."""
    if exact:
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_derivative(x: np.ndarray, exact: bool) -> np.ndarray:
    if exact:
        return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    s = math.sqrt(2 / math.pi)
    t = np.tanh(s * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * s * (1 + 3 * 0.044715 * x * x)


def causal_mask(T_q, T_k):
    """(T_q, T_k) bool: query i sees keys 0 .. i + T_k - T_q."""
    return np.arange(T_k) <= np.arange(T_q)[:, None] + T_k - T_q


def attention(q, k, v, *, scale, causal=True, factors=None):
    """softmax(scale * q k^T) v and the log-sum-exp of the scores.

    q: (B, n_head, T_q, D); k, v: (B, n_head, T_k, D); factors: what dropout multiplies the probabilities
    by, (B, n_head, T_q, T_k). Returns out (B, n_head, T_q, D), lse (B, n_head, T_q), p (..., T_q, T_k).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = scale * q @ np.swapaxes(k, -1, -2)  # (B, n_head, T_q, T_k)
    if causal:
        scores = np.where(causal_mask(q.shape[2], k.shape[2]), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    exp = np.exp(scores - top)
    total = exp.sum(-1, keepdims=True)
    p = exp / total
    lse = (top + np.log(total))[..., 0]
    out = (p if factors is None else p * factors) @ v
    return out, lse, p


def attention_backward(q, k, v, dout, *, scale, causal=True, factors=None):
    """dq, dk, dv of `attention`, with the probabilities written out."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    _, _, p = attention(q, k, v, scale=scale, causal=causal)
    factors = np.ones_like(p) if factors is None else factors
    dv = np.swapaxes(p * factors, -1, -2) @ dout
    dp = factors * (dout @ np.swapaxes(v, -1, -2))
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    return scale * ds @ k, scale * np.swapaxes(ds, -1, -2) @ q, dv


def philox4x32(counter, key, rounds=7):
    """Philox-4x32 (Salmon et al., SC 2011). counter: (4, ...) uint32; key: 64 bits. Returns (4, ...)."""
    c = [np.asarray(x, np.uint64) for x in counter]
    low = np.uint64(0xFFFFFFFF)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> 32) ^ c[1] ^ np.uint64(k0), b & low, (a >> 32) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(*c)).astype(np.uint32)


def dropout_factors(B, n_head, T_q, T_k, p, seed):
    """Factors 0 or 1 / (1 - p), (B, n_head, T_q, T_k): word j % 4 of the counter (j / 4, i, head, batch)."""
    b, h, i, group = np.ogrid[:B, :n_head, :T_q, : (T_k + 3) // 4]
    words = philox4x32(np.broadcast_arrays(group, i, h, b), seed)  # (4, B, n_head, T_q, groups)
    words = np.moveaxis(words, 0, -1).reshape(B, n_head, T_q, -1)[..., :T_k]
    kept = (words >> 8).astype(np.float32) >= np.float32(p) * np.float32(2**24)
    return np.where(kept, np.float32(1) / (np.float32(1) - np.float32(p)), np.float32(0))


def dropout_of(n, p, seed):
    """Factors 0 or 1 / (1 - p) of n elements: element i is word i % 64 // 16 of counter i // 64 * 16 + i % 16."""
    i = np.arange(n)
    words = philox4x32([i // 64 * 16 + i % 16, 0 * i, 0 * i, 0 * i], seed)  # (4, n)
    words = words[i % 64 // 16, i]
    kept = (words >> 8).astype(np.float32) >= np.float32(p) * np.float32(2**24)
    return np.where(kept, np.float32(1) / (np.float32(1) - np.float32(p)), np.float32(0))
