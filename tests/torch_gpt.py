"""A GPT in plain PyTorch: the second opinion of the parity tests and the source of the golden files."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from torch import nn


class Block(nn.Module):
    def __init__(self, C: int, n_head: int, bias: bool, activation: str, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.approximate = "tanh" if activation == "gelu_new" else "none"
        self.ln_1 = nn.LayerNorm(C, bias=bias)  # in nanoGPT's order, which its optimizer's state follows
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C, bias), "c_proj": nn.Linear(C, C, bias)})
        self.ln_2 = nn.LayerNorm(C, bias=bias)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias), "c_proj": nn.Linear(4 * C, C, bias)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (a.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for a in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0)
        y = self.attn["c_proj"](y.transpose(1, 2).reshape(B, T, C))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate=self.approximate))
        return x + F.dropout(y, self.dropout, self.training)


class GPT(nn.Module):
    """nanoGPT's model under GPT-2's names, its head tied to wte or not."""

    def __init__(
        self, *, block_size: int, vocab_size: int, n_layer: int, n_head: int, n_embd: int, bias: bool = True,
        activation: str = "gelu_new", dropout: float = 0.0, tied_head: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dropout = dropout
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(Block(n_embd, n_head, bias, activation, dropout) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd, bias=bias)
        if not tied_head:
            self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.wte(ids) + self.wpe.weight[: ids.shape[1]], self.dropout, self.training)
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ getattr(self, "lm_head", self.wte).weight.T

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), ignore_index=-1)

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().numpy().copy() for name, p in self.named_parameters()}

    def gradients(self) -> dict[str, np.ndarray]:
        return {name: p.grad.numpy().copy() for name, p in self.named_parameters()}

    def adamw(self, *, learning_rate: float, weight_decay: float, beta1: float, beta2: float) -> torch.optim.AdamW:
        """nanoGPT's groups: matrices are decayed, vectors are not."""
        groups = [
            {"params": [p for p in self.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2))


def train(
    model: GPT, batches: list[tuple[np.ndarray, np.ndarray]], rates: list[float],
    optimizer: torch.optim.AdamW | None = None, **adamw: float,
) -> list[float]:  # fmt: skip
    """One AdamW step with clipping at 1 for each batch and learning rate -> the losses before each."""
    optimizer = optimizer or model.adamw(learning_rate=rates[0], **adamw)
    losses = []
    for (x, y), rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model.loss(torch.tensor(x, dtype=torch.long), torch.tensor(y, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses
