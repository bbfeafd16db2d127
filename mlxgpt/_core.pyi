"""The CPU kernels of mlxgpt.

Arrays are float32 and export the buffer protocol. Those of attention, and weights that get no gradient, may also be
float16, or the bits of bfloat16 in uint16; weights may also be quantized.
"""

from collections.abc import Sequence

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
def attention_cached(
    q: Buffer, k: Buffer, v: Buffer, keys: Buffer, values: Buffer, offsets: Buffer, out: Buffer, *, scale: float
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
def fma_peak(n: int = 5000000) -> float: ...
def linear_forward(
    x: Buffer,
    weight: Buffer,
    bias: Buffer | None,
    out: Buffer,
    *,
    residual: Buffer | None = None,
    activated: Buffer | None = None,
    activation: str = "gelu_new",
    scale: float = 1.0,
    scales: Buffer | None = None,
    biases: Buffer | None = None,
) -> None: ...
def linear_backward(
    dout: Buffer,
    x: Buffer | None,
    weight: Buffer,
    dx: Buffer | None,
    dweight: Buffer | None,
    dbias: Buffer | None,
    *,
    accumulate: bool = False,
    pre: Buffer | None = None,
    activated: Buffer | None = None,
    activation: str = "gelu_new",
) -> None: ...
def gelu_forward(x: Buffer, out: Buffer, activation: str) -> None: ...
def gelu_backward(x: Buffer, dx: Buffer, activation: str) -> None: ...
def layer_norm_forward(
    x: Buffer, weight: Buffer, bias: Buffer | None, eps: float, out: Buffer, mean: Buffer, rstd: Buffer
) -> None: ...
def layer_norm_backward(
    dout: Buffer,
    x: Buffer,
    weight: Buffer,
    mean: Buffer,
    rstd: Buffer,
    dx: Buffer,
    dweight: Buffer | None,
    dbias: Buffer | None,
    *,
    add_to_dx: bool = False,
    accumulate: bool = False,
) -> None: ...
def embedding_forward(
    ids: Buffer,
    tokens: Buffer,
    positions: Buffer | None,
    out: Buffer,
    *,
    offsets: Buffer | None = None,
    scales: Buffer | None = None,
    biases: Buffer | None = None,
) -> None: ...
def embedding_backward(ids: Buffer, dout: Buffer, dtokens: Buffer | None, dpositions: Buffer | None) -> None: ...
def linear_cross_entropy(
    x: Buffer,
    weight: Buffer,
    targets: Buffer,
    dx: Buffer | None = None,
    dweight: Buffer | None = None,
    *,
    accumulate: bool = False,
    scale: float = 1.0,
    scales: Buffer | None = None,
    biases: Buffer | None = None,
) -> float: ...
def cross_entropy_rows(n_rows: int, vocab_size: int) -> int: ...
def adamw(
    parameters: Sequence[Buffer],
    gradients: Sequence[Buffer],
    m: Sequence[Buffer],
    v: Sequence[Buffer],
    decayed: Sequence[bool],
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    max_norm: float,
) -> float: ...
def dropout(x: Buffer, residual: Buffer | None, p: float, seed: int, out: Buffer) -> None: ...
def copy(x: Buffer, out: Buffer) -> bool: ...
def _vector_math(name: str, x: Buffer, out: Buffer) -> None: ...

class Recording:
    def __enter__(self) -> Recording: ...
    def __exit__(self, *exception: object) -> None: ...
    def replay(self) -> None: ...
    def __len__(self) -> int: ...
