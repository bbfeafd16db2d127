"""What holds for every function of mlxgpt._core: which kernels run, on which threads, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_core = pytest.importorskip("mlxgpt._core")

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "csrc" / "kernels" / "table.h"
ISAS = tuple(re.findall(r"^ +X\((\w+), \w+\)", TABLE.read_text(), re.MULTILINE))  # the list MLXGPT_TARGETS


# ---- which kernels run ----


@pytest.mark.skipif("MLXGPT_ISA" in os.environ, reason="one instruction set was asked for")
@pytest.mark.parametrize("isa", ISAS)
def test_every_kernel_on_each_isa(isa, run_python):
    probe = run_python("-c", "from mlxgpt import _core; print(_core.isa())", MLXGPT_ISA=isa)
    if "does not run" in probe.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert probe.stdout.strip() == isa, probe.stderr
    if isa == _core.isa():
        return  # the other tests are this run
    names = (
        "cpu/test_attention", "cpu/test_kernels", "cpu/test_gradients", "cpu/test_vector_math", "model/test_ops",
        "model/test_model", "training/test_optim", "training/test_training", "generation/test_decoding",
    )  # fmt: skip
    files = [f"{name}.py" for name in names]
    tests = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, MLXGPT_ISA=isa)
    assert tests.returncode == 0, tests.stdout + tests.stderr


def test_isa_is_the_one_asked_for():
    assert _core.isa() in ISAS
    assert _core.isa() == os.environ.get("MLXGPT_ISA", _core.isa())


@pytest.mark.parametrize(
    "name, value", [("MLXGPT_ISA", "sse9"), ("MLXGPT_NUM_THREADS", "0"), ("MLXGPT_NUM_THREADS", "two")]
)
def test_bad_environment_is_named(name, value, run_python):
    result = run_python("-c", "from mlxgpt import _core; _core.isa(), _core.num_threads()", **{name: value})
    assert result.returncode == 1
    assert f"ValueError: {name} is '{value}', " in result.stderr


# ---- threads ----

PRINT_THREADS = "from mlxgpt import _core; print(_core.num_threads())"


def test_num_threads_is_the_one_asked_for(run_python):
    result = run_python("-c", PRINT_THREADS, MLXGPT_NUM_THREADS="3")
    assert result.stdout.strip() == "3", result.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_num_threads_is_that_of_the_physical_cores_allowed(run_python):
    def siblings(cpu: int) -> str:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        return file.read_text() if file.exists() else str(cpu)

    cpus = sorted(os.sched_getaffinity(0))
    for allowed in (cpus, cpus[:1], cpus[-2:]):
        pin = f"import os; os.sched_setaffinity(0, {allowed}); "
        n = int(run_python("-c", pin + PRINT_THREADS, MLXGPT_NUM_THREADS="").stdout)
        assert 1 <= n <= len({siblings(cpu) for cpu in allowed})  # fewer by a quota
        assert n == _core.num_threads() or allowed != cpus or os.environ.get("MLXGPT_NUM_THREADS")


@pytest.mark.parametrize(
    "files, n",
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_num_threads_is_within_the_cgroups_quota(files, n, tmp_path, run_python):
    """Control groups of a version each, put over the real ones in a mount namespace."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    script = 'mount --bind "$1" /sys/fs/cgroup && exec "$2" -c "$3"'
    result = subprocess.run(
        [*unshare, "sh", "-c", script, "sh", tmp_path, sys.executable, PRINT_THREADS],
        env={**os.environ, "MLXGPT_NUM_THREADS": ""}, cwd=TESTS, capture_output=True, text=True,
    )  # fmt: skip
    cores = "print(len({open(f'/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list').read() "
    cores += "for n in __import__('os').sched_getaffinity(0)}))"
    assert int(result.stdout) == (n or int(run_python("-c", cores).stdout)), result.stderr


