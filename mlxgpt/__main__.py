"""mlxgpt VERB, or python -m mlxgpt VERB: runs a verb; without one, lists them.

A verb's module is imported when the verb runs, and MLX with it: listing the verbs is quick, and works without MLX.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from . import __version__, load_mlx
from .common import cli
from .common.settings import nearest

VERBS = {
    "train": "train a GPT on text, and show how it comes along",
    "generate": "continue a prompt with a trained model",
    "evaluate": "measure the loss, perplexity and bits per byte of a model on text",
    "inspect": "show the shapes, parameters, arithmetic and memory of a model",
    "compare": "draw the loss curves of several runs in one picture, and tabulate them",
    "convert": "convert GPT-2 weights between PyTorch, Hugging Face, nanoGPT, llm.c, GGUF and model directories",
    "prepare": "tokenize text of any size to shards that training reads",
}


def main() -> None:
    """Runs the command line of this process, and exits."""
    prog = "python -m mlxgpt" if Path(sys.argv[0]).name == "__main__.py" else "mlxgpt"
    cli.run(prog, lambda args: _run(prog, *args))


def _run(prog: str, verb: str = "--help", *args: str) -> None:
    if verb in ("-h", "--help"):
        print(f"usage: {prog} VERB ...\n", *(f"  {name:<10}{what}" for name, what in VERBS.items()), sep="\n")
        print(f"\n{prog} VERB --help lists the settings of a verb.")
    elif verb == "--version":
        print(f"mlxgpt {__version__}")
    elif verb in VERBS:
        load_mlx(is_command=True)
        cli.run(f"{prog} {verb}", importlib.import_module(f".{verb}", __package__).main, args)
    else:
        raise cli.UsageError(f"unknown verb '{verb}'{nearest(verb, VERBS)}; --help lists them")


if __name__ == "__main__":
    main()
