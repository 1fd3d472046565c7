"""Text benchmarks through lm-evaluation-harness (``lm_eval``): MMLU, GSM8K, IFEval and every other task that it has.

`OmniLM` is the model as the harness sees it; importing this module registers it there as ``omnitrain``. Prompts,
few-shot examples, filters and metrics are the harness's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omnitrain.data.batch import IGNORE, EncodedSample, PackedBatch
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.shards import nearest
from omnitrain.evaluation.answers import answer_prompts
from omnitrain.evaluation.progress import progress_bar
from omnitrain.evaluation.teacher_forced import DEFAULT_BUDGET, Writer, evaluating, packs
from omnitrain.generation.sampling import Decoding
from omnitrain.models.omni import OmniModel
from omnitrain.tasks.benchmark import Metric
from omnitrain.tasks.results import Outcome, RunnableTask, TaskFiles, Told
from omnitrain.tasks.settings import RunOptions
from omnitrain.vocabulary import TEXT

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

_ANSWER_TOKENS = 256  # of an answer for which a task names no length
_MARK = "\0"
"""Stands around special tokens in the string that `OmniLM.apply_chat_template` makes. Text of the benchmark loses it,
so that a question can never spell a special token."""
_MARKED = re.compile(f"{_MARK}(<[^{_MARK}]+>){_MARK}")


@register_model("omnitrain")
class OmniLM(TemplateLM):
    """A model for the harness.

    Args:
        model, encoder: as for generation; the encoder's tokenizer is used.
        max_length: tokens that the model is shown at once, context and continuation; longer contexts lose their start.
        batch: answers generated between two entries in the harness's cache.
    """

    def __init__(
        self,
        model: OmniModel,
        encoder: SampleEncoder,
        *,
        max_length: int = 4096,
        batch: int = 16,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.encoder = model, encoder
        self.max_length, self.batch, self.progress = max_length, batch, progress

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
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether the model would have written it greedily) for each request: its name
        in the cache (None: it is not kept there), context, continuation."""
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))  # the largest first
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        samples = (self._scored_sample(*requests[index][1:]) for index in order)
        with evaluating(self.model) as device, progress_bar(self.progress) as bar:
            ticker = bar.add_task("log-likelihoods", total=len(requests))
            for pack in packs(samples, DEFAULT_BUDGET):
                batch = PackedBatch.pack([sample for _, sample in pack]).to(device)
                hidden = self.model(**batch.model_inputs()).hidden
                borders = batch.cu_seqlens.tolist()
                for (place, _), start, end in zip(pack, borders[:-1], borders[1:], strict=True):
                    labels = batch.labels[start:end]
                    at = labels != IGNORE
                    logits = self.model.thinker.logits(hidden[start:end][at]).float()  # [continuation, V]
                    log_p = torch.log_softmax(logits, -1).gather(1, labels[at][:, None]).double().sum()
                    result = (float(log_p), bool((logits.argmax(-1) == labels[at]).all()))
                    results[order[place]] = result
                    if (name := requests[order[place]][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", name, result)
                    bar.advance(ticker)
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
        parts: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            parts += ((None, *make_disjoint_window(window)) for window in windows)
            owners += [index] * (len(parts) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
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
        with progress_bar(self.progress) as bar:
            ticker = bar.add_task("answers", total=len(requests))
            for decoding, indices in by_decoding.items():
                room = max(1, self.max_length - decoding.max_new_tokens)
                for start in range(0, len(indices), self.batch):
                    part = indices[start : start + self.batch]
                    contexts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in part]
                    prompts = [_text_sample(np.array(ids), np.full(len(ids), IGNORE)) for ids in contexts]
                    answers = answer_prompts(self.model, self.encoder.tokenizer, prompts, decoding=decoding)
                    for index, answer in zip(part, answers, strict=True):
                        until = requests[index].args[1].get("until") or []
                        for stop in [until] if isinstance(until, str) else until:
                            answer = answer.split(stop)[0] if stop else answer
                        results[index] = answer
                        self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                    bar.advance(ticker, len(part))
        return results

    def _decoding(self, asked: dict[str, Any]) -> Decoding:
        sampled = asked.get("do_sample", False) and asked.get("temperature", 1.0) > 0
        return Decoding(
            max_new_tokens=int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or _ANSWER_TOKENS),
            temperature=float(asked.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(asked.get("top_p", 1.0)) if sampled else 1.0,
            top_k=int(asked.get("top_k", 0)) if sampled else 0,
        )


def _text_sample(ids: np.ndarray, labels: np.ndarray) -> EncodedSample:
    return EncodedSample(
        id="", source="lm_eval", task="text", modality="text", languages=(), input_ids=ids, labels=labels,
        token_types=np.full(len(ids), TEXT, dtype=np.uint8),
        position_ids=np.tile(np.arange(len(ids), dtype=np.float32), (3, 1)),
    )  # fmt: skip


# --- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HarnessTask(RunnableTask):
    """Tasks of lm-evaluation-harness under one name.

    Args:
        tasks: the harness's names, of tasks or groups.
        metric: the metric that is reported first, with the harness's filter behind a comma where a task has several.
        path: folder of further task files (YAML), which come before the harness's own of the same name.
        num_fewshot: examples in the prompt; None: as the task says.
        chat: prompts as conversations, for models that were trained on these.
    """

    tasks: tuple[str, ...] | list[str]
    num_fewshot: int | None = None
    chat: bool = False

    def decides(self, options: RunOptions) -> list[Any]:
        return [self._asked(options), lm_eval.__version__]

    def _asked(self, options: RunOptions) -> dict[str, Any]:
        return {
            "tasks": list(self.tasks), "path": self.path, "num_fewshot": self.num_fewshot, "chat": self.chat,
            "limit": options.limit,
        }  # fmt: skip

    def is_done(self, summary: Mapping[str, Any]) -> bool:
        return summary["metric"] == self.metric

    def find_out(self, model: Writer, encoder: SampleEncoder, files: TaskFiles, options: RunOptions) -> Outcome:
        """The harness asks, and keeps its answers in a cache among the parts. Raises ValueError for no such task or
        metric, data that cannot be had, or a model that only hears."""
        if not isinstance(model, OmniModel):
            raise ValueError(
                "the harness asks about text alone, and an AuT answers about recordings; name a Thinker's run"
            )
        manager = self._manager()
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        try:
            results = lm_eval.simple_evaluate(
                model=OmniLM(model, encoder, batch=options.batch, progress=options.progress),
                tasks=list(self.tasks), num_fewshot=self.num_fewshot, limit=options.limit,
                use_cache=str(files.parts / files.fingerprint), bootstrap_iters=0, log_samples=True,
                apply_chat_template=self.chat, task_manager=manager,
            )  # fmt: skip
        except (FileNotFoundError, ConnectionError) as error:
            raise ValueError(f"eval.tasks.{self.name}.tasks={list(self.tasks)}: {error}") from error
        assert results is not None
        samples, directions = results["samples"], results.get("higher_is_better", {})

        def metric(label: str) -> Metric:
            own = label.partition(",")[0]
            higher = next((found[own] for found in directions.values() if own in found), True)
            return Metric(name=label, higher_is_better=higher)

        pooled = _pooled(samples)
        names = sorted({label for label, _ in pooled})
        if self.metric not in names:
            raise ValueError(f"eval.tasks.{self.name}.metric={self.metric}: these tasks have {', '.join(names)}")
        overall = sorted((place for place in pooled if place[1] is None), key=lambda place: place[0] != self.metric)
        by_task = [place for place in pooled if place[0] == self.metric and place[1] is not None]
        shown = [*overall, *(by_task if len(samples) > 1 else ())]
        return Outcome(
            rows=list(self._rows(samples)),
            told={(metric(label), task): pooled[label, task] for label, task in shown},
            settings={"name": self.name, "metric": self.metric, **self._asked(options)},
            more={
                "versions": {name: str(version) for name, version in results["versions"].items()},
                "lm_eval": lm_eval.__version__,
            },
        )

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


def _pooled(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[tuple[str, str | None], list[Told]]:
    """Every metric that is a mean over items, or over the parts of items, of all tasks together (None) and of each:
    (name, with its filter behind a comma; task) -> sum and number of values of each item, and the item. Others
    (perplexities) are the harness's business."""
    pooled = defaultdict(list)
    for task, found in sorted(samples.items()):
        for sample in found:
            for name in sample["metrics"]:
                value = sample[name]
                parts = value if isinstance(value, list) else [value]
                if not all(isinstance(part, int | float) for part in parts):
                    continue
                label = name if sample["filter"] == "none" else f"{name},{sample['filter']}"
                for place in (None, task):
                    pooled[label, place].append(((sum(parts), len(parts)), f"{task}/{sample['doc_id']}"))
    return pooled
