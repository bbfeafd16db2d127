"""Makes the golden files from real PyTorch and transformers: python tests/make_golden.py (pip install '.[parity]').

golden/gpt_*.npz       weights, ids, targets, and PyTorch's logits, loss and gradients
golden/curve.npz       weights, tokens, and PyTorch's losses over 100 training steps
golden/nanogpt.pt      a checkpoint as nanoGPT's train.py saves it, and golden/nanogpt.npz its ids, logits and averages
golden/hf_gpt2/        a directory as transformers saves it, and golden/hf_gpt2.npz its ids and logits
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch_gpt
from golden import CURVE_ADAMW, CURVE_SHAPE, GOLDEN, SHAPE, VARIANTS, curve_batches, curve_rates
from transformers import GPT2Config, GPT2LMHeadModel


def spread(model: torch.nn.Module) -> None:
    """Larger weights than a new model's, with biases, so that every term shows and logits are of order 10."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() >= 2 else 0.1) + (p.dim() == 1) * 0.7)
        (model.wte if hasattr(model, "wte") else model.transformer.wte).weight *= 10


def main() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    GOLDEN.mkdir(exist_ok=True)
    for name, variant in VARIANTS.items():
        model = torch_gpt.GPT(**SHAPE, **variant)
        spread(model)
        ids, targets = (rng.integers(0, SHAPE["vocab_size"], (2, 12)) for _ in range(2))
        targets[0, 3] = targets[1, 11] = -1
        logits = model(torch.tensor(ids))
        loss = model.loss(torch.tensor(ids), torch.tensor(targets))
        loss.backward()
        np.savez_compressed(
            GOLDEN / f"gpt_{name}.npz", ids=ids, targets=targets, logits=logits.detach().numpy(), loss=loss.item(),
            **{f"weight/{n}": v for n, v in model.weights().items()},
            **{f"gradient/{n}": v for n, v in model.gradients().items()},
        )  # fmt: skip

    model = torch_gpt.GPT(**CURVE_SHAPE)
    weights = model.weights()
    tokens = np.frombuffer(Path(torch_gpt.__file__).read_bytes(), np.uint8)[:4000] % CURVE_SHAPE["vocab_size"]
    losses = torch_gpt.train(model, curve_batches(tokens), curve_rates(), **CURVE_ADAMW)
    np.savez_compressed(
        GOLDEN / "curve.npz", tokens=tokens, losses=losses, **{f"weight/{n}": v for n, v in weights.items()}
    )

    nanogpt(rng)

    config = GPT2Config(vocab_size=29, n_positions=16, n_embd=12, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    spread(model)
    model.save_pretrained(GOLDEN / "hf_gpt2")
    (GOLDEN / "hf_gpt2" / "generation_config.json").unlink(missing_ok=True)
    ids = rng.integers(0, 29, (2, 16))
    np.savez_compressed(GOLDEN / "hf_gpt2.npz", ids=ids, logits=model(torch.tensor(ids)).logits.detach().numpy())


def nanogpt(rng: np.random.Generator) -> None:
    shape = dict(block_size=12, vocab_size=20, n_layer=2, n_head=3, n_embd=12)
    model = torch_gpt.GPT(**shape, activation="gelu")
    spread(model)
    optimizer = model.adamw(learning_rate=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95)
    for _ in range(2):
        ids = torch.tensor(rng.integers(0, 20, (2, 12)))
        optimizer.zero_grad()
        model.loss(ids, ids.roll(-1, 1)).backward()
        optimizer.step()
    weights = {f"_orig_mod.transformer.{name}": p for name, p in model.state_dict().items()}
    weights["_orig_mod.lm_head.weight"] = model.wte.weight
    torch.save(
        dict(model=weights, optimizer=optimizer.state_dict(), model_args=dict(**shape, bias=True, dropout=0.0),
             iter_num=2, best_val_loss=torch.tensor(2.5), config={"dataset": "made"}),
        GOLDEN / "nanogpt.pt",
    )  # fmt: skip
    averages = {}
    for name, p in model.named_parameters():
        averages[f"m.{name}"] = optimizer.state[p]["exp_avg"].numpy()
        averages[f"v.{name}"] = optimizer.state[p]["exp_avg_sq"].numpy()
    ids = rng.integers(0, 20, (2, 12))
    logits = model(torch.tensor(ids)).detach().numpy()
    np.savez_compressed(GOLDEN / "nanogpt.npz", ids=ids, logits=logits, **averages)


if __name__ == "__main__":
    main()
