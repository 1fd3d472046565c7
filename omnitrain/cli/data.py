"""``omnitrain data``: look at data, check every row, count it, bring one's own, turn speech into codec frames."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from omnitrain.config.errors import explains_errors
from omnitrain.config.locations import PACK
from omnitrain.files import printable, write_text

if TYPE_CHECKING:
    from omnitrain.data.sample import BadSample, Sample
    from omnitrain.data.shards import Source
    from omnitrain.data.verify import BadRow, Totals

SHOWN = 10
"""Bad rows of one reason that `verify` prints."""
PATH_HELP = "folder of shards, one shard, or a mapping (.yaml); default: the embedded pack"


@explains_errors
def main(argv: list[str]) -> int:
    """Run one of the verbs below. Returns the exit status: 0, 1 for an error or (verify) bad rows."""
    parser = argparse.ArgumentParser(prog="omnitrain data", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, run, what in (
        ("inspect", _inspect, "look at samples, here or as an HTML page"),
        ("verify", _verify, "decode every row and name each bad one; exit status 1 if there is any"),
        ("stats", _stats, "samples, tokens, seconds, pixels and languages"),
        ("import", _import, "write the data that a mapping describes to shards, media included"),
        ("answers", _answers, "write shards anew with the answers of `omnitrain predict` instead of theirs"),
        ("encode", _encode, "write shards anew with codec frames instead of recordings of speech"),
        ("pairs", _pairs, "have a Talker say texts several times, and write pairs of a better and a worse take"),
    ):
        verb = verbs.add_parser(name, help=what, description=what)
        verb.set_defaults(run=run)
        add = verb.add_argument
        if name == "import":
            add("--mapping", type=Path, required=True, help="YAML: which column is what (docs/data.md)")
            add("--out", type=Path, required=True, help="folder of the shards")
            add("--name", help="first part of the shards' names; default: the mapping's source")
            add("--limit", type=int, help="stop after so many samples")
            add("--rows-per-shard", type=int, default=10_000)
        elif name == "answers":
            add("predictions", type=Path, metavar="PREDICTIONS", help="predictions.parquet of a run")
            add("path", metavar="SHARDS", help="what was asked: folder of shards, one shard, or a mapping (.yaml)")
            add(
                "--out",
                type=Path,
                required=True,
                help="folder of the new shards, of what was answered",
            )
        elif name == "encode":
            named = "builtin, run folder of a codec, folder of `convert to-codec`, or folder of a Mimi"
            add("codec", metavar="CODEC", help=named)
            add("shards", nargs="+", metavar="SHARDS", help="folders of shards, or shards")
            add("--out", type=Path, required=True, help="folder of the new shards, which keep their names")
            add("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
            hears = "what this Thinker (a run folder, or one in the public format) hears, for module.cached_thinker"
            add("--thinker", type=Path, metavar="DIR", help=f"also write {hears}")
            add("--only-speech", action="store_true", help="leave out samples without recorded speech")
            add("--codebooks", type=int, metavar="N", help="keep the first N of the codec's codebooks; default: all")
        elif name == "pairs":
            add("talker", type=Path, metavar="RUN", help="run folder of a Talker")
            add("shards", metavar="SHARDS", help="folder of recordings whose texts are said, in their voices")
            add("--out", type=Path, required=True, help="folder of the new shards")
            add("--judge", metavar="NAME", required=True, help="Whisper model that hears the takes (evaluation.judge)")
            add("--most", type=int, metavar="N", help="texts, evenly spaced; default: all")
            add("--takes", type=int, default=4, metavar="N", help="of each text (4)")
            add("--temperature", type=float, default=0.9, metavar="T", help="of the takes (0.9)")
            add("--understood", type=float, default=0.2, metavar="WER", help="the better take's, at most (0.2)")
            add("--margin", type=float, default=0.25, metavar="X", help="by which its cost is lower (0.25)")
            add("--seed", type=int, default=0, metavar="S", help="of the takes (0)")
            add("--device", default="auto", metavar="D", help="cpu, cuda, ...; default: a GPU if there is one")
        else:
            add("path", nargs="?", default=str(PACK), help=PATH_HELP)
        if name != "import":
            add("--split", help="only this split")
            only = "only rows such as task=asr"
            add("--where", action="append", default=[], metavar="KEY=VALUE[,VALUE]", help=only)
        if name in ("import", "encode"):
            add("--max-bad-fraction", type=float, default=0.01, help="exit status 1 when more rows are bad (0.01)")
        elif name == "inspect":
            add("--rows", help="row numbers such as 0,7,20-25; default: --count rows, evenly spaced")
            add("--count", type=int, default=5, help="how many samples (5)")
            add("--html", type=Path, metavar="FILE", help="write a page instead, with players")
        elif name == "verify":
            add("--fps", type=float, default=2.0, help="frames per second of videos (2)")
            add("--threads", type=int, help="decoders at work; default: one per core")
            more = f"every bad row, as JSON lines, where a reason has more than the {SHOWN} that are printed"
            add("--bad-rows", type=Path, metavar="FILE", default="bad_rows.jsonl", help=f"{more} (bad_rows.jsonl)")
        else:
            add("--tokenizer", type=Path, help="count tokens; default: tokenizer.json beside the shards")
            add("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    return options.run(options)


def _open(options: argparse.Namespace) -> Source:
    from omnitrain.data.adapters import open_source

    return open_source(options.path, split=options.split, where=_where(options))


def _where(options: argparse.Namespace) -> dict[str, list[str]]:
    where = {}
    for condition in options.where:
        key, equals, values = condition.partition("=")
        if not equals:
            raise ValueError(f"--where {condition}: write KEY=VALUE, such as task=asr,caption")
        where[key] = values.split(",")
    return where


@contextmanager
def _progress(title: str, total: int | None) -> Generator[Callable[[], None]]:
    """A progress bar on stderr; what it gives is called after every row."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def _by_reason(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())


