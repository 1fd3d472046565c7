"""`omnitrain convert to-codec RUN OUT`: what is written beside the weights of a codec that is passed on.

``codec.json`` says what it is (sizes, fingerprint), how it was made (recipe, steps, voices with their licences, commit)
and how it scores: the judge's scores of its run, measures for each voice, and those of a few sentences of the embedded
voices, by which anybody can see that weights and record belong together (`measure`).
"""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from omnitrain.config.locations import PACK_SPEECH, PACKAGE
from omnitrain.config.run_config import RunConfig
from omnitrain.config.typed import plain
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.sample import BadSample
from omnitrain.data.settings import MediaLimits
from omnitrain.data.shards import SampleSource, Source
from omnitrain.data.waveforms import UtteranceReader
from omnitrain.evaluation.judges import mel_distance, missing_judges
from omnitrain.evaluation.listening import SAMPLE_RATE, read_recordings, round_trip, spoken_of
from omnitrain.evaluation.speech_scores import Spoken, score_speech
from omnitrain.files import SPEECH, read_json
from omnitrain.models.code2wav import fingerprint
from omnitrain.models.codec import Codec
from omnitrain.training.codec_losses import si_sdr

SENTENCES = 3
"""Of the embedded voices, whose measures stand in codec.json."""
PER_VOICE = 40
"""Recordings of each voice, at most, that are measured."""


def describe(codec: Codec, config: RunConfig, data: OmniDataModule, run_dir: Path, steps: int) -> dict[str, Any]:
    """What codec.json says of a codec, its weights as they were stored, from the run in `run_dir`. Raises ValueError
    where the run has not been scored, FileNotFoundError where its data are not there any more."""
    if not (run_dir / SPEECH).is_file():
        raise ValueError(f"{run_dir / SPEECH} is missing: score the run first, omnitrain test {run_dir}")
    scores = read_json(run_dir / SPEECH)
    if scores.get("judge"):  # a folder on somebody's disk says less than its name
        scores["judge"] = Path(scores["judge"]).name
    optim, module = config.optim, config.module.config
    rows: Any = config.data.config
    return {
        "codec": plain(codec.config),
        "fingerprint": fingerprint(codec.decoder),
        "parameters": sum(p.numel() for p in codec.parameters()) - codec.decoder.code_embedding.weight.numel(),
        "recipe": config.name,
        "steps": steps,
        "seed": config.seed,
        "batch": {"rows": rows.rows, "row_seconds": rows.row_seconds},
        "optim": {name: getattr(optim, name) for name in ("lr", "betas", "weight_decay", "schedule", "warmup_steps")},
        "module": {k: v for k, v in plain(module).items() if k not in ("init_from", "activation_checkpointing")},
        "started_from": None if module.init_from is None else Path(module.init_from).name,
        "voices": voices(data.opened("sources")),
        "commit": commit(),
        "omnitrain": version("omnitrain"),
        "scores": scores,
        "scores_by_voice": scores_by_voice(codec, data.opened("test_sources")),
        "sentences": measure(codec),
    }


def voices(sources: Mapping[str, Source]) -> list[dict[str, Any]]:
    """Who speaks in the sources: source, voice, languages, licence, recordings and minutes."""
    reader = UtteranceReader(sample_rate=SAMPLE_RATE, limits=MediaLimits())
    seconds: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for source in sources.values():
        for i in range(len(source)):
            try:
                sample = source[i]
                heard = reader(sample, source.media_bytes)
            except BadSample:
                continue  # training has left it out as well
            languages = ",".join(sample.languages)
            seconds[sample.source, heard.voice, languages, sample.licence].append(len(heard.wav) / SAMPLE_RATE)
    return [
        {
            "source": source, "voice": voice, "languages": languages, "licence": licence,
            "recordings": len(lengths), "minutes": round(sum(lengths) / 60, 1),
        }
        for (source, voice, languages, licence), lengths in sorted(seconds.items())
    ]  # fmt: skip


def scores_by_voice(codec: Codec, sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    """Means and 95 % intervals of what the round trip of held-out recordings loses, for each voice of the sources."""
    by_voice: dict[str, list[Spoken]] = defaultdict(list)
    for u in read_recordings(sources, PER_VOICE * 10):
        if len(by_voice[u.voice]) < PER_VOICE:
            trip = round_trip(codec, u.wav)
            by_voice[u.voice].append(spoken_of(u, generated=trip, round_trip=trip))
    without = {*missing_judges(), "pocketsphinx", "librosa"}
    found = {}
    for voice, spoken in sorted(by_voice.items()):
        scores = score_speech(spoken, without=without)
        losses = {"mel_db": scores.mel_db, "stoi": scores.stoi, "pesq": scores.pesq}
        found[voice] = {"n": scores.n} | {
            name: [round(x, 4) for x in (i.mean, i.low, i.high)] for name, i in losses.items() if i is not None
        }
    return found


def measure(codec: Codec) -> list[dict[str, Any]]:
    """Mel distance and SI-SDR, dB, of the round trip of `SENTENCES` sentences inside the package."""
    sentences = read_recordings({"pack": SampleSource(PACK_SPEECH, split="heldout_concept")}, SENTENCES)
    found = []
    for u in sentences:
        trip = round_trip(codec, u.wav)
        ratio = float(si_sdr(torch.from_numpy(trip)[None], torch.from_numpy(u.wav)[None]))
        mel = mel_distance(u.wav, trip, SAMPLE_RATE)
        found.append({"id": u.id, "mel_db": round(mel, 4), "si_sdr_db": round(ratio, 4)})
    return found


def commit() -> str | None:
    """The commit of this clone, with ``-dirty`` where something in it has been changed; None in an installation."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=40"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or None


def notice(description: Mapping[str, Any]) -> str:
    """NOTICE.md: whose voices the weights have learnt, and under which licences these are."""
    return "\n".join(_notice_lines(description))


def _notice_lines(description: Mapping[str, Any]) -> Iterator[str]:
    made_by = f"commit {description['commit']}" if description["commit"] else f"omnitrain {description['omnitrain']}"
    yield "# A codec: weights, voices and licences"
    yield ""
    yield f"Made by `python -m omnitrain convert to-codec` from a run of the recipe `{description['recipe']}`,"
    yield f"{description['steps']:,} steps, {description['parameters'] / 1e6:.1f} M parameters in fp16, {made_by}."
    yield "It was trained on the recordings below and on nothing else; `codec.json` has settings and scores."
    if (start := description["started_from"]) is not None:
        yield f"It started from `{start}`, which has a notice of its own."
    yield ""
    yield "| source | voice | languages | licence | recordings | minutes |"
    yield "|---|---|---|---|---:|---:|"
    for row in description["voices"]:
        cells = (
            row["source"],
            row["voice"],
            row["languages"],
            row["licence"],
            f"{row['recordings']:,}",
            row["minutes"],
        )
        yield "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
    yield ""
