"""``omnitrain convert``: runs to the public Qwen3-Omni format and back, a codec's run to a folder to be passed on,
checkpoints in parts to one file, and which public keys are which tensors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from omnitrain.config.errors import explains_errors
from omnitrain.files import printable

if TYPE_CHECKING:
    from omnitrain.interop.key_table import KeyTable
    from omnitrain.interop.public_format import Track

EXAMPLES = """\
examples:
  python -m omnitrain convert to-hf runs/quickstart exported          a folder that transformers can load
  python -m omnitrain convert from-hf Qwen3-Omni-30B-A3B-Instruct runs/start
  python -m omnitrain fit model=qwen3_omni_30b_a3b data.tokenizer=QWEN3 module.init_from=runs/start
  python -m omnitrain generate runs/start "What can you do?"
  python -m omnitrain convert to-ckpt runs/quickstart last.ckpt       what several processes saved, as one file
  python -m omnitrain convert to-codec runs/codec my_codec           a codec in fp16, with voices, licences and scores
  python -m omnitrain convert table Qwen3-Omni-30B-A3B-Instruct
"""


@explains_errors
def main(argv: list[str]) -> int:
    """Run one of the verbs below. Returns the exit status: 0, 1 for an error or (table) keys that do not fit."""
    parser = argparse.ArgumentParser(
        prog="omnitrain convert",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    to = "with tokenizer, processor, chat template and generation files of the model that it came from"
    for name, source, what, takes in (
        ("to-hf", "RUN_OR_DIR", f"write a model in the public layout, {to}", "a run (its last checkpoint), one of its "
         "checkpoints, or a folder in the public format"),
        ("from-hf", "DIR", "write a public folder as a run, for module.init_from, generate and talk",
         "a folder in the public format"),
        ("to-codec", "RUN", "write the codec of a run in fp16, with its voices, their licences and its scores: a "
         "folder for codec= and module.init_from=", "a run of `fit +recipe=codec` that has been scored"),
        ("to-ckpt", "RUN_OR_CKPT", "write what several processes have saved together as one file, as one process saves",
         "a run (its last checkpoint), or one of its checkpoints, that is a folder"),
        ("table", "DIR", "our tensors and the public keys, from the headers of a folder in the public format; exit "
         "status 1 if a key is unknown, missing or of another shape", "a folder in the public format"),
    ):  # fmt: skip
        verb = verbs.add_parser(name, help=what, description=what)
        verb.add_argument("source", type=Path, metavar=source, help=takes)
        if name != "table":
            kept = "a new or empty folder; an earlier conversion of the same is replaced"
            kept = "a new file" if name == "to-ckpt" else kept
            verb.add_argument("out", type=Path, metavar="OUT", help=kept)
        if name == "to-hf":
            speaks = "default: full, if the model can speak"
            verb.add_argument("--layout", choices=("full", "thinker"), help=f"with Talker, or without; {speaks}")
            rest = "full public folder that the run began as, for what it was trained without (Talker, Code2Wav)"
            kinds = ("float32", "bfloat16", "float16")
            as_began = "of the weights; default: as in the public folder that the run began as, else as stored"
            verb.add_argument("--dtype", choices=kinds, help=as_began)
            verb.add_argument("--base", type=Path, metavar="DIR", help=rest)
        if name == "to-codec":
            most = "largest file of weights, 1e6 bytes; default: 10"
            verb.add_argument("--megabytes", type=float, default=10.0, metavar="N", help=most)
    options = parser.parse_args(argv)

    if options.verb == "table":
        from omnitrain.interop.key_table import key_table

        with _progress(f"reading {printable(options.source)}") as track:
            table = key_table(options.source, track)
        return _print(table)

    from omnitrain.runs.convert import from_hf, to_ckpt, to_codec, to_hf

    with _progress(f"writing {printable(options.out)}") as track:
        if options.verb == "to-hf":
            import torch

            dtype = None if options.dtype is None else getattr(torch, options.dtype)
            to_hf(options.source, options.out, layout=options.layout, base=options.base, dtype=dtype, track=track)
        elif options.verb == "to-codec":
            to_codec(options.source, options.out, megabytes=options.megabytes)
        elif options.verb == "to-ckpt":
            to_ckpt(options.source, options.out, track=track)
        else:
            from_hf(options.source, options.out, track=track)
    print(printable(options.out))
    return 0


@contextmanager
def _progress(title: str) -> Generator[Track]:
    """A bar on stderr for each pass over the tensors; one line where that is no terminal."""
    from omnitrain.evaluation.progress import progress_bar

    with progress_bar(True) as bar:
        if not bar.console.is_terminal:
            print(title, file=sys.stderr)
        yield lambda tensors: bar.track(tensors, description="tensors")


def _print(table: KeyTable) -> int:
    """Print the table, then counts, then all that does not fit. Returns the exit status."""
    cells = [("tensor", "shape", "public key", "shape", "dtype")]
    before = ""
    for row in table.rows:
        ours = (row.name, str(row.shape)) if row.name != before else ("", "")
        cells.append((*ours, row.key, str(row.key_shape), row.dtype))
        before = row.name
    widths = [max(len(printable(line[i])) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print("  ".join(printable(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    wrong = {"unknown": table.unknown, "missing": table.missing, "of another shape": table.misshapen}
    counts = ", ".join(f"{len(keys):,} {what}" for what, keys in wrong.items())
    print(f"\n{table.tensors:,} tensors, {table.parameters:,} parameters, from {table.keys:,} public keys; {counts}")
    if table.left_out:
        print(f"{table.left_out:,} keys are of parts that config.json leaves out")
    for what, keys in wrong.items():
        for key in keys:
            print(f"{what}: {printable(key)}")
    return 1 if any(wrong.values()) else 0
