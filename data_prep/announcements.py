"""Sentences joined from a telephone exchange's prompts, as the exchange itself joins them: a real voice that says
thousands of sentences of a small vocabulary.

    python -m data_prep.announcements data/voices --sentences 1500 --out data/announcements

`data_prep.voices` made the folder; of its voices, those that recorded Asterisk's prompts say numbers, days, letters
and pieces like "you have", "new messages". A grammar for each language draws a sentence ("you have twenty seven new
messages"), and the prompts' recordings are laid one behind the other with short pauses, whose lengths are drawn: words
and voice are real, the melody is that of announcements. Rows are those of `data_prep.voices`, with the source
``announcements/VOICE``. The split is a hash of the sentence: a held-out sentence (5 %) is said by no voice in training,
but each of its words is. So results on it show that a model reads a text; that it says a new word they do not show.
Beside them stand fragments of one to three prompts ("twenty seven new"), for training alone: from these a Talker learns
what each word sounds like, before it has to know which word's turn it is. ``tokenizer.json`` is a BPE of the training
texts, in which each word is a token.

All of a voice's prompts are used, on whichever side of `data_prep.voices`' split they stand: who trains on both has no
held-out words left there.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.edit import trim_silence
from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.splits import document_split, sentence_key
from data_prep.synthetic_speech import request_and_speech
from data_prep.tokenizer import training_texts
from data_prep.voices import carry_notices
from omnitrain.data.chat import train_bpe
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import Sample
from omnitrain.data.shards import SampleSource, write_shards

NAME = "announcements"
RATE = 16_000
"""Hz of Asterisk's prompts."""
PAUSES = (0.03, 0.15)
"""Seconds between prompts, shortest and longest."""
MARGIN = 0.03
"""Seconds of quiet that a prompt keeps at either end inside a sentence."""

Prompts = list[str]
"""Texts of prompts, in the order in which they are said."""

# ---------------------------------------------------------------------------------------------------------- languages


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ENGLISH_ONES = _list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_ENGLISH_TENS = _list("twenty thirty forty fifty sixty seventy eighty ninety")