@pytest.mark.parametrize("n_threads, what", [("4", "idle"), ("1", "alone")])
def test_nobody_spins(n_threads, what, run_python):
    """In seconds of processor time, so that a busy machine changes nothing: of threads of ours that have nothing to
    do, and of a BLAS's own, which would fight with ours for the cores."""
    code = f"""
import time
import numpy as np
from mlxgpt import _core
x, w, out = np.ones((512, 768), np.float32), np.ones((768, 768), np.float32), np.empty((512, 768), np.float32)
for _ in range(3): _core.linear_forward(x, w, None, out)
time.sleep(0.5)  # a BLAS's threads may spin for a while after they were made
process, thread = time.process_time(), time.thread_time()
if "{what}" == "idle":
    time.sleep(1)
else:
    for _ in range(50): _core.linear_forward(x, w, None, out)
process, thread = time.process_time() - process, time.thread_time() - thread
assert process - thread < 0.1 + 0.1 * thread, (process, thread)
assert "{what}" == "idle" or thread > 0.01
"""
    result = run_python("-c", code, MLXGPT_NUM_THREADS=n_threads)
    assert result.returncode == 0, result.stderr


# ---- every function, with arguments that it takes ----

rng = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def adamw(**arrays: np.ndarray) -> None:
    """One tensor; the arrays are positional."""
    options = dict(learning_rate=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1, max_norm=1.0)
    _core.adamw(*([a] for a in arrays.values()), [True], **options)


def calls(n: int = 1) -> dict[str, tuple[Callable, dict, str, str]]:
    """name -> the function, its arguments with lengths of n times a few, its outputs, and those that may be None."""
    B, H, T, D, rows, C, V = 2, 3, 5 * n, 8, 4 * n, 6, 7 * n
    heads = {name: array(B, H, T, D) for name in ("q", "k", "v", "out")} | {"lse": array(B, H, T), "scale": 0.5}
    gradients = {name: array(B, H, T, D) for name in ("dout", "dq", "dk", "dv")}
    x, weight, dx = {"x": array(rows, C)}, {"weight": array(V, C)}, {"dx": array(rows, C)}
    norm = {"weight": array(C), "mean": array(rows), "rstd": array(rows)}
    ids, targets = np.ones((B, T), np.int32), {"targets": np.ones(rows, np.int32)}
    gelu, seed = {"activation": "gelu"}, {"p": 0.5, "seed": 1}
    words = rng.integers(0, 2**32, (V, 8), dtype=np.uint32)  # 4 bits
    quantized = {"weight": words, "scales": array(V, 2), "biases": array(V, 2)}
    return {
        "attention_forward": (_core.attention_forward, heads, "out lse", ""),
        "attention_backward": (_core.attention_backward, heads | gradients, "dq dk dv", ""),
        "attention_cached": (
            _core.attention_cached,
            {name: array(B, H, T, D) for name in ("q", "k", "v", "out")} | {"scale": 0.5}
            | {name: array(B, H, T + 4, D) for name in ("keys", "values")} | {"offsets": np.array([0, 4], np.int32)},
            "keys values out", "",
        ),
        "dropout_mask": (_core.dropout_mask, {"mask": array(B, H, T, T), "dropout": 0.5, "seed": 1}, "mask", ""),
        "linear_forward": (
            _core.linear_forward,
            x | weight | {"bias": array(V), "out": array(rows, V), "residual": array(rows, V)},
            "out", "bias residual",
        ),
        "linear_forward gelu": (
            _core.linear_forward,
            x | weight | {"bias": array(V), "out": array(rows, V), "activated": array(rows, V)},
            "out activated", "bias activated",
        ),
        "linear_forward quantized": (
            _core.linear_forward,
            {"x": array(rows, 64)} | quantized | {"bias": array(V), "out": array(rows, V)},
            "out", "bias",
        ),
        "linear_backward": (
            _core.linear_backward,
            {"dout": array(rows, V)} | x | weight | dx | {"dweight": array(V, C), "dbias": array(V)},
            "dx dweight dbias", "dx dweight dbias",
        ),
        "linear_backward gelu": (
            _core.linear_backward,
            {"dout": array(rows, V)} | x | weight | dx
            | {"dweight": None, "dbias": None, "pre": array(rows, C), "activated": array(rows, C)},
            "dx activated", "x activated",
        ),
        "gelu_forward": (_core.gelu_forward, x | {"out": array(rows, C)} | gelu, "out", ""),
        "gelu_backward": (_core.gelu_backward, x | dx | gelu, "dx", ""),
        "layer_norm_forward": (
            _core.layer_norm_forward,
            x | norm | {"bias": array(C), "eps": 1e-5, "out": array(rows, C)},
            "out mean rstd", "bias",
        ),
        "layer_norm_backward": (
            _core.layer_norm_backward,
            {"dout": array(rows, C)} | x | norm | dx | {"dweight": array(C), "dbias": array(C)},
            "dx dweight dbias", "dweight dbias",
        ),
        "embedding_forward": (
            _core.embedding_forward,
            {"ids": ids, "tokens": array(V, C), "positions": array(T, C), "out": array(B, T, C)},
            "out", "positions",
        ),
        "embedding_forward offsets": (
            _core.embedding_forward,
            {"ids": ids, "tokens": array(V, C), "positions": array(T + 3, C), "out": array(B, T, C)}
            | {"offsets": np.array([0, 3], np.int32)},
            "out", "",
        ),
        "embedding_backward": (
            _core.embedding_backward,
            {"ids": ids, "dout": array(B, T, C), "dtokens": array(V, C), "dpositions": array(T, C)},
            "dtokens dpositions", "dtokens dpositions",
        ),
        "linear_cross_entropy": (
            _core.linear_cross_entropy,
            x | weight | targets | dx | {"dweight": array(V, C)},
            "dx dweight", "dx dweight",
        ),
        "adamw": (
            adamw, {name: abs(array(rows, C)) for name in ("parameters", "gradients", "m", "v")}, "parameters m v", "",
        ),
        "dropout": (_core.dropout, x | {"residual": array(rows, C), "out": array(rows, C)} | seed, "out", "residual"),
        "copy": (_core.copy, x | {"out": array(rows, C)}, "out", ""),
    }  # fmt: skip


