"""Text benchmarks through lm-evaluation-harness (``lm_eval``): MMLU, GSM8K, IFEval and every other task that it has.

`OmniLM` is the model as the harness sees it; importing this module registers it there as ``omnitrain``. Prompts,
few-shot examples, filters and metrics are the harness's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from omnitrain.data.batch import IGNORE, TEXT, EncodedSample, PackedBatch
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.packing import Budget
from omnitrain.data.shards import nearest
from omnitrain.evaluation.answers import Decoding, answer_prompts
from omnitrain.evaluation.teacher_forced import DEFAULT_BUDGET, evaluating, packs
from omnitrain.models.omni import OmniModel
from omnitrain.tasks.run import (
    ITEMS_SCHEMA,
    StaleAnswers,
    TaskResult,
    model_fingerprint,
    write_json,
    write_whole,
)
from omnitrain.tasks.benchmark import Metric, score_interval

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"this task runs through lm-evaluation-harness ({error}): pip install 'omnitrain[lm_eval]'"
    ) from error

_MARK = "\0"
"""Stands around special tokens in the string that `OmniLM.apply_chat_template` makes. Text of the benchmark loses it,
so that a question can never spell a special token."""
_MARKED = re.compile(f"{_MARK}(<[^{_MARK}]+>){_MARK}")


@register_model("omnitrain")
class OmniLM(TemplateLM):
    """A model for the harness.

    Args:
        model, encoder: as for generation; the encoder's tokenizer is used.
        budget: of prompts that are read together.
        max_length: tokens that the model is shown at once, context and continuation; longer contexts lose their start.
        max_gen_toks: of an answer for which a task names no length.
        batch: answers generated between two entries in the harness's cache.
    """

    def __init__(
        self,
        model: OmniModel,
        encoder: SampleEncoder,
        *,
        budget: Budget = DEFAULT_BUDGET,
        max_length: int = 4096,
        max_gen_toks: int = 256,
        batch: int = 16,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.encoder, self.budget = model, encoder, budget
        self.max_length, self.max_gen_toks, self.batch, self.progress = max_length, max_gen_toks, batch, progress

    @property
    def eot_token_id(self) -> int:
        return self.encoder.tokenizer.id_of("<|endoftext|>")

    @property
    def tokenizer_name(self) -> str:
        return hashlib.blake2b(self.encoder.tokenizer.to_json().encode(), digest_size=8).hexdigest()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens only where `apply_chat_template` put them."""
        tokenizer, ids = self.encoder.tokenizer, []
        for place, piece in enumerate(_MARKED.split(string)):
            ids += [tokenizer.id_of(piece)] if place % 2 else tokenizer.encode(piece.replace(_MARK, ""))
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Qwen's ChatML as a string; `ChatTokenizer.render` makes the same tokens of the same messages."""
        turns = [
            f"{_MARK}<|im_start|>{_MARK}{turn['role']}\n{turn['content'].replace(_MARK, '')}"
            + (f"{_MARK}<|im_end|>{_MARK}\n" if add_generation_prompt or turn is not chat_history[-1] else "")
            for turn in chat_history
        ]
        return "".join(turns) + (f"{_MARK}<|im_start|>{_MARK}assistant\n" if add_generation_prompt else "")

    # --- log-likelihoods -------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._log_probabilities(
            [(context, continuation) for _, context, continuation in requests],
            lambda index, result: self.cache_hook.add_partial("loglikelihood", requests[index][0], result),
        )

    def _log_probabilities(
        self, pairs: Sequence[tuple[list[int], list[int]]], on_result: Callable[[int, tuple[float, bool]], None]
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether the model would have written it greedily) for each pair."""
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))  # the largest first
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        samples = (self._scored_sample(*pairs[index]) for index in order)
        with evaluating(self.model) as device, self._bar("log-likelihoods", len(pairs)) as advance:
            for pack in packs(samples, self.budget):
                batch = PackedBatch.pack([sample for _, sample in pack]).to(device)
                hidden = self.model(**batch.model_inputs()).hidden
                borders = batch.cu_seqlens.tolist()
                for (place, _), start, end in zip(pack, borders[:-1], borders[1:], strict=True):
                    labels = batch.labels[start:end]
                    at = labels != IGNORE
                    logits = self.model.thinker.logits(hidden[start:end][at]).float()  # [continuation, V]
                    log_p = torch.log_softmax(logits, -1).gather(1, labels[at][:, None]).double().sum()
                    results[order[place]] = (float(log_p), bool((logits.argmax(-1) == labels[at]).all()))
                    on_result(order[place], results[order[place]])
                    advance(1)
        return results

    def _scored_sample(self, context: list[int], continuation: list[int]) -> EncodedSample:
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than max_length={self.max_length}"
            )
        ids = np.array((context + continuation)[-(self.max_length + 1) :][:-1], dtype=np.int64)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        labels[len(ids) - len(continuation) :] = continuation
        return _text_sample(ids, labels)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of `max_length` where they are longer."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._log_probabilities(pairs, lambda *_: None), strict=True):
            totals[owner] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut at the first of a task's stop strings. A text that comes to a stop string goes on being
        generated up to its length, and what follows is thrown away."""
        results = [""] * len(requests)
        by_decoding: dict[Decoding, list[int]] = {}
        for index, request in enumerate(requests):
            by_decoding.setdefault(self._decoding(request.args[1]), []).append(index)
        with self._bar("answers", len(requests)) as advance:
            for decoding, indices in by_decoding.items():
                room = max(1, self.max_length - decoding.max_new_tokens)
                for start in range(0, len(indices), self.batch):
                    part = indices[start : start + self.batch]
                    prompts = [self._prompt(self.tok_encode(requests[i].args[0])[-room:]) for i in part]
                    answers = answer_prompts(
                        self.model, self.encoder.tokenizer, prompts, decoding=decoding, budget=self.budget, strip=False
                    )
                    for index, answer in zip(part, answers, strict=True):
                        until = requests[index].args[1].get("until") or []
                        for stop in [until] if isinstance(until, str) else until:
                            answer = answer.split(stop)[0] if stop else answer
                        results[index] = answer
                        self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                    advance(len(part))
        return results

    def _prompt(self, ids: list[int]) -> EncodedSample:
        ids = ids or [self.prefix_token_id]
        return _text_sample(np.array(ids, dtype=np.int64), np.full(len(ids), IGNORE, dtype=np.int64))

    def _decoding(self, asked: dict[str, Any]) -> Decoding:
        sampled = asked.get("do_sample", False) and asked.get("temperature", 1.0) > 0
        return Decoding(
            max_new_tokens=int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or self.max_gen_toks),
            temperature=float(asked.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(asked.get("top_p", 1.0)) if sampled else 1.0,
            top_k=int(asked.get("top_k", 0)) if sampled else 0,
        )

    def _bar(self, name: str, total: int) -> _Bar:
        return _Bar(name, total, shown=self.progress)


