"""Spoken dialogues about pictures: somebody asks, in writing or aloud, for a number that stands in a picture, and a
real voice answers.

    python -m data_prep.dialogues data/announcements --out data/dialogues

Of the announcements (`data_prep.announcements`) of an English voice, those that say digits ("message from extension six
one nine") are answers. The picture has the digits, dark over a light ground with lines in it; which of four sentences
is wanted, the question says alone. Half of the questions are text, half are spoken, by synthetic voices of flite, of
which one (``--heldout-asker``) is never heard in training: its questions are held-out cells. Sentences are on the side
of the split on which the announcements have them, so a held-out number is answered by no voice in training.

Some hundred sentences are soon known by heart, and who knows how they go on does not look at the picture. So
``--written`` more dialogues, about drawn numbers that are in none of the sentences, are asked and answered in writing
alone: the Thinker learns to read from these, as it reads more than anybody says in any omni-modal model.

**Pictures and questions are made by a program**; the answers' voice is real. They serve to show a whole dialogue: what
a model sees and hears decides what it writes, and what it writes is what it says.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_prep.announcements import LANGUAGES
from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.splits import fraction
from data_prep.synthetic_speech import Studio, Voice, add_engine_options, packages, parse_voices, write_notice
from data_prep.tokenizer import training_texts
from data_prep.voices import carry_notices
from omnitrain.data.chat import train_bpe
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards

NAME = "dialogues"
QUESTIONS: dict[str, tuple[str, ...]] = {
    "the number i have is": ("Which number do you have?", "Tell me your number.", "What number is yours?"),
    "message from extension": (
        "Which extension left a message?", "Whose message is it?", "From which extension is the message?"
    ),
    "message from phone number": (
        "Which phone left a message?", "From what telephone was the call?", "What telephone number was it?"
    ),
    "the person at extension": ("Who is unavailable?", "Who is away?", "Which person is not there?"),
}  # fmt: skip
"""By how its answer begins, what may be asked."""
MOST_DIGITS = 5
"""Of drawn numbers; the short ones are what reading begins with."""
DIGITS = LANGUAGES["en"].number
SIZE = (160, 64)
"""Of a picture, pixels."""


def digits_of(text: str) -> str:
    """The digits that a sentence says, in order."""
    names = {DIGITS(n)[0]: str(n) for n in range(10)}
    return "".join(names[word] for word in text.split() if word in names)


def picture(digits: str, seed: str) -> bytes:
    """A PNG with `digits` from left to right: sizes, slants, heights and colours are drawn from `seed`."""
    drawn = random.Random(seed)
    ground = [drawn.randint(170, 255) for _ in range(3)]
    image = Image.new("RGB", SIZE, tuple(ground))
    canvas = ImageDraw.Draw(image)
    for _ in range(6):  # what else is there
        a, b = ((drawn.randint(0, SIZE[0]), drawn.randint(0, SIZE[1])) for _ in range(2))
        canvas.line([a, b], fill=tuple(min(255, max(0, c + drawn.randint(-40, 40))) for c in ground), width=3)
    width = SIZE[0] / max(5, len(digits))
    for place, digit in enumerate(digits):
        size = drawn.randint(30, 40)
        tile = Image.new("L", (48, 48))
        ImageDraw.Draw(tile).text((24, 24), digit, fill=255, font=ImageFont.load_default(size), anchor="mm")
        tile = tile.rotate(drawn.uniform(-12, 12), Image.Resampling.BILINEAR)
        shade = [drawn.randint(0, 70) for _ in range(3)]
        x = round((place + 0.5) * width - 24 + drawn.uniform(-2, 2))
        image.paste(tuple(shade), (x, drawn.randint(2, SIZE[1] - 50)), tile)
    encoded = BytesIO()
    image.save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def question_of(text: str) -> tuple[str, ...]:
    """What may be asked for the answer `text`; nothing if it is no answer to a question here."""
    return next((asked for begin, asked in QUESTIONS.items() if text.startswith(begin)), ())


def dialogue(answer: Segment, like: Sample, number: int, aloud: tuple[Voice, bytes] | None, question: str) -> Sample:
    """A row: picture and question, and `answer`, speech or text, with the licence and on the side of `like`. `aloud`:
    who asks, and how it sounds."""
    assert answer.text is not None
    by = "text" if aloud is None else aloud[0].key
    asked = Segment(type="text", text=question)
    if aloud is not None:
        asked = Segment(type="audio", text=question, media=aloud[1])
    voice = {"voice": like.meta["voice"]} if answer.type == "speech" else {}
    name = f"{NAME}/{voice.get('voice', 'written')}/{answer.text}/{number}"
    shown = Segment(type="image", media=picture(digits_of(answer.text), name))
    return Sample(
        id=name,
        source=f"{NAME}/{('text' if aloud is None else 'aloud') if voice else 'written'}",
        messages=(Message(role="user", segments=(shown, asked)), Message(role="assistant", segments=(answer,))),
        split=like.split,
        task="dialogue",
        licence=like.licence,
        languages=("en",),
        concept=answer.text,
        meta={**voice, "asked_by": by, "asked": question},
    )


def drawn_sentence(number: int) -> str:
    """A sentence about a drawn number, the same for the same `number`."""
    drawn = random.Random(f"{NAME}/{number}")
    digits = " ".join(DIGITS(drawn.randrange(10))[0] for _ in range(drawn.randint(1, MOST_DIGITS)))
    begin = drawn.choice(sorted(QUESTIONS))
    return f"{begin} {digits}" + " is unavailable" * (begin == "the person at extension")


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    voices = parse_voices(options.voices)
    if options.heldout_asker not in {voice.key for voice in voices} or len(voices) < 2:
        raise ValueError(f"--heldout-asker {options.heldout_asker}: one of two or more --voices, not {options.voices}")
    source = SampleSource(options.folder, where={"source": f"announcements/{options.answers_by}"})
    rows = [source[i] for i in range(len(source))]
    answers = [row for row in rows if row.meta["joined"] == "sentence" and question_of(row.concept)]
    if not answers:
        raise ValueError(f"{options.folder} has no announcement of {options.answers_by} that says digits")
    studio = Studio(voices, opened, options.cache)
    asked = sorted({question for questions in QUESTIONS.values() for question in questions})
    spoken = {
        (voice, question): next(s for s in studio.record(voice, question).segments if s.type == "speech").media or b""
        for voice in voices
        for question in asked
    }

    def ask(answer: Segment, like: Sample, number: int, aloud: float) -> Sample:
        drawn = partial(fraction, NAME, answer.text or "", str(number))
        questions = question_of(answer.text or "")
        question = questions[int(drawn("question") * len(questions))]
        asker = voices[int(drawn("asker") * len(voices))] if drawn("aloud") < aloud else None
        sound = None if asker is None else (asker, spoken[asker, question])
        made = dialogue(answer, like, number, sound, question)
        texts.update(dict.fromkeys(training_texts([made])))
        return held_out(made) if asker is not None and asker.key == options.heldout_asker else made

    def dialogues() -> Iterator[Sample]:
        for row in track(answers, description=NAME, disable=not options.progress):
            said = next(segment for segment in row.segments if segment.type == "speech")
            answer = Segment(type="speech", text=said.text, media=source.media_bytes(said))
            for number in range(options.each):
                yield ask(answer, row, number, options.aloud)
        known = {row.concept for row in answers}
        like = replace(answers[0], split="train")
        for number in track(range(options.written), description="written", disable=not options.progress):
            text = drawn_sentence(number)
            if text not in known:
                yield ask(Segment(type="text", text=text), like, number, aloud=0)

    texts: dict[str, None] = {}
    write_shards(counts.watch(dialogues()), options.out, NAME, rows_per_shard=4_000, progress=False)
    texts.update(dict.fromkeys(training_texts(row for row in rows)))
    train_bpe(texts, options.vocabulary).save(options.out / "tokenizer.json")
    write_notice(options.out, opened, studio.minutes, "Questions", NAME)
    carry_notices(options.out, [options.folder], (options.out / "NOTICE.md").read_text())


def held_out(row: Sample) -> Sample:
    """A row that would be trained on, as a held-out cell."""
    return replace(row, split="heldout_cell") if row.split in ("train", "validation") else row


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of shards by data_prep.announcements")
    parser.add_argument("--answers-by", default="asterisk_en", help="whose announcements are the answers (asterisk_en)")
    parser.add_argument("--voices", default="slt,rms,kal16,awb", help="who asks: voices of flite")
    parser.add_argument("--heldout-asker", default="awb", help="who is not heard in training (awb)")
    parser.add_argument("--aloud", type=float, default=0.5, help="share of the questions that are spoken (0.5)")
    parser.add_argument("--each", type=int, default=4, help="pictures of each answer (4)")
    parser.add_argument("--written", type=int, default=12_000, help="pictures answered in writing alone (12,000)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens at most (4,096)")
    add_engine_options(parser)


def main(argv: list[str] | None = None) -> int:
    return run(argv, name=NAME, description=__doc__ or "", packages=packages, build=_build, add_options=_add_options)


if __name__ == "__main__":
    sys.exit(main())
