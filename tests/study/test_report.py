"""The page of a study says what the numbers say, shows what is missing, and needs nothing from outside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnitrain.cli.report import main
from omnitrain.config.locations import PACK
from omnitrain.data.shards import SampleSource
from omnitrain.evaluation.heldout import PREDICTIONS_SCHEMA
from omnitrain.evaluation.scores import scores_of
from omnitrain.reports.chain import StageRecord, write_stages_report
from omnitrain.reports.comparison import compare_runs, write_comparison
from omnitrain.study.fingerprint import sentences
from omnitrain.study.report import write_study_report
from omnitrain.study.results import read_study
from omnitrain.study.verdicts import main_table
from tests.study.simulated_study import simulated_items, write_study

OUTSIDE = re.compile(r"""(?:src|href|url|@import)\s*[=(]\s*["']?\s*(?:https?:)?//""", re.IGNORECASE)
COMMITTED = Path(__file__).parents[2] / "docs/results/nondegradation"
SECTIONS = ("answer", "forest", "curves", "cells", "details", "cost", "repeat")


@pytest.fixture(scope="module")
def study_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Early mixing costs the pictures 0.4; one run of the compute-matched ones is not finished."""
    folder = write_study(
        tmp_path_factory.mktemp("study"),
        seeds=3,
        matches=("data", "compute"),
        effects={("omni_early", "image"): 0.4},
        concepts=6,
        item_sd=0.02,
    )
    (folder / "compute/audio/seed=1/items.parquet").unlink()
    return folder


@pytest.fixture(scope="module")
def page(study_dir: Path) -> str:
    path, _ = write_study_report(study_dir)
    assert path == study_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_everything_is_on_the_page(page: str) -> None:
    assert [s for s in SECTIONS if f'id="{s}"' not in page] == []
    assert not OUTSIDE.search(page)
    assert page.count("<svg") == 1 + 4 + 2 * 3  # forest; curves over tokens and operations; losses and two scores
    for text in (
        "match=compute arm=audio: seed 1 not finished", "c0ffee", "da7a", "2.13.0", "123,456", "29 of 30",
        "python -m omnitrain fit -m +recipe=nondegradation arm=text,vision,audio,omni_early,omni_late match=data "
        "seed=0,1,2", "3 seeds, the interval is wide", "Media swap".lower(), "word error rate", "held-out cell",
    ):  # fmt: skip
        assert text in page, text


def test_bad_news_stand_as_plainly_as_good_news(page: str, study_dir: Path) -> None:
    study = read_study(study_dir)
    scores = scores_of(study.items)
    verdicts = [
        d.verdict for match in study.matches for c in main_table(study, scores, match) for d in c.differences.values()
    ]
    for verdict in ("no worse", "worse", "not decided"):
        assert len(re.findall(rf'<strong class="\w+">{verdict}</strong>', page)) == verdicts.count(verdict)
    assert verdicts.count("worse") == 2
    table = (study_dir / "table.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| vision")]
    assert [
        re.search(r"\| (no worse|worse|not decided); measurably worse than the vision arm", r)[1] for r in rows
    ] == [
        "worse",
        "worse",
    ]  # ty: ignore[not-subscriptable]


def test_the_table_has_the_numbers(study_dir: Path, page: str) -> None:
    study = read_study(study_dir)
    vision = next(c for c in main_table(study, scores_of(study.items), "data") if c.row.name == "vision")
    estimate = vision.differences["omni_early"].estimate
    shown = f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]".replace("-", "−")
    assert shown in (study_dir / "table.md").read_text(encoding="utf-8")
    assert f"{vision.arms['vision'].value:.3f}" in page


def test_collected_files_give_the_same_table(study_dir: Path, page: str, tmp_path: Path) -> None:
    assert main(["--study", str(study_dir), "--collect", str(tmp_path / "results")]) == 0
    names = {p.name for p in (tmp_path / "results").iterdir()}
    assert names == {"items.parquet", "curves.parquet", "runs.json", "study.json", "report.html", "table.md"}
    told = json.loads((tmp_path / "results/runs.json").read_text())
    assert [(r["match"], r["arm"], r["seed"]) for r in told if not r["finished"]] == [("compute", "audio", 1)]
    again, _ = write_study_report(tmp_path / "results", tmp_path / "again" / "page.html")
    table = (study_dir / "table.md").read_text()
    assert (tmp_path / "results/table.md").read_text() == table == (tmp_path / "again/table.md").read_text()
    place = re.compile(r"Folder \w+|--study \w+")
    assert place.sub("", again.read_text()) == place.sub("", page)


def test_the_committed_table_is_that_of_the_committed_items(tmp_path: Path) -> None:
    """And the sentences that arms have read are those of the data inside the package."""
    write_study_report(COMMITTED, tmp_path / "page.html")
    assert (tmp_path / "table.md").read_text() == (COMMITTED / "table.md").read_text()
    study = read_study(COMMITTED)
    sources = study.configuration["configuration"]["data"]["sources"].values()
    opened = [SampleSource(PACK, source["split"], source["where"]) for source in sources]
    assert study.items["sentence"].to_pylist() == sentences(study.items["reference"].to_pylist(), opened)
    answers = {sample.reference for source in opened for sample in map(source.__getitem__, range(len(source)))}
    same = [sentence for sentence, text in zip(*(study.items[c].to_pylist() for c in ("sentence", "reference")),
            strict=True) if text in answers]  # fmt: skip
    assert set(same) == {"read"}


def test_a_report_can_be_made_at_the_very_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path, seeds={"text": 1}, concepts=2)
    (tmp_path / "data/text/seed=0/items.parquet").unlink()
    assert main(["--study", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert "missing: match=data arm=text: seed 0 not finished" in told
    assert "missing: match=data arm=omni_late: seed 0 not begun" in told
    assert "missing: match=compute: no run has begun" in told
    page = (tmp_path / "report.html").read_text()
    assert "No run of this matching is finished yet." in page
    assert "No run is finished yet." in (tmp_path / "table.md").read_text()


def test_one_seed_gives_no_interval(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=1, concepts=2)
    page = write_study_report(tmp_path)[0].read_text()
    assert "[no interval]" in page
    assert page.count('<strong class="soft">not decided</strong>') == 6


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--study", str(tmp_path)]) == 1
    assert "holds no run of a study" in capsys.readouterr().err
    for arguments, message in (
        ([], "give the folder of a run"),
        (["run", "--study", "x"], "give the folder of a run"),
        (["run", "--collect", "x"], "--collect is for a study"),
        (["a", "b"], "need --out"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    write_study(tmp_path, seeds={"text": 2}, concepts=2)
    path = tmp_path / "data/text/seed=1/study_run.json"
    path.write_text(path.read_text().replace("c0ffee", "0ther"))
    assert main(["--study", str(tmp_path)]) == 1
    assert "different configuration" in capsys.readouterr().err


# --- several runs ---


def write_run(folder: Path, rows: list[dict], *, lr: float) -> Path:
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: fancy\noptim: {{lr: {lr}}}\npaths: {{run_dir: {folder}}}\n")
    (folder / "metrics.csv").write_text(
        "step,train/loss/image,validation/loss/image,seen/tokens\n1,5,,100\n2,4,4.5,200\n3,3,3.5,300\n"
    )
    predictions = [{**dict.fromkeys(PREDICTIONS_SCHEMA.names), **row} for row in rows]
    for row in predictions:
        for name in ("match", "arm", "seed", "sentence"):
            row.pop(name)
    pq.write_table(pa.Table.from_pylist(predictions, schema=PREDICTIONS_SCHEMA), folder / "eval/predictions.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two runs that differ by 0.4 on pictures, and one that was never tested."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(3)
    effects = {("omni_late", "image"): 0.4}
    simulated = simulated_items(
        "data", {"omni_early": 1, "omni_late": 1}, effects=effects, seed_sd=0.0, item_sd=0.02, concepts=15, rng=rng
    )
    first = write_run(folder / "first", simulated["omni_early", 0], lr=0.1)
    second = write_run(folder / "second", simulated["omni_late", 0][1:], lr=0.2)
    third = folder / "third"
    third.mkdir()
    (third / "config.yaml").write_text("name: fancy\noptim: {lr: 0.1}\n")
    return first, second, third


def test_runs_side_by_side(runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.html"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    told = capsys.readouterr().err
    assert "third: held-out scores" in told
    page = out.read_text(encoding="utf-8")
    assert not OUTSIDE.search(page)
    assert page.count("<svg") == 2
    assert "second − first" in page
    assert re.search(r"<td>optim.lr</td><td[^>]*>0.1</td><td[^>]*>0.2</td><td[^>]*>0.1</td>", page)
    assert "paths.run_dir" not in page
    assert "up to 1 items" in page  # the one that the second lacks
    assert re.search(r'<span class="warn">\+0\.4\d\d</span>', page)  # pictures


def test_stages_are_compared_with_the_one_before(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """What the second stage has lost is coloured there, and what the last one regained is there, too, though it
    scores as the first does; a stage without scores between them is no base."""
    first, second, without = runs
    stages = {"pretrained": first, "sft": second, "codes": without, "gspo": first}
    records = [StageRecord(name=n, command=f"fit {n}", folder=f, finished=True) for n, f in stages.items()]
    page = write_stages_report(tmp_path, records)[0].read_text(encoding="utf-8")
    assert "gspo − before" in page
    [row] = re.findall(r"<tr><td>[^\n]*image</td><td[^>]*>all</td>\s*<td[^>]*>nats per token.*?</tr>", page, re.DOTALL)
    assert re.findall(r'class="(\w*)">([+−])0\.4\d\d', row) == [("warn", "+"), ("good", "−")]
    said = [
        {r["id"]: r["prediction"] for r in pq.read_table(f / "eval/predictions.parquet").to_pylist()} for f in runs[:2]
    ]
    asked = re.findall(r'<td class="left wrap">uno dos tres</td>\s*' + r'<td class="left wrap">([^<]*)</td>' * 3, page)
    assert len(asked) >= 4
    for answers in asked:
        pairs = {(said[0][id], said[1][id], said[0][id]) for id in said[1]}
        assert answers in pairs


def test_a_few_concepts_make_no_difference(tmp_path: Path) -> None:
    """One concept has no interval, and no difference of a few is coloured, however large."""
    for concepts in (1, 3):
        found = simulated_items(
            "data", {"omni_early": 1, "omni_late": 1}, effects={("omni_late", "image"): 2.0}, seed_sd=0.0, item_sd=0.0,
            concepts=concepts, rng=np.random.default_rng(0),
        )  # fmt: skip
        folders = [
            write_run(tmp_path / f"{arm}{concepts}", [r for r in found[arm, 0] if r["task"] == "caption"], lr=0.1)
            for arm in ("omni_early", "omni_late")
        ]
        page = write_comparison(folders, tmp_path / "page.html")[0].read_text()
        assert re.search(r'<span class="">\+(1\.9|2\.0)\d\d</span>', page)
        assert ("[no interval]" in page) == (concepts == 1)


def test_differences_between_runs(runs: tuple[Path, Path, Path]) -> None:
    names = ["first", "second", "third"]
    tables = []
    for folder, name in zip(runs[:2], names, strict=False):
        rows = pq.read_table(folder / "eval/predictions.parquet").to_pylist()
        tables += [{**row, "match": "", "arm": name, "seed": 0, "sentence": ""} for row in rows]
    lines = {
        (x.modality, x.part, x.measure.name): x for x in compare_runs(scores_of(pa.Table.from_pylist(tables)), names)
    }
    image = lines["image", "all", "nats_per_token"]
    assert image.values[2] is None
    assert image.differences[0] is None
    difference, own = image.differences[1], image.values[0]
    assert difference is not None
    assert own is not None
    assert difference.low < 0.4 < difference.high
    assert difference.low > 0
    rows = [r for r in tables if r["arm"] == "first" and r["modality"] == "image"]
    assert own.mean == pytest.approx(sum(r["loss"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows))
    assert (image.items, image.dropped) == (len(rows), 0)
    assert lines["text", "all", "bits_per_byte"].dropped == 1
    null = lines["audio", "all", "nats_per_token"].differences[1]
    assert null is not None
    assert null.low < 0 < null.high


def test_bad_comparisons_are_refused(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two different runs"):
        write_comparison([runs[0], runs[0]], tmp_path / "x.html")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_comparison([runs[0], tmp_path / "nowhere"], tmp_path / "x.html")
    broken = tmp_path / "broken"
    (broken / "eval").mkdir(parents=True)
    (broken / "eval/predictions.parquet").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"predictions.parquet cannot be read"):
        write_comparison([runs[0], broken], tmp_path / "x.html")
