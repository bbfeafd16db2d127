"""python -m mlxgpt.inspect: how sequence length, heads and dimensions fit together in a model.

Nothing here knows the model's structure: the model is built and run on one batch, without arithmetic
(MLX is lazy), and every operation that it calls is written down with its shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import tyro
from mlx.utils import tree_map
from rich import box
from rich.console import Console
from rich.table import Table

from .common import cli
from .common.settings import nearest, settings
from .cpu import extension
from .formats import model_directory
from .model import ops
from .model.cache import KVCache
from .model.config import GPTConfig
from .model.gpt import GPT
from .training import device_memory, fitting
from .training.footprint import copied_for_checkpoint, memory_on_kernels, memory_on_mlx
from .training.recipe import PRESETS, TrainConfig

STDLIB_CHARACTERS = 96  # distinct characters of the default corpus: printable ASCII and the line break


@dataclass(frozen=True)
class InspectConfig:
    """Show how a model is built: its shapes step by step, parameters, arithmetic and memory."""

    target: Annotated[str, tyro.conf.Positional] = "gpt2"
    """a preset (cpu, shakespeare-char, gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a model directory"""
    batch_size: int = 1
    """sequences at once, B in the shapes"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """what the activations and the weights in use are held in"""
    grad_checkpoint: bool = False
    """show memory in training with this setting"""
    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")


@dataclass
class Call:
    """An operation as the model called it."""

    op: str
    path: str  # where in the model: "h.0.attn.c_attn", or "h.0.attn.attention" for one without weights
    weight_shape: tuple[int, ...] | None
    inputs: list[mx.array]  # activations
    output: mx.array

    def matmul_flops(self) -> int:
        """Multiplications and additions in matrix products; in attention only for pairs that the mask shows."""
        if self.op == "linear":
            return 2 * self.output.size * self.inputs[0].shape[-1]
        if self.op == "attention":
            q, k = self.inputs[:2]
            B, n_head, T_q, head_dim = q.shape
            pairs = T_q * (k.shape[2] - T_q) + T_q * (T_q + 1) // 2
            return 2 * 2 * B * n_head * pairs * head_dim  # q k^T, and the weights times v
        return 0

    def score_shape(self) -> tuple[int, ...]:
        """Attention's scores: (B, n_head, T_q, T_k)."""
        q, k = self.inputs[:2]
        return (*q.shape[:3], k.shape[2])


def trace(model: GPT, ids: mx.array, cache: KVCache | None = None) -> list[Call]:
    """What the forward pass calls, with a cache or without one, in order. Nothing is computed."""
    model.eval()  # a block that is trained is called over copies of its parameters
    names = {id(p): name.removesuffix(".weight") for name, p in model.named_weights().items()}
    calls: list[Call] = []

    def record(op: str, args: tuple[Any, ...], output: Any) -> None:
        op = "gelu" if op in ops.GELU else op
        if op not in _STEPS:
            return
        arrays = [a for a in args if isinstance(a, mx.array)]
        weights = [a for a in arrays if id(a) in names]
        path = names[id(weights[0])] if weights else f"{calls[-1].path.rpartition('.')[0]}.{op}"
        shape = tuple(weights[0].shape) if weights else None
        calls.append(Call(op, path, shape, [a for a in arrays if id(a) not in names], output))

    with extension.switched_off(), ops.observed(record):  # MLX's own operations are lazy
        model(ids, cache)
    return calls


# The operations of a model that are not made of other operations.
_STEPS = {"embedding", "layer_norm", "linear", "gelu", "attention"}


def explain(config: GPTConfig) -> str:
    """A newcomer's question: how do the tokens, the heads and the dimensions fit together?"""
    T, C, n_head, D = config.block_size, config.n_embd, config.n_head, config.head_dim
    return (
        f"The model reads up to T = {T} tokens at once. Each token becomes a row of C = {C} numbers, so the "
        f"sequence is a matrix of {T} rows and {C} columns, from the first layer to the last.\n\n"
        f"Heads divide the {C} columns, not the {T} rows: {n_head} heads x {D} = {C}. Every head sees all {T} "
        f"positions. It makes a query, a key and a value of {D} numbers at each; multiplies queries with keys and "
        f"divides by sqrt({D}), which gives one score for each pair of positions; hides the scores of later "
        f"positions; and averages the values by the softmax of the scores. The results of the {n_head} heads, side "
        f"by side, are {T} rows of {C} again."
    )


def draw(config: GPTConfig) -> str:
    """The same as a picture: the columns of each head, and what one head does with them."""
    T, C, n_head, D = config.block_size, config.n_embd, config.n_head, config.head_dim
    heads = [str(n) for n in range(1, n_head + 1)] if n_head <= 12 else [*"123456789", "..", str(n_head)]
    edge, empty = ["─" * 4] * len(heads), [" " * 4] * len(heads)
    left = " " * 10
    scores = {
        "█      ": f"scores [{T}, {T}] = q [{T}, {D}] k^T [{D}, {T}] / √{D}",
        "██     ": "row i: position i with 1 to i; later ones are hidden",
        "████   ": "softmax turns each row into weights that sum to 1",
        "███████": f"result [{T}, {D}] = weights [{T}, {T}] v [{T}, {D}]",
    }
    return "\n".join(
        [
            f"{left}q, k and v: each {n_head} heads x {D} = {C} columns",
            f"{left}┌{'┬'.join(edge)}┐",
            f"     head │{'│'.join(head.center(4) for head in heads)}│",
            f"{T:>4} rows │{'│'.join(empty)}│",
            f"{left}└{'┴'.join(edge)}┘",
            f" one head ┌{'─' * 7}┐",
            *(f"{left}│{row}│  {note}" for row, note in scores.items()),
            f"{left}└{'─' * 7}┘",
        ]
    )


def shape_table(calls: list[Call], ids: mx.array) -> Table:
    """Every step from [B, T] to logits, the first block's standing for all."""
    notes = {
        "wte": "[B, T, C]",
        "wpe": "[T, C], added",
        "c_attn": "[B, T, 3C] q, k, v",
        "attn.c_proj": "[B, T, C], added to x",
        "c_fc": "[B, T, 4C]",
        "mlp.c_proj": "[B, T, C], added to x",
        "ln_f": "[B, T, C]",
        "lm_head": "[B, T, V] logits",
    }
    blocks = {call.path.split(".")[1] for call in calls if call.path.startswith("h.")}
    table = _table("Shapes, step by step", "step", "weight", "result", "")
    table.add_row("tokens", "", _shape(ids.shape), "[B, T] token ids")
    previous = ""
    for call in calls:
        in_block = call.path.startswith("h.")
        if in_block and not call.path.startswith("h.0."):
            previous = call.path
            continue
        if previous.startswith("h.") and not in_block and len(blocks) > 1:
            table.add_row(f"h.1 ... h.{len(blocks) - 1}", "", "", f"{len(blocks) - 1} more blocks, the same")
        weight = _shape(call.weight_shape) if call.weight_shape else ""
        if call.op == "attention":
            for name, array in zip(("q", "k", "v"), call.inputs, strict=True):
                table.add_row(f"h.0.attn  {name}", "", _shape(array.shape), "[B, n_head, T, head_dim]")
            table.add_row("h.0.attn  q k^T", "", _shape(call.score_shape()), "[B, n_head, T, T]")
            table.add_row("h.0.attn  heads", "", _shape(call.output.shape), "[B, n_head, T, head_dim]")
        elif call.op == "linear" and call.path == "wte":
            table.add_row("head (wte again)", weight, _shape(call.output.shape), "[B, T, V] logits")
        else:
            note = next((n for suffix, n in notes.items() if call.path.endswith(suffix)), "")
            table.add_row(call.path, weight, _shape(call.output.shape), note)
        previous = call.path
    return table


def parameter_table(model: GPT) -> Table:
    """Parameters per component, and the total in the ways that it is usually counted."""
    counts: dict[str, int] = {}
    for name, p in model.named_weights().items():
        parts = name.split(".")
        component = ".".join(parts[2:-1]) if parts[0] == "h" else parts[0]
        counts[component] = counts.get(component, 0) + p.size
    total, wte, wpe = model.n_params(), counts["wte"], counts["wpe"]
    n_layer = len(model.h)
    table = _table("Parameters", "component", "count", "share", "")
    for component, count in counts.items():
        in_block = component not in ("wte", "wpe", "ln_f", "lm_head")
        each = f"{n_layer} x {count // n_layer:,}" if in_block else ""
        table.add_row(f"h.N.{component}" if in_block else component, f"{count:,}", f"{count / total:.1%}", each)
    table.add_section()
    tied = model.config.tied_head
    head_note = "the head is wte, counted once" if tied else "the head, lm_head, is not wte"
    table.add_row("total", f"{total:,}", "100.0%", head_note, style="bold")
    table.add_row("without wpe", f"{total - wpe:,}", "", "as nanoGPT reports it")
    table.add_row("without wte and wpe", f"{total - wte - wpe:,}", "", "non-embedding parameters")
    if tied:
        table.add_row("with a head of its own", f"{total + wte:,}", "", "if it were not tied to wte")
    else:
        table.add_row("with a tied head", f"{total - wte:,}", "", "if the head were wte")
    return table


def flops_table(calls: list[Call], tokens: int) -> Table:
    """Floating-point operations of the matrix products, per token of a full sequence."""
    groups: dict[str, int] = {}
    for call in calls:
        if flops := call.matmul_flops():
            name = "head" if call.path in ("wte", "lm_head") else "h.N." + call.path.split(".", 2)[2]
            groups[name] = groups.get(name, 0) + flops
    forward = sum(groups.values()) / tokens
    table = _table("Arithmetic", "matrix products", "per token", "share", "")
    for name, flops in groups.items():
        note = "half of T x T, by the mask" if name.endswith("attention") else ""
        table.add_row(name, _flops(flops / tokens), f"{flops / tokens / forward:.1%}", note)
    table.add_section()
    table.add_row("forward", _flops(forward), "100.0%", "", style="bold")
    table.add_row("training", _flops(3 * forward), "", "backward costs twice forward", style="bold")
    return table


def memory_table(model: GPT, cache: KVCache, config: InspectConfig) -> Table:
    """Bytes held in training, by the kernels and by MLX's operations, and in generation; and what this device has."""
    batch_size, dtype, grad_checkpoint = config.batch_size, config.dtype, config.grad_checkpoint
    used, has_kernels = getattr(mx, dtype), dtype == "float32" and extension.is_there()
    on_mlx = {recompute: memory_on_mlx(model, batch_size, recompute, used) for recompute in (False, True)}
    on_kernels = on_mlx
    if has_kernels:
        on_kernels = {recompute: memory_on_kernels(model, batch_size, recompute) for recompute in (False, True)}
    mlx, kernels = on_mlx[grad_checkpoint], on_kernels[grad_checkpoint]
    table = _table(f"Memory in {dtype}", "what", "CPU's kernels", "MLX (GPU)", "")

    def row(what: str, on_kernels: int | None, on_mlx: int | None, note: str = "", style: str = "") -> None:
        cells = (on_kernels if has_kernels else None, on_mlx)
        table.add_row(what, *("" if n is None else _bytes(n) for n in cells), note, style=style)

    master = 4 * model.n_params()
    weights = sum(p.nbytes for p in model.named_weights().values())
    if dtype != "float32":
        row("master weights", master, master, "float32")
    row("weights", weights, weights, "all that generation needs, with the cache")
    row("gradients", master, master, "float32")
    row("AdamW's two averages", 2 * master, 2 * master, "float32")
    row("activations", kernels.activations, mlx.activations, "kept for the backward pass, and its working memory")
    row("logits", kernels.logits, mlx.logits, "float32, of some rows at a time")
    row("attention scores", kernels.scores, mlx.scores, "of some queries at a time")
    note = "the most at one time: on MLX less than the sum" if dtype == "float32" else "the most at one time"
    row("training in total", kernels.total, mlx.total, note, "bold")
    other = not grad_checkpoint
    name = "with grad_checkpoint" if other else "without grad_checkpoint"
    row(name, on_kernels[other].total, on_mlx[other].total, "the total", "bold")
    copies = copied_for_checkpoint(model)
    row("a checkpoint's copies", copies, copies, "at most, while one is written")
    if memory := device_memory.available():
        run: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "grad_checkpoint": grad_checkpoint}
        missing = fitting.run_memory(model, replace(TrainConfig(), **run)) - memory.room
        note = "free: a run fits" if missing <= 0 else f"free: too little for a run by {_bytes(missing)}"
        on_cpu = extension.available(used)
        name = "this GPU" if mx.default_device().type == mx.gpu else "this CPU"
        row(name, memory.free if on_cpu else None, None if on_cpu else memory.free, note, "bold")
    table.add_section()
    row("key/value cache", cache.nbytes, cache.nbytes, "generation, all positions")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        numeric = column in ("count", "share", "per token", "CPU's kernels", "MLX (GPU)")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=column != "")
    return table


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _bytes(n: int) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def _flops(n: float) -> str:
    return f"{n / 1e9:,.2f} GFLOP" if n >= 1e9 else f"{n / 1e6:,.2f} MFLOP"