def english_number(number: int) -> Prompts:
    """0 to 999, as Asterisk says it."""
    if number >= 100:
        rest = english_number(number % 100) if number % 100 else []
        return [_ENGLISH_ONES[number // 100], "hundred", *rest]
    if number < 20:
        return [_ENGLISH_ONES[number]]
    return [_ENGLISH_TENS[number // 10 - 2], *([_ENGLISH_ONES[number % 10]] if number % 10 else [])]


def plain_number(words: str) -> Callable[[int], Prompts]:
    """Numbers that are one prompt each: those of `words`, by their places."""
    prompts = _list(words)
    return lambda number: [prompts[number]]


@dataclass(frozen=True)
class Language:
    """How a language's exchange speaks.

    patterns: texts of prompts and, in braces, slots: ``{number}``, ``{digits}`` (three to five of 0 to 9) and the keys
    of `lists`.  number: the prompts of 0 to `highest`.  counts: the smallest number that stands before a plural.
    """

    patterns: tuple[tuple[str, ...], ...]
    lists: Mapping[str, tuple[str, ...]]
    number: Callable[[int], Prompts]
    highest: int
    counts: int = 2


LANGUAGES: dict[str, Language] = {
    "en": Language(
        patterns=(
            ("you have", "{number}", "new", "messages"),
            ("you have", "{number}", "old", "messages"),
            ("the number i have is", "{digits}"),
            ("message from extension", "{digits}"),
            ("message from phone number", "{digits}"),
            ("the person at extension", "{digits}", "is unavailable"),
            ("there are currently", "{number}", "other participants in the conference"),
            ("hold time", "{number}", "minutes"),
            ("{number}", "minutes", "{number}", "seconds"),
            ("{number}", "dollars"),
            ("{number}", "percent"),
            ("{day}", "{month}", "{ordinal}"),
            ("{when}", "at", "{hour}", "o'clock"),
            ("{day}", "at", "{hour}", "{minute}"),
            ("incoming call from", "{spelled}", "{spelled}", "{spelled}"),
        ),
        lists={
            "day": _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
            "month": _list("January February March April May June July August September October November December"),
            "ordinal": _list("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"),
            "when": _list("today tomorrow yesterday"),
            "hour": tuple(_ENGLISH_ONES[1:13]),
            "minute": ("fifteen", "thirty", "ten", "twenty", "forty", "fifty"),
            "spelled": _list(
                "alpha bravo charlie delta echo foxtrot golf india juliet kilo mike oscar papa romeo tango"
            ),
        },
        number=english_number,
        highest=999,
    ),
    "fr": Language(
        patterns=(
            ("vous avez", "{number}", "messages"),
            ("{number}", "minutes"),
            ("{number}", "heures"),
            ("du poste", "{digits}"),
            ("appuyez sur", "{digits}"),
            ("{day}", "{number}", "{month}"),
            ("{when}", "{number}", "heures"),
            ("{spelled}", "{spelled}", "{spelled}"),
        ),
        lists={
            "day": _list("lundi mardi mercredi jeudi vendredi samedi dimanche"),
            "month": _list("janvier février avril mai juin juillet août septembre octobre novembre décembre"),
            "when": ("aujourd'hui", "demain", "hier"),
            "spelled": _list("alpha bravo charlie delta echo foxtrot golf india kilo oscar papa romeo tango victor"),
        },
        number=plain_number(
            "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "
            "dix-huit dix-neuf vingt"
        ),
        highest=20,
    ),
    "it": Language(
        patterns=(
            ("hai", "{number}", "nuovi", "messaggi"),
            ("hai", "{number}", "vecchi", "messaggi"),
            ("{number}", "minuti"),
            ("interno", "{digits}"),
            ("{day}", "{number}", "{month}"),
            ("{when}", "alle", "ore", "{number}"),
            ("{number}", "dollari"),
        ),
        lists={
            "day": _list("lunedì martedì mercoledì giovedì venerdì sabato domenica"),
            "month": _list(
                "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre"
            ),
            "when": _list("oggi domani ieri"),
        },
        number=plain_number(
            "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici tredici quattordici quindici "
            "sedici diciassette diciotto diciannove venti"
        ),
        highest=20,
    ),
    "es": Language(
        patterns=(
            ("usted tiene", "{number}", "mensajes", "nuevos"),
            ("usted tiene", "{number}", "mensajes", "viejos"),
            ("{number}", "minutos"),
            ("la extensión", "{digits}"),
            ("{day}", "{number}", "de", "{month}"),
            ("{when}", "a las", "{hour}", "en punto"),
            ("marque", "{digits}"),
        ),
        lists={
            "day": _list("lunes martes miércoles jueves viernes sábado domingo"),
            "month": _list("enero febrero abril mayo junio julio agosto septiembre octubre noviembre diciembre"),
            "when": _list("hoy mañana ayer"),
            "hour": _list("dos tres cuatro cinco seis siete ocho nueve diez once doce"),
        },
        number=plain_number(
            "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis "
            "diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis "
            "veintisiete veintiocho veintinueve"
        ),
        highest=29,
    ),
    "ru": Language(
        patterns=(
            ("у вас", "{number}", "новых", "сообщений"),
            ("у вас", "{number}", "старых", "сообщений"),
            ("{number}", "минут"),
            ("{number}", "часов"),
            ("внутренний номер", "{digits}"),
            ("{day}", "{ordinal}", "{month}"),
            ("{when}", "{number}", "часов"),
        ),
        lists={
            "day": _list("понедельник вторник среда четверг пятница суббота воскресенье"),
            "month": _list("января февраля марта апреля мая июня июля августа сентября октября ноября декабря"),
            "ordinal": _list("первый второй третий четвертый пятый седьмой восьмой девятый десятый двенадцатый"),
            "when": _list("сегодня завтра вчера"),
        },
        number=plain_number(
            "ноль один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать тринадцать "
            "четырнадцать пятнадцать шестнадцать семнадцать восемнадцать девятнадцать двадцать"
        ),
        highest=20,
        counts=5,
    ),
}


def prompt_key(text: str) -> str:
    """A prompt's text without case, punctuation and accents, which transcripts of prompts often lack."""
    letters = unicodedata.normalize("NFKD", sentence_key(text))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _slot(name: str, language: Language, said: Collection[str], drawn: random.Random) -> Prompts:
    """The prompts of one slot; only such as the voice has recorded."""

    def there(prompts: Prompts) -> bool:
        return all(prompt_key(prompt) in said for prompt in prompts)

    if name == "digits":
        digits = [n for n in range(10) if there(language.number(n))]
        return [prompt for _ in range(drawn.randint(3, 5)) for prompt in language.number(drawn.choice(digits))]
    if name == "number":
        # Small numbers as often as large ones, though there are more of these.
        below = drawn.choice([n for n in (21, 100, 1_000) if n <= language.highest + 1])
        numbers = [n for n in range(language.counts, below) if there(language.number(n))]
        return language.number(drawn.choice(numbers))
    return [drawn.choice([word for word in language.lists[name] if there([word])])]


def drawn_sentence(number: int, language: Language, said: Collection[str]) -> Prompts:
    """The sentence that `number` draws, of prompts whose keys (`prompt_key`) are `said`."""
    drawn = random.Random(f"{NAME}/{number}")
    patterns = [p for p in language.patterns if all("{" in part or prompt_key(part) in said for part in p)]
    found: Prompts = []
    for part in drawn.choice(patterns):
        found += _slot(part[1:-1], language, said, drawn) if part.startswith("{") else [part]
    return found


def sentences(language: Language, said: Collection[str]) -> Iterator[Prompts]:
    """Different sentences, always in the same order; it ends after 200,000 draws."""
    seen: set[str] = set()
    for number in range(200_000):
        drawn = drawn_sentence(number, language, said)
        if (text := " ".join(drawn)) not in seen:
            seen.add(text)
            yield drawn


def fragments(language: Language, said: Collection[str]) -> Iterator[Prompts]:
    """Different pieces of one to three prompts of such sentences, always in the same order, so that each prompt is said
    about as often as any other: ordinals and months are rare in sentences, digits are not. Those of which the hash
    makes a held-out sentence are left out. It ends when all pieces of 6,000 draws are there."""
    pieces: dict[str, Prompts] = {}
    for number in range(6_000):
        prompts = drawn_sentence(number, language, said)
        drawn = random.Random(f"{NAME}/fragments/{number}")
        length = min(len(prompts), drawn.randint(1, 3))
        start = drawn.randint(0, len(prompts) - length)
        piece = prompts[start : start + length]
        if document_split(sentence_key(text := " ".join(piece))) == "train":
            pieces.setdefault(text, piece)
    # Next is the one whose prompts have been said least; of several, the first drawn. Counts only grow: what was the
    # least and still has its count is the least.
    left, times = [(0.0, place, piece) for place, piece in enumerate(pieces.values())], Counter[str]()
    while left:
        said_before, place, piece = left[0]
        now = sum(times[prompt] for prompt in piece) / len(piece)
        if now > said_before:
            heapq.heapreplace(left, (now, place, piece))
            continue
        heapq.heappop(left)
        times.update(piece)
        yield piece


def joined(prompts: Prompts, said: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 [T] at `RATE`: the prompts' recordings, with pauses that their texts draw."""
    drawn = random.Random(f"{NAME}/pauses/{' '.join(prompts)}")
    pieces: list[np.ndarray] = []
    for prompt in prompts:
        pieces += [said[prompt_key(prompt)], np.zeros(round(drawn.uniform(*PAUSES) * RATE), np.float32)]
    return np.concatenate(pieces[:-1])


def prompts_of(folder: Path, voice: str) -> tuple[dict[str, np.ndarray], Sample]:
    """By `prompt_key` each prompt of a voice, float32 [T] at `RATE` (the shortest of those with one text), and a row of
    the voice. Raises ValueError: there is no such voice."""
    source = SampleSource(folder, where={"source": f"voices/{voice}"})
    if not len(source):
        raise ValueError(f"{folder} has no recordings of {voice}; `python -m data_prep.voices` makes them")
    said: dict[str, np.ndarray] = {}
    for row in (source[index] for index in range(len(source))):
        speech = next(segment for segment in row.segments if segment.type == "speech")
        wave = trim_silence(decode_audio(source.media_bytes(speech), RATE), RATE, margin=MARGIN)
        key = prompt_key(speech.text or "")
        if key not in said or len(wave) < len(said[key]):
            said[key] = wave
    return said, source[0]


def sample(like: Sample, text: str, wave: np.ndarray, kind: str) -> Sample:
    """The row that asks the voice of `like` for a text; `wave` float32 [T] at `RATE`. `kind`: sentence or fragment."""
    voice = like.meta["voice"]
    sample_id = f"{NAME}/{voice}/{text}" if kind == "sentence" else f"{NAME}/{voice}/{kind}/{text}"
    return Sample(
        id=sample_id,
        source=f"{NAME}/{voice}",
        messages=request_and_speech(sample_id, text, encode_audio(wave, RATE, "flac")),
        split=document_split(sentence_key(text)),
        task="tts",
        licence=like.licence,
        languages=like.languages,
        concept=text,
        meta={"voice": voice, "joined": kind},
    )


def _build(_: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import Progress

    if unknown := [voice for voice in options.voices if language_of(voice) not in LANGUAGES]:
        raise ValueError(f"--voices {' '.join(unknown)}: there are grammars for {', '.join(LANGUAGES)} alone")

    def rows() -> Iterator[Sample]:
        with Progress(disable=not options.progress) as progress:
            for voice in options.voices:
                said, like = prompts_of(options.folder, voice)
                language = LANGUAGES[language_of(voice)]
                drawn = [("sentence", prompts) for prompts in islice(sentences(language, said), options.sentences)]
                drawn += [("fragment", prompts) for prompts in islice(fragments(language, said), options.fragments)]
                for kind, prompts in progress.track(drawn, description=voice):
                    row = sample(like, " ".join(prompts), joined(prompts, said), kind)
                    texts.update(dict.fromkeys(training_texts([row])))
                    yield row

    texts: dict[str, None] = {}
    write_shards(counts.watch(rows()), options.out, NAME, rows_per_shard=4_000, progress=False)
    train_bpe(texts, options.vocabulary).save(options.out / "tokenizer.json")
    made = (
        f"Made by `python -m data_prep.{NAME}`: recordings of single prompts, joined to sentences with pauses between."
    )
    carry_notices(options.out, [options.folder], f"# Announcements: sources and licences\n\n{made}")


def language_of(voice: str) -> str:
    return voice.rpartition("_")[2]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of shards by data_prep.voices")
    parser.add_argument(
        "--voices", nargs="+", default=[f"asterisk_{language}" for language in LANGUAGES], help="as in: asterisk_en"
    )
    parser.add_argument(
        "--sentences", type=int, default=1_500, help="of each voice (1,500), fewer where there are fewer"
    )
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens at most (4,096)")
    parser.add_argument("--fragments", type=int, default=700, help="of each voice (700), to train on")


def main(argv: list[str] | None = None) -> int:
    return run(argv, name=NAME, description=__doc__ or "", packages=[], build=_build, add_options=_add_options)


if __name__ == "__main__":
    sys.exit(main())
