"""What the GPU's path asks of MLX, found by walking the lazy graphs that it builds. Nothing is computed.

scripts/LOG.md says for each primitive which Metal kernel serves it, and these tests allow no other one. MLX's CPU
device, on which they run, takes the slow form of mx.fast's functions, so calls of those are looked at as well. Graphs
do not tell which device an operation runs on: a test of its own sees that none is sent to another one.
"""

from __future__ import annotations

import ast
import io
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlxgpt
from mlxgpt.formats import mlx_arrays, quantized
from mlxgpt.formats.tensors import Tensor
from mlxgpt.generation import decoding, sampling
from mlxgpt.generation.sampling import Sampler
from mlxgpt.model import lora, ops
from mlxgpt.model.cache import KVCache
from mlxgpt.model.config import GPTConfig
from mlxgpt.model.gpt import GPT, MatrixModule
from mlxgpt.training.optim import AdamW
from mlxgpt.training.recipe import PRESETS, TrainConfig
from mlxgpt.training.trainer import Trainer

LOG = Path(__file__).parents[2] / "scripts" / "LOG.md"
MOST_ELEMENTS = 2**31 - 1  # of an array: many of Metal's kernels count with 32 bits
DTYPES = {mx.float32, mx.float16, mx.bfloat16, mx.bool_, mx.int32, mx.uint32, mx.uint64, mx.int64}
REFUSE_8_BYTES = {"Scatter", "ScatterAxis"}
SMALL = dict(n_layer=2, n_head=2, n_embd=64, block_size=160, vocab_size=300)


@pytest.fixture(autouse=True)
def by_mlx(switch_off_kernels):
    ops.use_device("cpu")
    switch_off_kernels()


class Lazy(list[mx.array]):
    """Arrays that a failing test shows without their values, which would have to be computed."""

    def __repr__(self) -> str:
        return f"{len(self)} arrays"


@pytest.fixture
def submitted(monkeypatch) -> Lazy:
    """The arrays that were given to mx.async_eval, which does nothing more."""
    arrays = Lazy()

    def submit(*trees: Any) -> None:
        arrays.extend(a for _, a in tree_flatten(list(trees)) if isinstance(a, mx.array))

    monkeypatch.setattr(mx, "async_eval", submit)
    return arrays


def shape_of(preset: str, **changes: Any) -> GPTConfig:
    """A preset's model of two layers: the others are the same."""
    names = ("n_head", "n_embd", "block_size", "dropout", "bias")
    values = {name: PRESETS[preset][name] for name in names if name in PRESETS[preset]}
    tokenizer = PRESETS[preset].get("tokenizer", "char")
    return GPTConfig(**{**values, "n_layer": 2, "vocab_size": 50257 if tokenizer == "gpt2" else 65, **changes})


# ---- the primitives ----


def served() -> set[str]:
    """The primitives in the first column of LOG.md's table."""
    table = LOG.read_text().split("| primitive |", 1)[1].split("\n\n", 1)[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    return {name.strip() for cell in cells for name in cell.split(",")}


def primitives(arrays: list[mx.array]) -> set[str]:
    """The names of the operations that the arrays are made by."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return set(re.findall(r'label ="(\w+)', text.getvalue()))


def require_served(arrays: list[mx.array]) -> None:
    __tracebackhide__ = True
    missing = primitives(arrays) - served()
    assert not missing, f"{missing}: read their Metal kernels, and add them to the table in scripts/LOG.md"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, {"grad_checkpoint": True}, {"lora_rank": 4}, {"micro_batches": 2}])
def test_a_training_step(submitted, dtype, options):
    config = GPTConfig(**SMALL, dropout=0.1)
    model = GPT(config)
    settings = {name: value for name, value in options.items() if name == "grad_checkpoint"}
    if "lora_rank" in options:
        lora.add(model, lora.LoRA(options["lora_rank"], 8.0, ("attn.c_attn", "attn.c_proj")))
    trainer = Trainer(model, TrainConfig(dtype=dtype, model=config, **settings))
    ids = np.zeros((3, config.block_size), np.int32)
    trainer.step([(ids, ids)] * options.get("micro_batches", 1))
    assert {"Matmul", "Softmax", "Depends", "CustomTransforms"} <= primitives(submitted)
    require_served(submitted)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_an_evaluation(activation):
    model = GPT(GPTConfig(**SMALL, activation=activation))
    model.eval()
    ids = mx.zeros((3, 160), mx.int32)
    require_served([model.loss(ids, ids)])


EVERY_SETTING = Sampler(
    temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, typical_p=0.9, repetition_penalty=1.1, seed=1,
    logit_bias={3: 1.0},
)  # fmt: skip


def generated(model: GPT, T: int, B: int = 2) -> list[mx.array]:
    """What becomes of a prompt of T tokens and of one token after it: the tokens chosen, their log-probabilities, and
    the cache."""
    model.eval()
    config = model.config
    cache = KVCache(config.n_layer, config.block_size, B, model.head.dtype)
    model.next_logits(mx.zeros((B, T), mx.int32), cache)
    logits = model.next_logits(mx.zeros((B, 1), mx.int32), cache).astype(mx.float32)
    u = next(sampling.uniforms(1, B))
    drawn = EVERY_SETTING(logits, mx.zeros(logits.shape, mx.bool_), u)
    greedy = Sampler(temperature=0)(logits)
    return [drawn, greedy, sampling.logprobs(logits, drawn), *cache.keys, *cache.values]


def quantize(model: GPT, bits: int) -> GPT:
    for module in (m for m in model.modules() if isinstance(m, MatrixModule)):
        module.weight, module.scales, module.biases = mx.quantize(module.weight, group_size=64, bits=bits)
        module.group_size = 64
    return model


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_generation(bits):
    model = GPT(GPTConfig(**SMALL))
    require_served(generated(quantize(model, bits) if bits else model, 20))


def test_loading(monkeypatch):
    """As on a GPU, where arrays are made from NumPy's; and quantized weights as they are written."""
    bits_of_bfloat16 = Tensor("bfloat16", (4, 64), lambda: np.zeros((4, 64), np.uint16))
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.gpu))
    (loaded,) = mlx_arrays.load_arrays({"wte.weight": bits_of_bfloat16}, Path("model"), None).values()
    assert loaded.dtype == mx.bfloat16
    assert primitives([loaded]) == {"View"}
    require_served(
        [loaded, mlx_arrays.to_mlx(bits_of_bfloat16), *quantized.quantize({"w": mx.zeros((4, 64))}, 4).values()]
    )


