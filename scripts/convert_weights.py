"""Converts GPT-2 weights between PyTorch, Hugging Face, nanoGPT, llm.c, GGUF and model directories.

python scripts/convert_weights.py SRC DST [--to mlxgpt|nanogpt|gguf|safetensors]
"""

from mlxgpt import convert
from mlxgpt.common import cli

if __name__ == "__main__":
    cli.run("convert_weights", convert.main)
