"""GPT-2's names and shapes, and the check of a file's tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from random_models import TINY

from mlxgpt.formats import gpt2
from mlxgpt.formats.tensors import zeros
from mlxgpt.model.gpt import GPT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied_head", [True, False])
def test_names_and_shapes_are_the_models_in_its_order(bias, tied_head):
    config = replace(TINY, bias=bias, tied_head=tied_head)
    expected = {name: tuple(p.shape) for name, p in GPT(config).named_weights().items()}
    assert list(gpt2.shapes(config).items()) == list(expected.items())


def test_the_first_eight_differences_are_listed():
    expected = {f"a{n}": (2, n) for n in range(1, 7)}
    tensors = {f"a{n}": zeros("float32", (2, n + 1)) for n in range(2, 7)}
    tensors |= {"a6": zeros("int8", (2, 6)), "b": zeros("float64", (1,)), "c": zeros("float16", (1,))}
    with pytest.raises(ValueError) as error:
        gpt2.check_tensors(tensors, expected, "file")
    assert str(error.value) == (
        "file: missing a1; unknown b; unknown c; a2 is (2, 3), expected (2, 2); a3 is (2, 4), expected (2, 3); "
        "a4 is (2, 5), expected (2, 4); a5 is (2, 6), expected (2, 5); a6 is int8, expected a floating-point type"
    )
    with pytest.raises(ValueError, match=r"; and 1 more$"):
        gpt2.check_tensors(tensors, expected, "file", ("float32", "float16"))
    with pytest.raises(ValueError, match=r"^file: b is float64, expected float32 or float16$"):
        gpt2.check_tensors({"b": tensors["b"]}, {"b": (1,)}, "file", ("float32", "float16"))