def test_adapters_that_are_merged():
    model = GPT(GPTConfig(**SMALL))
    lora.add(model, lora.LoRA(4, 8.0, ("attn.c_attn",)))
    require_served([lora.correction(model.h[0].attn.c_attn)])


def test_a_primitive_that_metal_does_not_have_is_found():
    x = mx.ones((4, 4))
    with pytest.raises(AssertionError, match=r"Inverse.*LOG\.md"):
        require_served([mx.linalg.inv(x @ x, stream=mx.cpu)])
    with pytest.raises(AssertionError, match=r"SVD.*LOG\.md"):
        require_served(list(mx.linalg.svd(x @ x, stream=mx.cpu)))


def test_no_operation_is_sent_to_another_device():
    """Neither by an argument of its own nor by a `with mx.stream(...)`."""
    files = list(Path(mlxgpt.__file__).parent.rglob("*.py"))
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    assert len(files) > 50
    assert not [ast.unparse(c) for c in calls if any(k.arg == "stream" for k in c.keywords)]
    assert not [ast.unparse(c) for c in calls if ast.unparse(c.func) in ("mx.stream", "mx.new_stream")]


def test_a_compiled_update_is_one_kernel_for_each_parameter():
    model = GPT(GPTConfig(**SMALL))
    optimizer = AdamW(TrainConfig())
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    update = mx.compile(lambda *args: optimizer.update_if_finite(model, *args, 1.0), state, state)
    norm = update(GPT(model.config).parameters(), mx.array(1.0))
    text = io.StringIO()
    mx.export_to_dot(text, norm, *(a for _, a in tree_flatten(state)))
    n_params = len(model.named_weights())
    fused = re.findall(r'label ="Compiled', text.getvalue())
    assert n_params <= len(fused) <= 3 * n_params + 6  # two more for the norm: the largest element, and the squares


# ---- types and sizes ----


class _Custom:
    """Stands for mx.custom_function, whose graphs can't be listed with their types: it calls the function as it is, and
    keeps the gradient for later."""

    calls: ClassVar[list[tuple[_Custom, tuple[Any, ...], Any]]] = []

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def vjp(self, gradient: Callable[..., Any]) -> Callable[..., Any]:
        self.gradient = gradient
        return gradient

    def __call__(self, *args: Any) -> Any:
        output = self._function(*args)
        self.calls.append((self, args, output))
        return output


@pytest.fixture
def custom(monkeypatch) -> type[_Custom]:
    monkeypatch.setattr(mx, "custom_function", _Custom)
    monkeypatch.setattr(mx, "contiguous", lambda array: array)  # it can't be listed either
    _Custom.calls.clear()
    return _Custom


def gradients_of(custom: type[_Custom]) -> Iterator[mx.array]:
    """The gradients of all custom functions that were called, and of those that are called in the course of it."""
    while custom.calls:
        function, args, output = custom.calls.pop()
        gradients = function.gradient(args if len(args) > 1 else args[0], mx.zeros_like(output), output)
        yield from gradients if isinstance(gradients, (tuple, list)) else [gradients]


