"""Settings of a training run: presets, rules, and the command line over a TOML file over a preset."""

from __future__ import annotations

import pytest

from mlxgpt import train
from mlxgpt.common import cli
from mlxgpt.common.settings import from_dict, settings
from mlxgpt.generate import SampleConfig
from mlxgpt.generation.samples import SampleOptions
from mlxgpt.generation.sampling import Sampler
from mlxgpt.model.config import GPTConfig
from mlxgpt.training.recipe import PRESETS, TrainConfig, preset


def parse(*args: str) -> TrainConfig:
    return train.settings_from(["--device", "cpu", *args])[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_settings(name):
    config = from_dict(TrainConfig, preset(name), name)
    assert config.model.head_dim in (32, 64)


def test_gpt2_presets_have_the_published_shapes():
    shapes = {n: (p["n_layer"], p["n_head"], p["n_embd"]) for n, p in PRESETS.items() if n.startswith("gpt2")}
    assert shapes == {
        "gpt2": (12, 12, 768),
        "gpt2-medium": (24, 16, 1024),
        "gpt2-large": (36, 20, 1280),
        "gpt2-xl": (48, 25, 1600),
    }
    model = from_dict(TrainConfig, preset("gpt2"), "gpt2").model
    assert model == GPTConfig()


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (TrainConfig, dict(batch_size=0), "batch_size is 0"),
        (TrainConfig, dict(learning_rate=0.0), "learning_rate is 0.0"),
        (TrainConfig, dict(learning_rate=1e-3, min_lr=1e-2), "min_lr is 0.01, expected 0 to learning_rate = 0.001"),
        (TrainConfig, dict(learning_rate=float("inf")), "learning_rate is inf, expected a finite number"),
        (TrainConfig, dict(seed=2**63), "seed is .*, expected 0 to "),
        (Sampler, dict(seed=-1), "seed is -1"),
        (TrainConfig, dict(beta2=1.0), "beta2 is 1.0"),
        (SampleConfig, dict(model="m", prompt="a", prompts="f"), "prompts is 'f', expected none beside a prompt"),
        (SampleOptions, dict(max_new_tokens=0), "max_new_tokens is 0"),
    ],
)
def test_rules_of_the_loop_and_of_sampling(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_from_dict_is_strict():
    assert from_dict(TrainConfig, {"n_layer": 3, "learning_rate": 1}, "x").model.n_layer == 3
    with pytest.raises(ValueError, match=r"f\.toml: unknown setting 'n_layr' \(did you mean 'n_layer'\?\)"):
        from_dict(TrainConfig, {"n_layr": 3}, "f.toml")
    with pytest.raises(ValueError, match=r"f\.toml: n_layer is '3', expected int"):
        from_dict(TrainConfig, {"n_layer": "3"}, "f.toml")
    with pytest.raises(ValueError, match="bias is 1, expected bool"):
        from_dict(TrainConfig, {"bias": 1}, "f.toml")
    with pytest.raises(ValueError, match="tokenizer is 'word', expected one of char, gpt2"):
        from_dict(TrainConfig, {"tokenizer": "word"}, "f.toml")


def test_flags_take_nanogpts_spellings():
    config = parse(
        "--n_layer", "3", "--n-head=2", "--bias=False", "--compile", "False", "--no-decay-lr", "--min_lr=1e-5"
    )
    assert (config.model.n_layer, config.model.n_head, config.model.bias) == (3, 2, False)
    assert (config.compile, config.decay_lr, config.min_lr) == (False, False, 1e-5)


def test_every_setting_is_a_flag_with_a_help_text(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert not stop.value.code
    text = capsys.readouterr().out
    for name in settings(TrainConfig):
        assert f"--{name}" in text, name
    assert "width of the residual stream (default: 128)" in " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n_layr", "3"], "unknown flag --n_layr (did you mean 'n_layer'?)"),
        (["--n_layer", "three"], "three"),
        (["--n_layer"], "--n_layer has no value"),
        (["--dtype", "float64"], "float64"),
        (["--bias=maybe"], "--bias is maybe, expected True or False"),
        (["--n_embd", "100", "--n_head", "3"], "n_embd is 100, expected a multiple of n_head = 3"),
        (["extra"], "extra"),
    ],
)
def test_bad_usage_is_one_line(args, message):
    with pytest.raises(cli.UsageError) as error:
        parse(*args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_command_line_wins_over_toml_wins_over_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "shakespeare-char"\nmax-iters = 7\n[model]\nn_layer = 5\nn_head = 4\n')
    config = parse("--config", str(file), "--n_head", "8")
    assert (config.preset, config.max_iters) == ("shakespeare-char", 7)
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == (5, 8, 384)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_layr = 3", "unknown setting 'n_layr' (did you mean 'n_layer'?)"),
        ("n_layer = 3.5", "n_layer is 3.5, expected int"),
        ("n_layer = ", "not a TOML file"),
        ("n_embd = 100\nn_head = 3", "n_embd is 100"),
    ],
)
def test_bad_toml_names_the_file(tmp_path, content, message):
    file = tmp_path / "run.toml"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        parse("--config", str(file))
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown preset 'gpt2-medum' \(did you mean 'gpt2-medium'\?\)"):
        preset("gpt2-medum")