CALLS = calls()
ARRAYS = [(call, name) for call in CALLS for name, value in CALLS[call][1].items() if isinstance(value, np.ndarray)]


@pytest.mark.parametrize("call", CALLS)
def test_taken(call):
    """So that what is refused below is refused for its one fault."""
    function, arguments, outputs, optional = calls()[call]
    written = {name: arguments[name].copy() for name in outputs.split()}
    function(**arguments)
    for name, before in written.items():
        assert not np.array_equal(arguments[name], before), name
    for name in optional.split():
        function(**{**arguments, name: None})


@pytest.mark.parametrize("call", CALLS)
def test_other_threads_of_python_run_meanwhile(call):
    """The interpreter switches threads only when a call lets go of its lock, here."""
    function, arguments, _, _ = calls(40)[call]
    interval, go, went = sys.getswitchinterval(), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (go.wait(), went.set()))
    thread.start()
    sys.setswitchinterval(1000)
    try:
        go.set()
        assert not went.is_set()
        deadline = time.monotonic() + 10
        while not went.is_set() and time.monotonic() < deadline:
            function(**arguments)
        ran = went.is_set()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert ran


# ---- refusals ----


def unaligned(a: np.ndarray) -> np.ndarray:
    return np.zeros(a.nbytes + 1, np.int8)[1:].view(a.dtype).reshape(a.shape)


