"""CPU kernels of mlxgpt. Arrays are float32 and export the buffer protocol."""

from typing_extensions import Buffer

__version__: str

def isa() -> str: ...
def num_threads() -> int: ...
def attention_forward(
    q: Buffer,
    k: Buffer,
    v: Buffer,
    out: Buffer,
    lse: Buffer,
    *,
    scale: float,
    causal: bool = True,
    dropout: float = 0.0,
    seed: int = 0,
) -> None: ...
def attention_backward(
    q: Buffer,
    k: Buffer,
    v: Buffer,
    out: Buffer,
    lse: Buffer,
    dout: Buffer,
    dq: Buffer,
    dk: Buffer,
    dv: Buffer,
    *,
    scale: float,
    causal: bool = True,
    dropout: float = 0.0,
    seed: int = 0,
) -> None: ...
def dropout_mask(mask: Buffer, dropout: float, seed: int) -> None: ...
