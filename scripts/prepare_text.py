"""Tokenizes text files, JSONL and parquet in parallel to shards that training reads: the verb `prepare`.

python scripts/prepare_text.py INPUT... --out DIR [--tokenizer gpt2|char|MODEL_DIR]; --verify DIR
"""

from mlxgpt import prepare
from mlxgpt.common import cli

if __name__ == "__main__":
    cli.run("prepare_text", prepare.main)
