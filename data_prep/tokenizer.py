"""A byte-level BPE of one's own, from the training texts of shards.

    python -m data_prep.tokenizer data/stamps data/asterisk data/fillets --tasks asr s2tt --out data/bpe

Each different text counts once, however many rows have it; held-out rows are not read. The file is the one that
`data.tokenizer` takes, with the special tokens of the model family.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from omnitrain.data.chat import train_bpe
from omnitrain.data.sample import Sample
from omnitrain.data.shards import SampleSource


def training_texts(rows: Iterable[Sample]) -> Iterator[str]:
    """Every text that the rows of the split ``train`` have, of all roles."""
    for row in rows:
        if row.split == "train":
            yield from (segment.text for segment in row.segments if segment.text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.tokenizer", description=__doc__)
    parser.add_argument("shards", nargs="+", type=Path, help="folders of shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    parser.add_argument("--vocabulary", type=int, default=2048, help="tokens, bytes and special ones included")
    parser.add_argument("--tasks", nargs="*", default=[], help="read only rows of these tasks")
    options = parser.parse_args(argv)
    console = Console(width=110)
    where = {"task": options.tasks} if options.tasks else None
    try:
        sources = [SampleSource(folder, split="train", where=where) for folder in options.shards]
        texts = dict.fromkeys(text for source in sources for text in training_texts(source))
        tokenizer = train_bpe(texts, options.vocabulary)
    except (FileNotFoundError, ValueError) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(options.out / "tokenizer.json")
    pieces = sum(len(tokenizer.encode(text)) for text in texts)
    characters = sum(map(len, texts))
    console.print(
        f"{options.out / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens, from {len(texts):,} texts; "
        f"{characters / pieces:.2f} characters a token"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
