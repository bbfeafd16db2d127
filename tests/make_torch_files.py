"""Makes golden/torch_*.pt with real PyTorch: python tests/make_torch_files.py (pip install '.[parity]').

torch_zip.pt, torch_legacy.pt   the value below in both of PyTorch's formats; test_torch_file.py says what it is
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from golden import GOLDEN


def value() -> dict[str, object]:
    """What nanoGPT saves, with every dtype and every kind of view."""
    torch.manual_seed(0)
    count = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.arange(6.0).reshape(2, 3))
        module.bias.copy_(torch.tensor([0.5, -0.25]))
    optimizer = torch.optim.AdamW([{"params": [module.weight]}, {"params": [module.bias], "weight_decay": 0.0}], lr=0.1)
    (module(torch.ones(1, 3)).sum() * 2).backward()
    optimizer.step()
    names = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
    dtypes = {name: torch.tensor([[0, 1, 1], [3, 0, 100]]).to(getattr(torch, name)) for name in names}
    return {
        "model": OrderedDict(("_orig_mod." + name, tensor) for name, tensor in module.state_dict().items()),
        "state_dict": module.state_dict(),  # with the attribute _metadata
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": 2, "bias": False, "dropout": 0.0, "vocab_size": None},
        "best_val_loss": torch.tensor(3.25),
        "config": {
            "dtype": torch.bfloat16,
            "device": torch.device("cuda:1"),
            "out": "out-shäkespeare",
            "big": -(2**70),
        },
        "dtypes": dtypes,
        "whole": count,
        "transposed": count.T,
        "column": count[1:, 4],
        "every_second": count[::2, 1::2],
        "tied": count,
        "expanded": count[1, 2].expand(5, 2),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.tensor([1.5, 2.5])),
        "others": [torch.Size([3, 4]), {1, 2}, b"\x00\xffraw", (), [], {}, True, -1, 70000, 1e300, "", {3: (4, 5)}],
    }


if __name__ == "__main__":
    torch.save(value(), GOLDEN / "torch_zip.pt")
    torch.save(value(), GOLDEN / "torch_legacy.pt", _use_new_zipfile_serialization=False)