def _find_config(target: str) -> GPTConfig:
    """The shape that a preset's name or a model directory stands for."""
    if target in PRESETS:
        values = {n: v for n, v in PRESETS[target].items() if n in settings(GPTConfig)}
        if PRESETS[target].get("tokenizer", "char") == "char":  # training takes it from the text
            values.setdefault("vocab_size", STDLIB_CHARACTERS)
        return GPTConfig(**values)
    if target and Path(target).expanduser().is_dir():
        return model_directory.load_config(model_directory.find_model(Path(target).expanduser()))
    raise ValueError(
        f"'{target}' is neither a preset{nearest(target, PRESETS)} nor a directory; presets: {', '.join(PRESETS)}"
    )


def main(args: Sequence[str]) -> None:
    target = cli.parse(InspectConfig, args, "mlxgpt.inspect").target
    config = cli.parse(InspectConfig, args, "mlxgpt.inspect", InspectConfig(target, model=_find_config(target)))
    mx.random.seed(0)
    model, shape = GPT(config.model), (config.batch_size, config.model.block_size)
    model.update(tree_map(lambda p: p.astype(getattr(mx, config.dtype)), model.parameters()))
    ids, cache = mx.zeros(shape, mx.int32), KVCache(config.model.n_layer, config.model.block_size, config.batch_size)
    calls = trace(model, ids)
    trace(model, ids, cache)

    console = Console(highlight=False)
    console.print(f"[bold]{target}[/bold]: " + ", ".join(f"{n} {v}" for n, v in vars(config.model).items()), "\n")
    console.print(explain(config.model), "\n")
    console.print(draw(config.model), "\n", markup=False)
    console.print(shape_table(calls, ids))
    console.print(parameter_table(model))
    console.print(flops_table(calls, ids.size))
    console.print(memory_table(model, cache, config))


if __name__ == "__main__":
    cli.run("mlxgpt.inspect", main)