FAULTS = {
    "one axis more": lambda a: a[None],
    "no axes": lambda a: a.reshape(-1)[0:1].reshape(()),
    "nothing in it": lambda a: a[:0],
    "an axis of no length": lambda a: a[..., :0],
    "float64": lambda a: a.astype(np.float64),
    "int64": lambda a: a.astype(np.int64),
    "bits of another type": lambda a: np.zeros(a.shape, np.uint16),
    "the other order of bytes": lambda a: a.astype(a.dtype.newbyteorder()),
    "objects": lambda a: a.astype(object),
    "records": lambda a: np.zeros(a.shape, [("x", a.dtype)]),
    "elements of no size": lambda a: np.zeros(a.shape, "V0"),
    "gaps between elements": lambda a: np.repeat(a, 2, -1)[..., ::2],
    "the order of Fortran": lambda a: np.asfortranarray(a) if a.ndim > 1 else a[::-1],
    "an odd address": unaligned,
    "one element for all": lambda a: np.broadcast_to(a.reshape(-1)[:1].reshape((1,) * a.ndim), a.shape),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", CALLS)
def test_bad_array(call, fault):
    function, arguments, outputs, _ = CALLS[call]
    names = [name for of, name in ARRAYS if of == call]
    if fault == "one element for all" and call.startswith("attention"):
        names = [name for name in (*outputs.split(), "lse") if name in arguments]  # any strides will do for the others
    if call == "copy" and fault in ("bits of another type", "the order of Fortran", "an odd address"):
        names = ["out"]  # what copy is there to read
    if fault == "bits of another type" and "backward" not in call:
        names = [name for name in names if name not in ("weight", "tokens")]  # they may be bfloat16
    for name in names:
        bad = FAULTS[fault](arguments[name])
        with pytest.raises(ValueError, match=r"^[a-z_ ]+: .*(expected|is not contiguous|does not begin on)") as error:
            function(**{**arguments, name: bad})
        assert any(argument in str(error.value) for argument in names)


@pytest.mark.parametrize("call, name", ARRAYS)
def test_no_array(call, name):
    function, arguments, outputs, optional = CALLS[call]
    for other in ([[1.0]], "text", 1.0, None, mx.zeros(3, mx.bfloat16)):
        if other is not None or name not in optional.split():
            with pytest.raises((TypeError, ValueError, BufferError)):
                function(**{**arguments, name: other})
    if name in outputs.split():
        read_only = arguments[name].copy()
        read_only.flags.writeable = False
        with pytest.raises(ValueError, match=rf"{name}\S* is read-only, expected a writable array"):
            function(**{**arguments, name: read_only})


@pytest.mark.parametrize("call, name", ARRAYS)
def test_outputs_share_memory_with_nothing(call, name):
    function, arguments, outputs, _ = CALLS[call]
    for output in set(outputs.split()) - {name}:
        first, second = arguments[output], arguments[name]
        for shift in (0, 1, -1, first.size - 1):
            memory = np.ones(first.size + second.size + 1, np.int32)
            begin = 1 + shift
            views = {
                output: memory[1 : 1 + first.size].view(np.float32).reshape(first.shape),
                name: memory[begin : begin + second.size].view(second.dtype).reshape(second.shape),
            }
            with pytest.raises(
                ValueError, match=f"({name}.* and {output}|{output}.* and {name}).* share memory, expected"
            ):
                function(**{**arguments, **views})


WORDS, FACTORS = np.zeros((7, 8), np.uint32), np.zeros((7, 2), np.float16)


@pytest.mark.parametrize(
    "weight, factors, message",
    [
        (WORDS, {}, "weight is quantized, expected scales and biases"),
        (WORDS, {"scales": FACTORS}, "weight is quantized, expected scales and biases"),
        (array(7, 64), {"scales": FACTORS}, "scales is given and weight has buffer format 'f', expected quantized"),
        (WORDS[:, :7], {"scales": FACTORS, "biases": FACTORS}, r"weight is \(7, 7\), expected \(7, 8\) words for 4"),
        (WORDS[:6], {"scales": FACTORS, "biases": FACTORS}, r"weight is \(6, 8\), expected \(7, 8\) words for 4"),
        (WORDS, {"scales": FACTORS[:, :1], "biases": FACTORS}, r"biases is \(7, 2\), expected \(7, 1\)|contiguous"),
        (WORDS, {"scales": array(7, 4), "biases": FACTORS}, r"scales is \(7, 4\), expected \(7, n\) with n groups of"),
        (WORDS, {"scales": FACTORS[:6], "biases": FACTORS}, r"scales is \(6, 2\), expected \(7, n\)"),
        (WORDS, {"scales": FACTORS, "biases": array(7, 2)}, "biases has buffer format 'f', expected that of scales"),
        (WORDS, {"scales": WORDS[:, :2], "biases": FACTORS}, "scales has buffer format 'I', expected float32"),
    ],
)
def test_bad_quantized_weight(weight, factors, message):
    with pytest.raises(ValueError, match=f"^linear: ({message})"):
        _core.linear_forward(array(4, 64), weight, None, array(4, 7), **factors)


def test_bad_offsets():
    _, arguments, _, _ = CALLS["embedding_forward offsets"]
    for offsets, message in (
        ([0, 4], "offsets holds 4, expected 0 <= offset < 4"),
        ([-1, 0], "offsets holds -1, expected 0 <= offset < 4"),
        ([0], r"offsets is \(1,\), expected \(2,\)"),
    ):
        with pytest.raises(ValueError, match=f"^embedding: {message}"):
            _core.embedding_forward(**{**arguments, "offsets": np.array(offsets, np.int32)})
    with pytest.raises(ValueError, match="embedding: offsets is given without positions"):
        _core.embedding_forward(**{**arguments, "positions": None})
    short = {**arguments, "positions": array(4, 6)}
    with pytest.raises(ValueError, match=r"embedding: .*, expected"):
        _core.embedding_forward(**{**short, "offsets": np.zeros(2, np.int32)})


def test_gradients_need_float32_weights():
    weight, x, targets = np.zeros((7, 6), np.float16), array(4, 6), np.zeros(4, np.int32)
    _core.linear_cross_entropy(x, weight, targets)
    with pytest.raises(ValueError, match="linear_cross_entropy: weight has buffer format 'e', expected float32"):
        _core.linear_cross_entropy(x, weight, targets, array(4, 6))


part = st.tuples(
    st.permutations(range(3)),
    *(st.tuples(st.integers(0, length - 2 * size), st.integers(1, 2)) for length, size in ((6, 2), (6, 2), (6, 2))),
    st.integers(0, 5),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(a=part, b=part)
def test_parts_of_one_array_are_told_apart(a, b):
    """Any two views with strides, against NumPy's word."""
    memory = np.zeros((6, 6, 6, 8), np.float32)

    def view(axes, *starts_and_steps):
        *outer, last = starts_and_steps
        at = tuple(slice(start, start + 2 * step, step) for start, step in outer)
        return memory[(*at, slice(last, last + 3))].transpose(*axes, 3)  # (2, 2, 2, 3)

    q, out, k = view(*a), view(*b), array(2, 2, 2, 3)
    arguments = q, k, k, out, array(2, 2, 2)
    if np.shares_memory(q, out):
        with pytest.raises(ValueError, match="out and q share memory"):
            _core.attention_forward(*arguments, scale=1.0)
    else:
        _core.attention_forward(*arguments, scale=1.0)


def test_two_tensors_of_adamw_are_told_apart():
    options = dict(learning_rate=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1, max_norm=1.0)
    a = [array(8) for _ in range(8)]
    _core.adamw(a[:2], [a[2], a[2]], a[4:6], a[6:], [True, True], **options)  # gradients are only read
    with pytest.raises(ValueError, match=r"adamw: (m\[0\] and v\[1\]|v\[1\] and m\[0\]) share memory"):
        _core.adamw(a[:2], a[2:4], a[4:6], [a[6], a[4]], [True, True], **options)


@pytest.mark.parametrize("name", ["ids", "targets"])
def test_ids_of_a_huge_shape(name):
    huge = np.broadcast_to(
        np.zeros((1, 1) if name == "ids" else 1, np.int32), (2**31, 1) if name == "ids" else (2**31,)
    )
    for call in (c for c, n in ARRAYS if n == name):
        function, arguments, _, _ = CALLS[call]
        with pytest.raises(ValueError, match=rf"{name} is \(2147483648,.*expected sizes from 1 to 1073741824"):
            function(**{**arguments, name: huge})


@pytest.mark.parametrize(
    "call, numbers, message",
    [
        ("dropout", {"p": 1.0}, "p is 1"),
        ("dropout", {"p": -0.1}, "p is -0.1"),
        ("dropout", {"p": np.nan}, "p is -?nan"),
        ("dropout_mask", {"dropout": 1.0}, "dropout is 1"),
        ("attention_forward", {"dropout": -1.0}, "dropout is -1"),
        ("attention_forward", {"scale": np.nan}, "scale is -?nan"),
        ("layer_norm_forward", {"eps": np.nan}, "eps is -?nan"),
        ("layer_norm_forward", {"eps": np.inf}, "eps is inf"),
        ("linear_cross_entropy", {"scale": np.nan}, "scale is -?nan"),
        ("linear_forward", {"scale": np.nan}, "scale is -?nan"),
        ("gelu_forward", {"activation": ""}, "activation is ''"),
    ],
)
def test_bad_number(call, numbers, message):
    function, arguments, _, _ = CALLS[call]
    with pytest.raises(ValueError, match=rf"^[a-z_]+: {message}.*, expected "):
        function(**{**arguments, **numbers})


@pytest.mark.parametrize("name, value", [
    ("learning_rate", np.nan), ("eps", -1.0), ("weight_decay", np.inf), ("beta1", 1.0), ("beta2", np.nan), ("step", 0),
    ("max_norm", -1.0), ("max_norm", np.nan),
])  # fmt: skip
def test_bad_number_of_adamw(name, value):
    options = dict(learning_rate=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=1, max_norm=1.0)
    what = "a beta" if "beta" in name else name
    with pytest.raises(ValueError, match=f"^adamw: {what} is .*, expected "):
        _core.adamw(*([array(5)] for _ in range(4)), [True], **{**options, name: value})


# ---- recordings ----


def test_a_recording_makes_its_calls_again_on_what_the_arrays_then_hold():
    x, weight, hidden, out = array(2, 6), array(5, 6), np.empty((2, 5), np.float32), np.empty((2, 5), np.float32)
    ids, table, rows = np.zeros((1, 2), np.int32), array(7, 6), np.empty((1, 2, 6), np.float32)
    recording = _core.Recording()
    with recording:
        _core.embedding_forward(ids, table, None, rows)
        _core.linear_forward(rows[0], weight, None, hidden)
        _core.linear_forward(hidden, np.eye(5, dtype=np.float32) * 2, None, out)  # held by the recording alone
    _core.linear_forward(x, weight, None, np.empty((2, 5), np.float32))  # no longer recorded
    assert len(recording) == 3
    for pair in ([1, 2], [6, 6]):
        ids[0] = pair
        recording.replay()
        np.testing.assert_allclose(out, 2 * table[pair] @ weight.T, rtol=1e-5)


def test_a_recording_checks_what_it_reads_anew():
    ids, offsets, out = np.zeros((1, 2), np.int32), np.zeros(1, np.int32), np.empty((1, 2, 6), np.float32)
    recording = _core.Recording()
    with recording:
        _core.embedding_forward(ids, array(7, 6), array(4, 6), out, offsets=offsets)
    for values, fault, message in ((ids, 7, "ids holds 7, expected 0 <= id < 7"), (offsets, 3, "offsets holds 3")):
        values[...] = fault
        with pytest.raises(ValueError, match=f"embedding: {message}"):
            recording.replay()
        values[...] = 0
        recording.replay()


def test_one_recording_at_a_time():
    first, second = _core.Recording(), _core.Recording()
    with first:
        with pytest.raises(ValueError, match="recording: another recording is being made"), second:
            pass
        with pytest.raises(ValueError, match=r"recording: replay\(\) is called before its with statement has ended"):
            first.replay()
    first.__enter__()
    del first  # in the middle
    with second:
        _core.linear_forward(array(1, 6), array(5, 6), None, np.empty((1, 5), np.float32))
    assert len(second) == 1
    with pytest.raises(ValueError, match="x is"), second:
        _core.linear_forward(array(6), array(5, 6), None, np.empty((1, 5), np.float32))
    assert len(second) == 1
    second.replay()