class _Bar:
    """A progress bar; as a context it gives the function that advances it."""

    def __init__(self, name: str, total: int, *, shown: bool) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            console=Console(stderr=True), disable=not shown,
        )  # fmt: skip
        self.task = self.bar.add_task(name, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self.bar.start()
        return lambda n: self.bar.advance(self.task, n)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _text_sample(ids: np.ndarray, labels: np.ndarray) -> EncodedSample:
    return EncodedSample(
        id="", source="lm_eval", task="text", modality="text", languages=(), input_ids=ids, labels=labels,
        token_types=np.full(len(ids), TEXT, dtype=np.uint8),
        position_ids=np.tile(np.arange(len(ids), dtype=np.float32), (3, 1)),
    )  # fmt: skip


# --- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """Tasks of lm-evaluation-harness under one name.

    Args:
        name: of the files in ``eval/tasks``.
        tasks: the harness's names, of tasks or groups.
        metric: the metric that is reported first, with the harness's filter behind a comma where a task has several.
        path: folder of further task files (YAML), which come before the harness's own of the same name.
        num_fewshot: examples in the prompt; None: as the task says.
        chat: prompts as conversations, for models that were trained on these.
    """

    name: str
    tasks: tuple[str, ...] | list[str]
    metric: str
    path: str | None = None
    num_fewshot: int | None = None
    chat: bool = False

    def run(
        self,
        model: OmniModel,
        encoder: SampleEncoder,
        out_dir: str | Path,
        *,
        limit: int | None = None,
        batch: int = 16,
        budget: Budget = DEFAULT_BUDGET,
        restart: bool = False,
        fingerprint: str | None = None,
        progress: bool = True,
        seed: int = 0,
    ) -> TaskResult:
        """Run the tasks and write ``NAME.parquet`` and ``NAME.json``; arguments as of `run.run_task`. `limit` counts
        items of each of the harness's tasks, from its beginning.

        Raises:
            StaleAnswers: the folder holds results of another model or setting, and `restart` is off.
            ValueError: there is no such task, or its data cannot be had.
        """
        out = Path(out_dir)
        out.mkdir(parents=True, exist_ok=True)
        settings = {**asdict(self), "tasks": list(self.tasks), "limit": limit}
        asked = {key: value for key, value in settings.items() if key not in ("name", "metric")}
        decides = [fingerprint or model_fingerprint(model, encoder), asked, lm_eval.__version__]
        mine = hashlib.blake2b(json.dumps(decides).encode(), digest_size=16).hexdigest()
        summary, parts = out / f"{self.name}.json", out / f"{self.name}.parts"
        if summary.is_file():
            stored = json.loads(summary.read_text(encoding="utf-8"))
            if stored["fingerprint"] == mine and stored["metric"] == self.metric:
                return self._result(stored, out)
            if stored["fingerprint"] != mine and not restart:
                raise StaleAnswers(
                    f"{summary} holds results of another model or of other settings; "
                    "+eval.restart=true throws them away"
                )
        started = [folder for folder in parts.glob("*") if not folder.name.startswith(mine)]
        if started and not restart:
            raise StaleAnswers(
                f"{parts} holds answers of another model or of other settings; +eval.restart=true throws them away"
            )
        for old in started:
            old.unlink()
        manager = self._manager()
        results = self._evaluate(manager, model, encoder, parts / mine, limit, batch, budget, progress)
        rows = list(self._rows(results["samples"]))
        metrics = self._metrics(results["samples"], results.get("higher_is_better", {}), seed)
        if self.metric not in {found["name"] for found in metrics}:
            names = sorted({found["name"] for found in metrics})
            raise ValueError(f"eval.tasks.{self.name}.metric={self.metric}: these tasks have {', '.join(names)}")
        by_task = sorted(results["samples"])
        own = [found for found in metrics if found["name"] == self.metric and found["task"] is None]
        others = [found for found in metrics if found["name"] != self.metric and found["task"] is None]
        content = {
            "task": self.name, "metric": self.metric, "fingerprint": mine, "items": len({row["id"] for row in rows}),
            "limit": limit, "metrics": own + others,
            "categories": [
                {"category": found["task"], **found}
                for found in metrics if len(by_task) > 1 and found["name"] == self.metric and found["task"]
            ],
            "skipped": {}, "settings": settings,
            "versions": {name: str(version) for name, version in results["versions"].items()},
            "lm_eval": lm_eval.__version__,
        }  # fmt: skip
        write_whole(pa.Table.from_pylist(rows, schema=ITEMS_SCHEMA), out / f"{self.name}.parquet")
        write_json(summary, content)
        shutil.rmtree(parts, ignore_errors=True)
        return self._result(content, out)

    def _manager(self) -> TaskManager:
        """Knows the tasks. The harness's own are thousands of files: they are only read where they are needed."""
        if self.path is not None:
            if not Path(self.path).is_dir():
                raise FileNotFoundError(f"eval.tasks.{self.name}.path={self.path}: no such folder of task files")
            own = TaskManager(include_path=self.path, include_defaults=False)
            if set(self.tasks) <= set(own.all_tasks):
                return own
        manager = TaskManager(include_path=self.path)
        for task in self.tasks:
            if task not in manager.all_tasks:
                near = nearest(task, manager.all_tasks)
                raise ValueError(
                    f"eval.tasks.{self.name}.tasks: lm_eval has no {task!r}{near}; `lm_eval ls tasks` lists all"
                )
        return manager

    def _evaluate(
        self,
        manager: TaskManager,
        model: OmniModel,
        encoder: SampleEncoder,
        cache: Path,
        limit: int | None,
        batch: int,
        budget: Budget,
        progress: bool,
    ) -> dict[str, Any]:
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        try:
            results = lm_eval.simple_evaluate(
                model=OmniLM(model, encoder, budget=budget, batch=batch, progress=progress),
                tasks=list(self.tasks),
                num_fewshot=self.num_fewshot,
                limit=limit,
                use_cache=str(cache),
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=self.chat,
                task_manager=manager,
            )
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(f"eval.tasks.{self.name}.tasks={list(self.tasks)}: {error}") from error
        assert results is not None
        return dict(results)

    def _rows(self, samples: dict[str, list[dict[str, Any]]]) -> Iterable[dict[str, Any]]:
        """One row per item and filter."""
        own, _, filter = self.metric.partition(",")
        for task, found in sorted(samples.items()):
            for sample in found:
                if filter and sample["filter"] != filter:
                    continue
                arguments, answers = sample["arguments"], sample["resps"]
                choice = isinstance(answers[0][0], tuple | list)
                best = max(range(len(answers)), key=lambda i: answers[i][0][0]) if choice else 0
                value = sample.get(own)
                yield {
                    "id": f"{task}/{sample['doc_id']}", "digest": sample["doc_hash"][:16], "category": task,
                    "group": f"{task}/{sample['doc_id']}", "prompt": str(arguments[0][0]).replace(_MARK, ""),
                    "reference": str(sample["target"]),
                    "truth": json.dumps(sample["doc"], ensure_ascii=False, default=str),
                    "prediction": str(arguments[best][1]).strip() if choice else str(answers[0][0]),
                    "answer": None if choice else str(sample["filtered_resps"][0]),
                    "score": float(value) if isinstance(value, int | float) else None,
                }  # fmt: skip

    def _metrics(
        self, samples: dict[str, list[dict[str, Any]]], directions: dict[str, dict[str, bool]], seed: int
    ) -> list[dict[str, Any]]:
        """Every metric that is a mean over items, or over the parts of items, of all tasks together (``task`` None) and
        of each. Others (perplexities) are the harness's business."""
        pooled: dict[tuple[str, str | None], list[tuple[float, float]]] = {}
        groups: dict[tuple[str, str | None], list[str]] = {}
        for task, found in sorted(samples.items()):
            for sample in found:
                for name in sample["metrics"]:
                    value = sample[name]
                    parts = value if isinstance(value, list) else [value]
                    if not all(isinstance(part, int | float) for part in parts):
                        continue
                    label = name if sample["filter"] == "none" else f"{name},{sample['filter']}"
                    for key in ((label, None), (label, task)):
                        pooled.setdefault(key, []).append((float(sum(parts)), float(len(parts))))
                        groups.setdefault(key, []).append(f"{task}/{sample['doc_id']}")
        records = []
        for (name, task), statistics in pooled.items():
            own = name.partition(",")[0]
            higher = next((found[own] for found in directions.values() if own in found), True)
            metric = Metric(name=name, higher_is_better=higher)
            interval = score_interval(metric, statistics, groups[name, task], seed=seed)
            records.append(
                {
                    "name": name, "task": task, "higher_is_better": higher, "percent": True, "value": interval.mean,
                    "low": interval.low, "high": interval.high, "items": interval.n, "groups": interval.groups,
                }
            )  # fmt: skip
        return records

    def _result(self, content: dict[str, Any], out: Path) -> TaskResult:
        return TaskResult(
            name=self.name, metric=self.metric, items=content["items"], skipped=content["skipped"],
            metrics=content["metrics"], categories=content["categories"], path=out / f"{self.name}.parquet",
        )  # fmt: skip