def arrays_of(results: list[mx.array]) -> list[tuple[str, tuple[int, ...], mx.Dtype]]:
    """Each primitive's name, and the shape and type of what it makes."""
    nodes: list[dict[str, Any]] = []
    mx.export_function(nodes.append, lambda: results)
    return [
        (node["name"], tuple(shape), dtype)
        for node in nodes
        if node["type"] == "primitive"
        for _, shape, dtype in node["outputs"]
    ]


def require_types_and_sizes(results: list[mx.array]) -> None:
    __tracebackhide__ = True
    found = arrays_of(results)
    assert len(found) > 20
    for name, shape, dtype in found:
        assert dtype in DTYPES, f"{name} {shape} is {dtype}, which Metal does not have"
        assert math.prod(shape) <= MOST_ELEMENTS, f"{name} {shape} has more than 2^31 - 1 elements"
        assert name not in REFUSE_8_BYTES or dtype.size < 8, f"{name} {shape} is {dtype}, which Metal's kernel refuses"
        assert len(shape) <= 8


@pytest.mark.parametrize("preset", ["shakespeare-char", "gpt2", "gpt2-xl"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_types_and_sizes_in_training(custom, preset, dtype):
    """With four times the preset's micro-batch."""
    model = GPT(shape_of(preset))
    model.apply(lambda w: w.astype(dtype))
    model.train()
    ids = mx.zeros((4 * PRESETS[preset]["batch_size"], model.config.block_size), mx.int32)
    loss = model.loss(ids, ids)
    require_types_and_sizes([loss, *gradients_of(custom)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_types_and_sizes_of_a_step(custom, submitted, dtype, lora_rank):
    """With the weights' casts, two micro-batches, the loss scale and the optimizer."""
    model = GPT(shape_of("gpt2", dropout=0.1))
    if lora_rank:
        lora.add(model, lora.LoRA(lora_rank, 8.0, lora.LAYERS))
    trainer = Trainer(model, TrainConfig(dtype=dtype, model=model.config))
    ids = np.zeros((PRESETS["gpt2"]["batch_size"], model.config.block_size), np.int32)
    trainer.step([(ids, ids)] * 2)
    require_types_and_sizes([*submitted, *gradients_of(custom)])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_types_and_sizes_in_an_evaluation(custom, dtype):
    model = GPT(shape_of("gpt2-xl"))
    model.apply(lambda w: w.astype(dtype))
    model.eval()
    ids = mx.zeros((64, 1024), mx.int32)
    require_types_and_sizes([model.loss(ids, ids)])


def test_types_and_sizes_of_an_update():
    model, config = GPT(shape_of("gpt2")), TrainConfig()
    optimizer = AdamW(config)
    optimizer.init(model.trainable_parameters())
    norm = optimizer.update_if_finite(model, GPT(model.config).parameters(), mx.array(1.0), 1.0)
    state = [a for _, a in tree_flatten([model.parameters(), optimizer.state])]
    require_types_and_sizes([norm, *state])


def test_a_type_and_a_size_that_metal_does_not_have_are_found():
    results = [mx.zeros((2,)) + n for n in range(30)]
    with mx.stream(mx.cpu), pytest.raises(AssertionError, match="float64, which Metal does not have"):
        require_types_and_sizes([*results, mx.zeros((2,)).astype(mx.float64)])
    with pytest.raises(AssertionError, match=r"has more than 2\^31 - 1 elements"):
        require_types_and_sizes([*results, mx.zeros((2**16, 1)) + mx.zeros((1, 2**16))])


# ---- generation, and MLX's fused attention in it ----


@pytest.fixture
def queries(monkeypatch) -> Lazy:
    """The queries that MLX's attention was called with."""
    given = Lazy()
    attention = mx.fast.scaled_dot_product_attention

    def call(q: mx.array, *args: Any, **options: Any) -> mx.array:
        given.append(q)
        return attention(q, *args, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", call)
    return given


def is_fused(q: mx.array) -> bool:
    """Whether Metal has a kernel for attention of these queries, (B, n_head, T_q, head_dim)."""
    return q.shape[3] in ((64, 72, 80, 96, 128) if q.shape[2] > 8 else (64, 96, 128))


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("bits", [None, 4])
def test_types_and_sizes_in_generation(custom, queries, preset, bits):
    model = GPT(shape_of(preset))
    model.apply(lambda w: w.astype(mx.bfloat16))
    T = min(decoding.PREFILL_CHUNK, model.config.block_size - 1)
    require_types_and_sizes(generated(quantize(model, bits) if bits else model, T))
    assert {q.shape[2] for q in queries} == {T, 1}
    assert all(map(is_fused, queries)) == (preset != "cpu")  # whose heads of 32 are for processors
