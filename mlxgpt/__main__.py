"""mlxgpt VERB, or python -m mlxgpt VERB: runs a verb; without one, lists them.

A verb's module is imported when the verb runs, and MLX with it: listing the verbs is quick, and works without MLX.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from . import __version__, load_mlx

VERBS = {
    "train": "train a GPT on text, and show how it comes along",
    "generate": "continue a prompt with a trained model",
    "evaluate": "measure the loss, perplexity and bits per byte of a model on text",
    "inspect": "show the shapes, memory and time that a model takes",
    "compare": "draw the loss curves of several runs in one picture, and tabulate them",
    "convert": "convert GPT-2 weights between PyTorch, Hugging Face, nanoGPT, llm.c, GGUF and model directories",
    "prepare": "tokenize text of any size to shards that training reads",
}


def main() -> None:
    """Runs the command line of this process, and exits."""
    prog = "python -m mlxgpt" if Path(sys.argv[0]).name == "__main__.py" else "mlxgpt"
    verb, *args = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(_help(prog))
    elif verb == "--version":
        print(f"mlxgpt {__version__}")
    elif verb in VERBS:
        load_mlx(is_command=True)
        from .common import cli

        cli.run(f"{prog} {verb}", importlib.import_module(f".{verb}", __package__).main, args)
    else:
        from .common.settings import nearest

        print(f"{prog}: error: unknown verb '{verb}'{nearest(verb, VERBS)}; --help lists them", file=sys.stderr)
        sys.exit(2)


def _help(prog: str) -> str:
    lines = [f"  {verb:<10}{what}" for verb, what in VERBS.items()]
    return "\n".join([f"usage: {prog} VERB ...", "", *lines, "", f"{prog} VERB --help lists the settings of a verb."])


if __name__ == "__main__":
    main()
