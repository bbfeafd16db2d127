"""python -m mlxgpt.generate: samples text from a model directory."""

from __future__ import annotations

import codecs
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from . import checkpoint, cli, ops, tokenizer
from .config import SampleConfig
from .decoding import Decoder
from .sampling import Sampler


def stream_text(tokens: Iterable[int], decoder: tokenizer.Tokenizer) -> Iterator[str]:
    """The text of tokens as they come: a character is held back until its last byte is there."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield utf8.decode(decoder.token_bytes(token))
    yield utf8.decode(b"", final=True)


def main(args: Sequence[str]) -> None:
    config = cli.parse(SampleConfig, args, "mlxgpt.generate")
    ops.use_device(config.device)
    directory = checkpoint.find_model(Path(config.model).expanduser())
    model, text = checkpoint.load_model(directory), tokenizer.load(directory)
    if text.vocab_size > model.config.vocab_size:
        counts = f"its tokenizer has {text.vocab_size} ids, its model vocab_size = {model.config.vocab_size}"
        raise ValueError(f"model: {directory}: {counts}")
    try:
        prompt = text.encode(config.prompt).tolist() or [text.start]
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from None
    for n in range(config.num_samples):
        if n:
            print("\n---------------")
        sampler = Sampler(temperature=config.temperature, top_k=config.top_k, seed=config.seed + n)
        steps = Decoder(model, [prompt], sampler, vocab_size=text.vocab_size)
        new = (int(step.tokens[0]) for step in itertools.islice(steps, config.max_new_tokens))
        until_end = itertools.takewhile(lambda token: token != text.end_of_text, new)
        sys.stdout.write(config.prompt)
        for piece in stream_text(until_end, text):
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()


if __name__ == "__main__":
    cli.run("mlxgpt.generate", main)
