"""Every benchmark in its own format, from files to scores, with a tiny random model."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from data_prep import personas as persona_data
from data_prep import tool_data
from omnitrain.config.locations import CONF
from omnitrain.config.targets import built
from omnitrain.config.typed import named
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.shards import write_shards
from omnitrain.tasks import task as running
from omnitrain.tasks.personas import PERSONAS
from omnitrain.tasks.results import ITEMS_SCHEMA, StaleAnswers, TaskResult
from omnitrain.tasks.settings import RunOptions
from omnitrain.tasks.tables import read_table
from omnitrain.tasks.task import Task

from .conftest import picture, recording, video

HARNESS = ("mmlu", "gsm8k", "ifeval")


def task(name: str, path: Path | str, **changes) -> Task:
    """The task of ``conf/eval/NAME.yaml``, with short answers."""
    cfg = OmegaConf.load(CONF / "eval" / f"{name}.yaml")
    cfg.eval.path = str(path)
    node = cfg.eval.tasks[name]
    node.decoding.max_new_tokens = 6
    for key, value in changes.items():
        OmegaConf.update(node, key, value)
    OmegaConf.resolve(cfg)
    return built(named(OmegaConf.to_container(node), f"eval.tasks.{name}"))


def run_task(task: Task, model, encoder, out: Path, **options) -> TaskResult:
    return task.run(model, encoder, out, RunOptions(progress=False, **options))


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path: Path, rows: list[dict], delimiter: str, header: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        if header:
            writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def image(seed: int = 0) -> dict:
    return {"bytes": picture(seed), "path": None}


# --- what each benchmark looks like ----------------------------------------------------------------------------------


def librispeech(folder: Path) -> Path:
    chapter = folder / "test-clean" / "61" / "70968"
    for i in range(3):
        recording(chapter / f"61-70968-{i:04d}.flac", i)
    texts = "".join(f"61-70968-{i:04d} HE BEGAN A CONFUSED COMPLAINT\n" for i in range(3))
    (chapter / "61-70968.trans.txt").write_text(texts)
    return folder / "test-clean"


def common_voice(folder: Path) -> Path:
    rows = [
        {"client_id": "c", "path": f"common_voice_en_{i}.flac", "sentence": 'He said "no"', "locale": "en"}
        for i in range(2)
    ]
    for i, row in enumerate(rows):
        recording(folder / "clips" / row["path"], i)
    text = "\t".join(rows[0]) + "\n" + "".join("\t".join(row.values()) + "\n" for row in rows)
    (folder / "test.tsv").write_text(text)  # with bare quotes, as Mozilla writes it
    return folder


def fleurs(folder: Path) -> Path:
    rows = [["1", f"{i}.wav", "Hello, you.", "hello you", "h e l l o |", "5000", "FEMALE"] for i in (11, 12)]
    for row in rows:
        recording(folder / "audio" / "test" / row[1], int(row[1][:2]))
    (folder / "test.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return folder


def covost(folder: Path) -> Path:
    rows = [
        {"path": f"{i}.flac", "translation": "Er sagte nein.", "split": "test" if i < 2 else "dev"} for i in range(3)
    ]
    for i in range(3):
        recording(folder / "clips" / f"{i}.flac", i)
    return table(folder / "covost_v2.en_de.tsv", rows, "\t").parent


def mmau(folder: Path) -> Path:
    for i in range(2):
        recording(folder / "test-mini-audios" / f"{i}.wav", i)
    rows = [
        {
            "id": f"q{i}", "audio_id": f"./test-mini-audios/{i}.wav", "question": "Which sound?",
            "choices": ["dog", "cat"], "answer": "cat", "dataset": "x", "task": "sound", "difficulty": "easy",
        }
        for i in range(2)
    ]  # fmt: skip
    (folder / "mmau-test-mini.json").write_text(json.dumps(rows))
    return folder / "mmau-test-mini.json"


def audiobench(folder: Path) -> Path:
    sound = {"bytes": recording(folder / "x.wav").read_bytes(), "path": "x.wav"}
    rows = [
        {
            "context": {"audio": sound, "text": None}, "instruction": {"text": text}, "answer": {"text": answer},
        }
        for text, answer in (("Who speaks? (A) a man (B) a woman", "(B) a woman"), ("Which? (A) x (B) y", "x"))
    ]  # fmt: skip
    return parquet(folder / "mcq.parquet", rows)


def audiocaps(folder: Path) -> Path:
    rows = [
        {"audiocap_id": str(n), "youtube_id": clip, "start_time": "30", "caption": caption, "events": events}
        for n, (clip, caption, events) in enumerate(
            [("aa", "a dog barks", "Dog;Bark"), ("aa", "barking", "Dog;Bark"), ("bb", "rain falls, hard", "Rain")]
        )
    ]
    for clip in ("aa", "bb"):
        recording(folder / "audio" / f"{clip}.wav")
    return table(folder / "test.csv", rows, ",").parent


def mmmu(folder: Path) -> Path:
    base = {"explanation": "", "subfield": "x", **{f"image_{n}": None for n in range(1, 8)}}
    rows = [
        {**base, "id": "validation_Art_Theory_1", "question": "Who painted <image 1> and <image 2>?",
         "options": "['Mary \"M\"', 'B. it\\'s', 'Cy']", "answer": "B", "question_type": "multiple-choice",
         "image_1": image(1), "image_2": image(2)},
        {**base, "id": "validation_Math_2", "question": "How many?", "options": "[]", "answer": "['3', 'three']",
         "question_type": "open", "image_1": image(3)},
    ]  # fmt: skip
    return parquet(folder / "validation.parquet", rows)


def mmstar(folder: Path) -> Path:
    rows = [
        {"index": i, "question": "Which?\nOptions: A: x, B: y, C: z, D: w", "image": picture(i), "answer": "C",
         "category": "math", "l2_category": "geometry"}
        for i in range(2)
    ]  # fmt: skip
    return parquet(folder / "val.parquet", rows)


def mathvista(folder: Path) -> Path:
    base = {"image": "images/1.jpg", "decoded_image": image(), "query": "", "metadata": {"task": "geometry"}}
    rows = [
        {**base, "pid": "1", "question": "How wide?", "choices": None, "unit": "cm", "precision": 1.0,
         "answer": "1.2", "question_type": "free_form", "answer_type": "float"},
        {**base, "pid": "2", "question": "Which?", "choices": ["135°", "145°"], "unit": None, "precision": None,
         "answer": "145°", "question_type": "multi_choice", "answer_type": "text"},
    ]  # fmt: skip
    return parquet(folder / "testmini.parquet", rows)


def chartqa(folder: Path) -> Path:
    (folder / "png").mkdir()
    (folder / "png" / "1.png").write_bytes(picture())
    for whose in ("human", "augmented"):
        rows = [{"imgname": "1.png", "query": "What is the peak?", "label": "12.5"}]
        (folder / f"test_{whose}.json").write_text(json.dumps(rows))
    return folder


def video_mme(folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "data" / "abc.mp4").write_bytes(video())
    rows = [
        {"video_id": "001", "duration": duration, "videoID": "abc", "question_id": f"001-{i}", "question": "What?",
         "options": ["A. x", "B. y", "C. z", "D. w"], "answer": "D"}
        for i, duration in enumerate(["short", "long"])
    ]  # fmt: skip
    return parquet(folder / "test.parquet", rows)


def bfcl(folder: Path) -> Path:
    function = {
        "name": "f", "description": "d",
        "parameters": {"type": "dict", "properties": {"x": {"type": "float"}}, "required": ["x"]},
    }  # fmt: skip
    asked = [[{"role": "user", "content": "Call f with 1."}]]
    lines(folder / "BFCL_v3_simple.json", [{"id": "simple_0", "question": asked, "function": [function]}])
    lines(
        folder / "possible_answer" / "BFCL_v3_simple.json",
        [{"id": "simple_0", "ground_truth": [{"f": {"x": [1.0]}}]}],
    )
    lines(folder / "BFCL_v3_irrelevance.json", [{"id": "irrelevance_0", "question": asked, "function": [function]}])
    return folder


def stamps(folder: Path) -> Path:
    def one(i: int, task: str) -> Sample:
        sound = recording(folder.parent / "sound.wav").read_bytes()
        medium = Segment(type="image", media=picture(i)) if task == "caption" else Segment(type="audio", media=sound)
        return Sample(
            id=f"{task}/{i}", source="stamps", split="heldout_cell", task=task, concept="fox", languages=("en",),
            messages=(
                Message(role="user", segments=(medium, Segment(type="text", text="What is it?"))),
                Message(role="assistant", segments=(Segment(type="text", text="the quick fox"),)),
            ),
        )  # fmt: skip

    write_shards([one(i, name) for name in ("caption", "asr") for i in range(2)], folder, "stamps")
    return folder


def caption(language: str, text: str, seed: int) -> Sample:
    """A picture as `data_prep` has them, of a thing that is held out."""
    asked = (Segment(type="image", media=picture(seed)), Segment(type="text", text="What is it?"))
    said = (Segment(type="text", text=text),)
    return Sample(
        id=f"s/fox{seed}/image>{language}", source="s", task="caption", concept="fox", languages=(language,),
        messages=(Message(role="user", segments=asked), Message(role="assistant", segments=said)),
    )  # fmt: skip


def personas(folder: Path) -> Path:
    captions = {"en": "A quick fox.", "es": "Un zorro veloz.", "fr": "Un renard rapide.", "ru": "Быстрая лиса."}
    shown = Segment(type="image", media=picture(0))
    fox = caption("en", captions["en"], 0)
    rows = [persona_data.asked(fox, captions, PERSONAS[name], shown) for name in ("pirate-fr", "json-ru")]
    write_shards([replace(row, split="heldout_cell") for row in rows], folder, "personas")
    return folder


def tools(folder: Path) -> Path:
    named, other = (tool_data.Thing(f"s/{name}", name, f"A {name}.", "") for name in ("fox", "dog"))
    shown = replace(named, medium=Segment(type="image", media=picture(0)))
    rows = [tool_data.request(named, other, "compare"), tool_data.request(shown, other, "play")]
    write_shards([replace(row, split="heldout_cell") for row in rows], folder, "tools")
    return folder


FORMATS = {
    f.__name__: f
    for f in (
        librispeech, common_voice, fleurs, covost, mmau, audiobench, audiocaps, mmmu, mmstar, mathvista, chartqa,
        video_mme, bfcl, stamps, personas, tools,
    )
}  # fmt: skip
EXPECTED = {  # items, categories, and which metrics there are
    "librispeech": (3, set(), ["wer"]),
    "common_voice": (2, set(), ["wer"]),
    "fleurs": (2, set(), ["wer"]),
    "covost": (2, set(), ["bleu", "chrf"]),
    "mmau": (2, {"sound"}, ["accuracy"]),
    "audiobench": (2, set(), ["accuracy"]),
    "audiocaps": (2, set(), ["cider_d", "chrf", "hallucinating_captions"]),
    "mmmu": (2, {"Art_Theory", "Math"}, ["accuracy"]),
    "mmstar": (2, {"math"}, ["accuracy"]),
    "mathvista": (2, {"geometry"}, ["accuracy"]),
    "chartqa": (2, {"human", "augmented"}, ["accuracy"]),
    "video_mme": (2, {"short", "long"}, ["accuracy"]),
    "bfcl": (2, {"simple", "irrelevance"}, ["accuracy"]),
    "stamps": (4, {"caption>en", "asr>en"}, ["exact_match", "chrf", "wer"]),
    "personas": (2, {"pirate", "json"}, ["adherence", "answer_kept"]),
    "tools": (2, {"text, compare", "picture, play"}, ["accuracy"]),
}


def test_every_task_of_the_configuration_is_tested():
    assert {path.stem for path in (CONF / "eval").glob("*.yaml")} == set(FORMATS) | set(HARNESS)
    assert FORMATS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_from_files_to_scores(name, model, encoder, tmp_path):
    folder = tmp_path / "benchmark"
    folder.mkdir()
    result = run_task(task(name, FORMATS[name](folder)), model, encoder, tmp_path / "out")
    items, categories, metrics = EXPECTED[name]
    assert (result.items, result.skipped) == (items, {})
    assert {found["category"] for found in result.categories} == categories
    assert [found["name"] for found in result.metrics if found["name"] != "hallucinated_events"] == metrics
    rows = pq.read_table(result.path)
    assert rows.schema.names == ITEMS_SCHEMA.names
    assert len(rows) == items == len(set(rows["id"].to_pylist()))
    summary = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert summary["metric"] == summary["metrics"][0]["name"] == result.metric


@pytest.mark.parametrize("name", FORMATS)
def test_the_true_answer_scores_best(name, model, encoder, tmp_path, monkeypatch):
    """A model that answers with the reference gets the best score there is: reader, extraction and rule fit."""
    folder = tmp_path / "benchmark"
    folder.mkdir()

    def perfect(task, model, encoder, items, *_):
        return [_reference_answer(name, item) for item in items]

    monkeypatch.setattr(running, "_predictions", perfect)
    result = run_task(task(name, FORMATS[name](folder)), model, encoder, tmp_path / "out")
    best = {"wer": 0.0, "bleu": 100.0, "cider_d": None}.get(result.metric, 1.0)
    if best is not None:
        assert result.metrics[0]["value"] == pytest.approx(best)
        assert all(found["value"] == pytest.approx(best) for found in result.categories)
    if name == "audiocaps":
        assert [found["value"] for found in result.metrics[2:]] == [0, 0]


def _reference_answer(name, item):
    if name == "bfcl":
        calls = [
            {"name": function, "arguments": {key: values[0] for key, values in arguments.items()}}
            for answer in item.truth["answers"]
            for function, arguments in answer.items()
        ]
        return "".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    return item.truth["answer"] if name == "audiobench" else item.sample.reference


def test_pictures_stand_where_mmmu_puts_them(tmp_path):
    benchmark, path = task("mmmu", mmmu(tmp_path)), tmp_path / "validation.parquet"
    item = benchmark.benchmark.item(benchmark.benchmark.rows(str(path))[0], benchmark.prompt)
    kinds = [segment.type for segment in item.sample.messages[0].segments]
    assert kinds == ["text", "image", "text", "image", "text"]
    assert item.sample.messages[0].segments[1].media == picture(1)
    assert "(B) B. it's\n(C) Cy\n\nAnswer with" in item.sample.messages[0].segments[-1].text
    second = benchmark.benchmark.item(benchmark.benchmark.rows(str(path))[1], benchmark.prompt)
    assert second.truth == {"answers": ["3", "three"]}
    assert [segment.type for segment in second.sample.messages[0].segments] == ["image", "text"]


def test_bfcl_offers_functions_in_json_schema(tmp_path):
    bench = task("bfcl", bfcl(tmp_path))
    item = bench.benchmark.item(bench.benchmark.rows(str(tmp_path))[1], bench.prompt)
    [tool] = json.loads(item.sample.meta["tools"])
    assert tool["function"]["parameters"]["type"] == "object"
    assert tool["function"]["parameters"]["properties"]["x"]["type"] == "number"
    assert item.truth["functions"][0]["parameters"]["type"] == "dict"  # the rule sees BFCL's own


# --- running ---------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_gives_the_same(model, encoder, tmp_path, monkeypatch):
    path = librispeech(tmp_path)
    whole = run_task(task("librispeech", path), model, encoder, tmp_path / "a", batch=1)
    real, calls = running._predictions, []

    def dies(task, model, encoder, items, *rest):
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(task, model, encoder, items, *rest)

    monkeypatch.setattr(running, "_predictions", dies)
    with pytest.raises(KeyboardInterrupt):
        run_task(task("librispeech", path), model, encoder, tmp_path / "b", batch=1)
    assert len(list((tmp_path / "b" / "librispeech.parts").iterdir())) == 2
    resumed = run_task(task("librispeech", path), model, encoder, tmp_path / "b", batch=1)
    assert [n for n in calls if n] == [1, 1, 1, 1]  # one of them died; the third item alone was asked again
    assert pq.read_table(resumed.path).equals(pq.read_table(whole.path))
    assert resumed.metrics == whole.metrics
    assert not (tmp_path / "b" / "librispeech.parts").exists()
    run_task(task("librispeech", path), model, encoder, tmp_path / "b", batch=1)
    assert sum(calls) == 4  # nothing left to ask


def test_answers_of_other_settings_or_another_model_are_refused(model, encoder, tokenizer, tmp_path):
    from omnitrain.models.presets import init_weights

    path = mmstar(tmp_path)
    run_task(task("mmstar", path), model, encoder, tmp_path / "out")
    with pytest.raises(StaleAnswers, match=r"eval\.restart=true"):
        run_task(task("mmstar", path, prompt="{question} Now!"), model, encoder, tmp_path / "out")
    other = task("mmstar", path, prompt="{question} Now!")
    assert run_task(other, model, encoder, tmp_path / "out", restart=True).items == 2
    init_weights(model, seed=1)
    try:
        with pytest.raises(StaleAnswers, match="another model"):
            run_task(other, model, encoder, tmp_path / "out")
    finally:
        init_weights(model, seed=0)


def test_a_changed_truth_is_asked_again_and_the_rest_is_kept(model, encoder, tmp_path, monkeypatch):
    path = mmau(tmp_path)
    run_task(task("mmau", path), model, encoder, tmp_path / "out")
    rows = json.loads(path.read_text())
    rows[1]["question"] = "And now?"
    path.write_text(json.dumps(rows))
    asked, real = [], running._predictions

    def noted(task, model, encoder, items, *rest):
        asked.extend(item.sample.id for item in items)
        return real(task, model, encoder, items, *rest)

    monkeypatch.setattr(running, "_predictions", noted)
    run_task(task("mmau", path), model, encoder, tmp_path / "out")
    assert asked == ["q1"]


def test_bad_items_are_counted_and_told(model, encoder, tmp_path):
    path = mmau(tmp_path)
    rows = json.loads(path.read_text())
    rows += [
        {**rows[0], "id": "gone", "audio_id": "./nowhere.wav"},
        {"id": "empty"},
        rows[0],
    ]
    (tmp_path / "test-mini-audios" / "broken.wav").write_bytes(b"RIFFxxxxWAVE")
    rows.append({**rows[0], "id": "broken", "audio_id": "./test-mini-audios/broken.wav"})
    path.write_text(json.dumps(rows))
    result = run_task(task("mmau", path), model, encoder, tmp_path / "out")
    assert result.items == 2
    assert {k: v for k, v in result.skipped.items() if not k.startswith("audio_")} == {
        "media_missing": 1, "row_invalid": 1, "id_twice": 1,
    }  # fmt: skip
    assert sum(result.skipped.values()) == 4
    details = json.loads((tmp_path / "out" / "mmau.json").read_text())["skipped_details"]
    assert any("no choices" in text for text in details)


def test_limit_is_spread_over_the_benchmark(model, encoder, tmp_path):
    rows = [
        {"index": i, "question": "?", "image": picture(), "answer": "A", "category": "ab"[i // 5]} for i in range(10)
    ]
    path = parquet(tmp_path / "val.parquet", rows)
    result = run_task(task("mmstar", path), model, encoder, tmp_path / "out", limit=4)
    assert pq.read_table(result.path)["id"].to_pylist() == ["0", "2", "5", "7"]


def test_likelihood_takes_the_most_probable_option(model, encoder, tmp_path):
    from dataclasses import replace

    from omnitrain.data.shards import MediaReader
    from omnitrain.evaluation.teacher_forced import sample_losses

    bench = task("mmmu", mmmu(tmp_path), scoring="likelihood")
    result = run_task(bench, model, encoder, tmp_path / "out")
    assert result.skipped == {"no_options": 1}  # the open question
    item = bench.benchmark.item(bench.benchmark.rows(bench.path)[0], bench.prompt)
    nats = {}
    for letter in "ABC":
        answer = Message(role="assistant", segments=(Segment(type="text", text=letter),))
        sample = replace(item.sample, messages=(*item.sample.messages[:-1], answer))
        [loss] = sample_losses(model, [encoder(sample, MediaReader(tmp_path))])
        nats[letter] = loss.nats
    [said] = pq.read_table(result.path)["prediction"].to_pylist()
    assert said == min(nats, key=nats.get)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("librispeech", {}, "no \\*.trans.txt below it"),
        ("common_voice", {}, "test.tsv"),
        ("mmmu", None, "no such file or folder"),
        ("audiocaps", {"test.csv": "youtube_id,start_time\na,1\n"}, "column caption is missing"),
        ("mmau", {"x.json": "{broken"}, "no JSON"),
        ("bfcl", {"BFCL_v3_simple.json": "{}"}, "possible_answer"),
        ("mmau", {"x.json": '[{"id": 1}]'}, "none of 1 rows could be used.*the row has no choices"),
    ],
)
def test_what_is_not_there_is_named(name, files, message, model, encoder, tmp_path):
    for file, content in (files or {}).items():
        (tmp_path / file).write_text(content)
    path = tmp_path / "gone" / "x" if files is None else tmp_path
    if name == "mmau":
        path = tmp_path / "x.json"
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        run_task(task(name, path), model, encoder, tmp_path / "out")


def test_tasks_that_contradict_themselves_are_refused(tmp_path):
    with pytest.raises(Exception, match="metric 'acc' is not one of the rule's: accuracy"):
        task("mmstar", tmp_path, metric="acc")
    with pytest.raises(Exception, match="scoring is 'guess'; it is 'generate' or 'likelihood'"):
        task("mmstar", tmp_path, scoring="guess")
    bench = task("mmstar", tmp_path, prompt="{questoin}")
    with pytest.raises(ValueError, match=r"fills in: \{question\}"):
        bench.benchmark.item({"index": 0, "question": "?", "image": picture(), "answer": "A"}, bench.prompt)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_is_refused(limit, model, encoder, tmp_path):
    with pytest.raises(ValueError, match=rf"eval\.limit={limit} leaves no item"):
        run_task(task("mmstar", mmstar(tmp_path)), model, encoder, tmp_path / "out", limit=limit)


def test_a_smaller_limit_does_not_lose_answers(model, encoder, tmp_path, monkeypatch):
    path = librispeech(tmp_path)
    whole = run_task(task("librispeech", path), model, encoder, tmp_path / "out")
    table = pq.read_table(whole.path)
    assert run_task(task("librispeech", path), model, encoder, tmp_path / "out", limit=1).items == 1
    monkeypatch.setattr(running, "_predictions", lambda task, model, encoder, items, *_: [1 / 0 for _ in items])
    again = run_task(task("librispeech", path), model, encoder, tmp_path / "out")
    assert pq.read_table(again.path).equals(table)


def test_thoughts_are_not_scored(model, encoder, tmp_path, monkeypatch):
    said = "<think>Perhaps A? No.</think>\nC"
    monkeypatch.setattr(running, "_predictions", lambda task, model, encoder, items, *_: [said for _ in items])
    result = run_task(task("mmstar", mmstar(tmp_path)), model, encoder, tmp_path / "out")
    assert result.metrics[0]["value"] == 1
    assert set(pq.read_table(result.path)["prediction"].to_pylist()) == {said}


def test_tables_of_the_hub_on_disk(tmp_path):
    first, second = ([{"id": f"{name}{i}", "image": image(i)} for i in range(2)] for name in "ab")
    folder = tmp_path / "hub"
    parquet(folder / "a" / "validation-00000-of-00001.parquet", first)
    parquet(folder / "b" / "validation-00000-of-00001.parquet", second)
    configs = "".join(f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in "ab").replace(
        "data_files: ", "data_files: [{split: validation, path: "
    ).replace(".parquet\n", ".parquet}]\n")  # fmt: skip
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    read = [row["id"] for row in read_table(str(folder), split="validation", config="all")]
    assert read == ["a0", "a1", "b0", "b1"]
    assert read_table(str(folder), split="validation", config="b")[1] == second[1]
    saved = tmp_path / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(first)}).save_to_disk(str(saved))
    assert read_table(str(saved), split="test")[0] == first[0]
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        read_table(str(saved), split="train")
