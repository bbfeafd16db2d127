"""Settings: strict dictionaries and TOML files become checked configs, and errors name the source and the nearest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from mlxgpt.common import settings
from mlxgpt.common.settings import from_dict, read_toml


@dataclass(frozen=True)
class Size:
    width: int = 2
    deep: bool = False


@dataclass(frozen=True)
class Shop:
    name: str = "corner"
    rate: float = 0.5
    kind: Literal["small", "large"] = "small"
    limit: int | None = None
    size: Size = field(default_factory=Size)

    def __post_init__(self) -> None:
        settings.require(0 < self.rate < 1, "rate", self.rate, "0 < rate < 1")
        settings.require_at_least(1, self.size, "width")


def test_settings_are_flat_a_nested_configs_among_them():
    assert list(settings.settings(Shop)) == ["name", "rate", "kind", "limit", "width", "deep"]
    assert settings.settings(Shop)["width"] is int


def test_a_config_is_built_from_flat_names():
    assert from_dict(Shop, {"width": 3, "kind": "large", "limit": None}, "x") == Shop(kind="large", size=Size(3))
    assert from_dict(Shop, {"limit": 5}, "x").limit == 5
    assert from_dict(Shop, {}, "x") == Shop()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "shop.toml: unknown setting 'widht' (did you mean 'width'?)"),
        ({"size": 3}, "shop.toml: unknown setting 'size'"),
        ({"width": "3"}, "shop.toml: width is '3', expected int"),
        ({"width": 3.0}, "shop.toml: width is 3.0, expected int"),
        ({"width": True}, "shop.toml: width is True, expected int"),
        ({"deep": 1}, "shop.toml: deep is 1, expected bool"),
        ({"rate": "half"}, "shop.toml: rate is 'half', expected float"),
        ({"kind": "vast"}, "shop.toml: kind is 'vast', expected one of small, large"),
        ({"limit": 1.5}, "shop.toml: limit is 1.5, expected int"),
        ({"rate": 1}, "shop.toml: rate is 1, expected 0 < rate < 1"),
        ({"width": 0}, "shop.toml: width is 0, expected at least 1"),
    ],
)
def test_a_value_that_does_not_fit_names_the_source_and_the_rule(values, message):
    with pytest.raises(ValueError) as error:
        from_dict(Shop, values, "shop.toml")
    assert str(error.value).startswith(message)


def test_the_nearest_name_is_suggested_when_there_is_one():
    assert settings.nearest("trian", ["train", "evaluate"]) == " (did you mean 'train'?)"
    assert settings.nearest("zzz", ["train", "evaluate"]) == ""


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_seed_is_63_bits(seed):
    settings.require_seed(seed)
    for wrong in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed is {wrong}, expected 0 to 2"):
            settings.require_seed(wrong)


def test_the_tables_of_a_toml_file_are_flattened(tmp_path):
    file = tmp_path / "shop.toml"
    file.write_text('name = "mall"\nmax-iters = 7\n[size]\nwidth = 5\ndeep = true\n')
    assert read_toml(str(file)) == {"name": "mall", "max_iters": 7, "width": 5, "deep": True}


@pytest.mark.parametrize("content", [b"width = ", b"width = \xff"])
def test_a_file_that_is_not_toml_is_named(content, tmp_path):
    file = tmp_path / "shop.toml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"shop\.toml: not a TOML file: "):
        read_toml(str(file))
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        read_toml(str(tmp_path / "none.toml"))