def _inspect(options: argparse.Namespace) -> int:
    from rich.console import Console

    from omnitrain.data.media import MediaLimits
    from omnitrain.data.sample import BadSample
    from omnitrain.data.view import html_page, sample_panel, show

    source = _open(options)
    console = Console()
    ready = []
    for index in _chosen(options.rows, options.count, len(source)):
        place = source.locate(index)
        try:
            sample = source[index]
        except BadSample as error:
            console.print(printable(f"{place[0]} row {place[1]}: {error}"), style="bold red", markup=False)
            continue
        shown = [[show(s, source.media_bytes, MediaLimits()) for s in m.segments] for m in sample.messages]
        if options.html is None:
            console.print(sample_panel(sample, place, shown, console.width))
        else:
            ready.append((sample, place, shown))
    if options.html is not None:
        write_text(options.html, html_page(source.name, len(source), ready))
        print(f"wrote {printable(options.html)} ({options.html.stat().st_size / 1e6:.1f} MB, {len(ready)} samples)")
    return 0


def _chosen(rows: str | None, count: int, total: int) -> list[int]:
    if rows is None:
        return [i * total // count for i in range(count)] if count < total else list(range(total))
    chosen: list[int] = []
    for part in rows.split(","):
        first, dash, last = part.partition("-")
        try:
            chosen += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ValueError(f"--rows {rows}: write numbers and ranges, such as 0,7,20-25") from None
    if out := [row for row in chosen if not 0 <= row < total]:
        raise ValueError(f"--rows {rows}: row {out[0]} is not among 0 .. {total - 1}")
    return chosen


def _verify(options: argparse.Namespace) -> int:
    from omnitrain.data.verify import verify

    source = _open(options)
    found: list[BadRow] = []
    reasons: Counter[str] = Counter()
    frames: Counter[str] = Counter()
    checked = verify(source, fps=options.fps, threads=options.threads, codec_frames=lambda n: frames.update(codec=n))
    with _progress(f"checking {printable(source.name)}", len(source)) as advance:
        for bad in checked:
            advance()
            if bad is not None:
                found.append(bad)
                reasons[bad.reason] += 1
                if reasons[bad.reason] <= SHOWN:
                    line = f"{bad.file} row {bad.row} id {bad.id or '?'}: {bad.reason}: {bad.detail}"
                    print(printable(line), flush=True)
    bad_rows = reasons.total()
    if max(reasons.values(), default=0) > SHOWN:
        write_text(options.bad_rows, "".join(json.dumps(asdict(bad)) + "\n" for bad in found))
        print(f"the first {SHOWN} of each reason are shown; all {bad_rows}: {printable(str(options.bad_rows))}")
    print(
        f"{printable(source.name)}: {len(source)} rows, {bad_rows} bad"
        + (f" ({_by_reason(reasons)})" if bad_rows else "")
        + (f", {frames.total()} codec frames" if frames.total() else "")
    )
    return 1 if bad_rows else 0


def _stats(options: argparse.Namespace) -> int:
    from omnitrain.data.verify import stats

    source = _open(options)
    count = None
    beside = Path(options.path) / "tokenizer.json"
    if options.tokenizer is not None or beside.is_file():
        from omnitrain.data.chat import ChatTokenizer

        path = options.tokenizer or beside
        tokenizer = ChatTokenizer.from_dir(path) if path.is_dir() else ChatTokenizer.from_file(path)
        count = lambda text: len(tokenizer.encode(text))  # noqa: E731
    with _progress(f"counting {printable(source.name)}", len(source)) as advance:
        groups = stats(source, count, advance)
    if options.json:
        rows = [dict(zip(("modality", "task", "split"), key, strict=True)) | vars(t) for key, t in groups.items()]
        print(json.dumps(rows, indent=1))
    else:
        _print_stats(source.name, groups)
    return 0


def _print_stats(name: str, groups: dict[tuple[str, str, str], Totals]) -> None:
    """One table of totals, and one of samples by language and modality; columns without any number are left out."""
    from rich.table import Column
    from rich.text import Text

    from omnitrain.data.verify import Totals
    from omnitrain.evaluation.progress import number_table, wide_console

    everything = Totals()
    by_modality: dict[str, Totals] = defaultdict(Totals)
    for (modality, _, _), total in groups.items():
        everything.merge(total)
        by_modality[modality].merge(total)
    columns = [column for column, number in _numbers(everything).items() if number]
    console = wide_console()
    texts = [Column(text, no_wrap=True, overflow="fold") for text in ("modality", "task", "split")]
    table = number_table(name, *texts, numbers=columns)
    for key, total in [*groups.items(), (("all", "", ""), everything)]:
        if key[0] == "all":
            table.add_section()
        numbers = map(_numbers(total).get, columns)
        shown = ((f"{n:,}" if isinstance(n, int) else f"{n:,.1f}") if n else "" for n in numbers)
        table.add_row(*(Text(printable(part)) for part in key), *shown)
    console.print(table)
    most = everything.languages
    modalities = [Text(printable(modality)) for modality in (*by_modality, "all")]
    table = number_table("samples by language", "language", numbers=modalities)
    for language, _ in most.most_common(20):
        counts = [total.languages[language] for total in (*by_modality.values(), everything)]
        table.add_row(Text(printable(language or "(none)")), *(f"{n:,}" if n else "" for n in counts))
    console.print(table)
    if len(most) > 20:
        print(f"and {len(most) - 20} more languages; --json lists all")


def _numbers(total: Totals) -> dict[str, float]:
    """The columns of the table of totals."""
    return {
        "samples": total.samples, "tokens": total.tokens or 0,
        "characters": total.characters if total.tokens is None else 0, "pictures": total.images,
        "Mpixel": total.image_pixels / 1e6, "sound s": total.audio_seconds, "codec frames": total.codec_frames,
        "video s": total.video_seconds, "MB": total.stored_bytes / 1e6, "bad": total.bad,
    }  # fmt: skip


def _answers(options: argparse.Namespace) -> int:
    from dataclasses import replace

    import pyarrow.parquet as pq

    from omnitrain.data.sample import Message, Segment
    from omnitrain.data.shards import write_shards

    try:
        table = pq.read_table(options.predictions, columns=["id", "source", "text"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{options.predictions} is no predictions.parquet of `omnitrain predict`: {error}") from error
    said = {(row["id"], row["source"]): row["text"] for row in table.to_pylist()}
    source = _open(options)

    def samples() -> Iterator[Sample]:
        for sample in (source[i] for i in range(len(source))):
            text = said.get((sample.id, sample.source))
            if text is None or sample.messages[-1].role != "assistant":
                continue
            stored = [
                replace(message, segments=tuple(
                    replace(s, media=source.media_bytes(s), path=None) if s.stored else s for s in message.segments
                ))
                for message in sample.messages[:-1]
            ]  # fmt: skip
            answer = Message(role="assistant", segments=(Segment(type="text", text=text),))
            yield replace(sample, messages=(*stored, answer))

    answered = samples()
    if (first := next(answered, None)) is None:
        raise ValueError(f"{options.predictions} answers none of the samples in {options.path}")
    shards = write_shards(chain([first], answered), options.out, "answers", progress=False)
    count = sum(pq.read_metadata(path).num_rows for path in shards)
    print(f"{count} of {len(source)} samples with new answers: {printable(options.out)}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from itertools import islice

    from omnitrain.data.adapters import load_mapping, stream_samples
    from omnitrain.data.shards import write_shards

    mapping = load_mapping(options.mapping)
    reasons: Counter[str] = Counter()
    good = 0

    def report(row: int, error: BadSample) -> None:
        reasons[error.reason] += 1
        if reasons[error.reason] <= 5:
            print(printable(f"{mapping.path} row {row}: {error}"), file=sys.stderr)

    def samples() -> Iterator[Sample]:
        nonlocal good
        with _progress(f"importing {printable(mapping.source)}", options.limit) as advance:
            for sample in islice(stream_samples(options.mapping, report), options.limit):
                good += 1
                yield sample
                advance()

    name = options.name or "".join(c if c.isalnum() or c in "-_." else "-" for c in mapping.source) or "data"
    usable = samples()
    if (first := next(usable, None)) is None:  # shards of an earlier import stay
        raise ValueError(f"{options.mapping}: no usable row ({_by_reason(reasons) or 'the data are empty'})")
    rows, per_shard = chain([first], usable), options.rows_per_shard
    shards = write_shards(rows, options.out, name, rows_per_shard=per_shard, progress=False)
    bad = reasons.total()
    left_out = f"; left out {bad} bad rows ({_by_reason(reasons)})" if bad else ""
    print(f"wrote {good} samples to {len(shards)} shard(s) in {printable(options.out)}{left_out}")
    print(f"next: omnitrain data verify {printable(options.out)}")
    return 1 if bad > options.max_bad_fraction * (good + bad) else 0


def _pairs(options: argparse.Namespace) -> int:
    from omnitrain.config.saved import read_config
    from omnitrain.data.shards import SampleSource
    from omnitrain.evaluation.judges import Whisper, missing_judges
    from omnitrain.evaluation.listening import known_voices
    from omnitrain.generation.speech import Speaker
    from omnitrain.runs.load import codec_fingerprint, load, load_codec, load_decoder
    from omnitrain.runs.lock import hold
    from omnitrain.runs.speech_pairs import PairMaker, PairOptions, make_pairs

    given = ("takes", "temperature", "understood", "margin", "seed")
    settings = PairOptions(**{name: getattr(options, name) for name in given})
    model, encoder = load(options.talker, device=options.device)
    codec = read_config(options.talker).codec
    if codec is None:
        raise ValueError(f"{options.talker} was trained without codec=, so that nobody knows whose codes it says")
    fingerprint = codec_fingerprint(load_codec(codec))
    speaker = Speaker(model, encoder.tokenizer, decoder=load_decoder(model, options.talker))
    source = SampleSource(options.shards, options.split, _where(options))
    voices = None if "resemblyzer" in missing_judges() else known_voices((), {"shards": source})
    maker = PairMaker(speaker, fingerprint, Whisper(options.judge), voices, settings)
    made_with = {"run": str(options.talker), "shards_of": str(options.shards), "codec": fingerprint}
    try:
        with hold(options.out):
            made = {"made_with": made_with, "most": options.most, "progress": _progress}
            counts = make_pairs(maker, source, options.out, **made)
    except KeyboardInterrupt:
        print("interrupted; the same line continues behind the last whole shard", file=sys.stderr)
        return 130
    print(
        f"{counts.pairs} pairs of {counts.texts} texts in {printable(options.out)}: of {counts.takes} takes "
        f"{counts.wer / max(1, counts.takes):.1%} word errors on average, {counts.failed} failed; {counts.bad} bad rows"
    )
    return 0 if counts.pairs else 1


def _encode(options: argparse.Namespace) -> int:
    from omnitrain.runs.encode_shards import encode
    from omnitrain.runs.load import load, load_codec
    from omnitrain.runs.lock import hold

    codec = load_codec(options.codec)
    thinker = None if options.thinker is None else load(options.thinker)
    try:
        with hold(options.out):
            counts = encode(
                codec,
                options.shards,
                options.out,
                split=options.split,
                where=_where(options),
                thinker=thinker,
                only_speech=options.only_speech,
                codebooks=options.codebooks,
                workers=options.workers,
                progress=_progress,
            )
    except KeyboardInterrupt:
        print("interrupted; the same line continues behind the last whole shard", file=sys.stderr)
        return 130
    rows = counts.samples + counts.copied + counts.bad
    return 1 if counts.bad > options.max_bad_fraction * rows else 0
