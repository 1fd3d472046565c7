"""Studies with known differences between arms, written as the runs of a study or collected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnitrain.study.results import collect_study, read_study
from omnitrain.study.spec import ARMS

MARGINS = {"text": 0.05, "vision": 0.10, "audio": 0.10}
KINDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    # modality, task, languages (the last one is written)
    ("text", "text", ("en",)),
    ("text", "t2tt", ("en", "fr")),
    ("image", "caption", ("en",)),
    ("image", "caption", ("es",)),
    ("audio", "asr", ("es", "es")),
    ("audio", "s2tt", ("es", "fr")),
    ("audio", "sound", ("en",)),
)
_SEES = {
    "text": ("text",), "vision": ("text", "image"), "audio": ("text", "audio"),
    "omni_early": ("text", "image", "audio"), "omni_late": ("text", "image", "audio"),
}  # fmt: skip


def run_record(match: str, arm: str, seed: int, **changes: Any) -> dict[str, Any]:
    parts = 1 + len(_SEES[arm])
    return {
        "arm": arm, "match": match, "seed": seed, "config_hash": "c0ffee", "data_hash": "da7a",
        "planned": {
            "steps": 100 * parts, "tokens": 50_000 * parts, "samples": {f"{m}s": 700 for m in _SEES[arm]},
            "flops": 1e12 * parts, "flops_by_part": {"thinker": 1e12 * parts},
        },
        "margins": MARGINS, "parameters": 123_456, "lr": 1e-3, "versions": {"torch": "2.13.0"},
        "seconds": 60.5 * parts, "finished": True, **changes,
    }  # fmt: skip


def simulated_items(
    match: str,
    seeds: Mapping[str, int],
    *,
    effects: Mapping[tuple[str, str], float],
    seed_sd: float,
    item_sd: float,
    concepts: int,
    rng: np.random.Generator,
) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Items of each (arm, seed). A loss is 3 + item + seed of the arm + concept of the arm + effect, in nats per token.

    Args:
        seeds: how many by arm.
        effects: (arm, modality) -> what is added, nats per token.
        seed_sd: of an arm's own deviation of a seed; that which arms share cancels.
        item_sd: of an arm's own deviation of a concept, common to its seeds.
    """
    items, same = [], np.random.default_rng(99)  # the same items in every simulation
    for modality, task, languages in KINDS:
        for c in range(concepts):
            base = float(same.normal(0, 0.5))
            for k in range(2):
                tokens = int(same.integers(3, 30))
                items.append(
                    {
                        "id": f"{modality}/{task}/{'-'.join(languages)}/{c}-{k}", "source": task, "modality": modality,
                        "split": "heldout_concept" if task == "text" else "heldout_cell", "task": task,
                        "concept": f"{task}{c}", "languages": list(languages), "tokens": tokens, "bytes": 3 * tokens,
                        "reference": "uno dos tres", "base": base, "sentence": "new",
                    }
                )  # fmt: skip
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for arm in ARMS:
        of_item = {(i["task"], i["concept"]): float(rng.normal(0, item_sd)) for i in items}
        for seed in range(seeds.get(arm, 0)):
            of_seed = {m: float(rng.normal(0, seed_sd)) for m in ("text", "image", "audio")}
            rows = []
            for item in items:
                modality = item["modality"]
                loss = 3.0 + item["base"] + of_seed[modality] + of_item[item["task"], item["concept"]]
                loss += effects.get((arm, modality), 0.0) + float(rng.normal(0, 0.05))
                loss += 0.0 if modality in _SEES[arm] else 1.5
                looks = modality != "text" and modality in _SEES[arm]
                right = item["task"] != "text" and rng.random() < 0.5
                rows.append(
                    {
                        **{key: value for key, value in item.items() if key != "base"},
                        "match": match, "arm": arm, "seed": seed, "loss": loss,
                        "swapped_loss": None if modality == "text" else loss + (0.8 if looks else 0.0),
                        "exact_match": None if item["task"] == "text" else bool(right),
                        "chrf": None if item["task"] == "text" else 100.0 if right else 20.0,
                        "prediction": None if item["task"] == "text" else "uno dos tres" if right else "uno dos",
                    }
                )  # fmt: skip
            found[arm, seed] = rows
    return found


_SCHEMA = pa.schema(
    [("match", pa.string()), ("arm", pa.string()), ("seed", pa.int64())]
    + [(name, pa.string()) for name in ("id", "source", "split", "modality", "task", "concept")]
    + [("languages", pa.list_(pa.string())), ("loss", pa.float64()), ("tokens", pa.int64()), ("bytes", pa.int64())]
    + [("exact_match", pa.bool_()), ("chrf", pa.float64()), ("swapped_loss", pa.float64())]
    + [("reference", pa.string()), ("prediction", pa.string()), ("sentence", pa.string())]
)


def items_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def write_study(
    folder: Path,
    *,
    seeds: Mapping[str, int] | int = 5,
    matches: tuple[str, ...] = ("data",),
    effects: Mapping[tuple[str, str], float] | None = None,
    seed_sd: float = 0.02,
    item_sd: float = 0.05,
    concepts: int = 12,
    random_seed: int = 0,
) -> Path:
    """Write the run folders of a simulated study and return `folder`."""
    rng = np.random.default_rng(random_seed)
    counts = dict.fromkeys(ARMS, seeds) if isinstance(seeds, int) else dict(seeds)
    for match in matches:
        simulated = simulated_items(
            match, counts, effects=effects or {}, seed_sd=seed_sd, item_sd=item_sd, concepts=concepts, rng=rng
        )
        for (arm, seed), rows in simulated.items():
            run_dir = folder / match / arm / f"seed={seed}"
            run_dir.mkdir(parents=True)
            record = run_record(match, arm, seed)
            (run_dir / "study_run.json").write_text(json.dumps(record))
            curve = [
                {
                    "match": match, "arm": arm, "seed": seed, "step": step, "tokens": 500 * step, "flops": 1e10 * step,
                    "modality": modality, "loss": 3.0 + 5.0 / (1 + k) + 0.05 * seed,
                }
                for k, step in enumerate((50, 100, 150, 200)) for modality in ("text", "image", "audio")
            ]  # fmt: skip
            pq.write_table(pa.Table.from_pylist(curve), run_dir / "curve.parquet")
            pq.write_table(items_table(rows), run_dir / "items.parquet")
    (folder / "study.json").write_text(
        json.dumps(
            {
                "config_hash": "c0ffee",
                "data_hash": "da7a",
                "configuration": {"optim": {"lr": 0.001}},
                "data": {"tokenizer": "70ce"},
            }
        )
    )
    return folder


def write_collected_study(folder: Path, out: Path, **kwargs: Any) -> Path:
    """The same, collected into `out`."""
    collect_study(read_study(write_study(folder, **kwargs)), out)
    return out
