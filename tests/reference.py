"""Naive float64 NumPy: the second opinion on every kernel. Written to be read, not to be fast."""

import numpy as np


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
