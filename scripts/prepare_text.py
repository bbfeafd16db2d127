"""Tokenizes text files, JSONL and parquet in parallel to shards that training reads.

python scripts/prepare_text.py INPUT... --out DIR [--tokenizer gpt2|char|MODEL_DIR]; --verify DIR
"""

from mlxgpt.common import cli
from mlxgpt.data import preparation as prepare_text

if __name__ == "__main__":
    cli.run("prepare_text", prepare_text.main)
