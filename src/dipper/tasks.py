r"""Tasks with a right answer, from local files: what is asked, how it is scored, what it comes to.

Every task becomes `Item`s: a context and the continuations whose likelihoods decide. Prompts and figures are those of
lm-evaluation-harness (arc_easy, arc_challenge, piqa, hellaswag, lambada_openai, mmlu); `lm_harness` gives the same
items to it. A model answers through `PairScorer`; `evaluate_torch.TorchScorer` is one.

    items = read_task("piqa", "data/eval", limit=500)
    answer = score_items(items, scorer, encode, bos_id=bos_id)
    answer["acc"], answer["acc_stderr"]

Files under the data folder: `arc_easy_test.jsonl`, `arc_challenge_test.jsonl` ({"question": {"stem", "choices"},
"answerKey"}), `piqa_valid.jsonl` with `piqa_valid-labels.lst`, `hellaswag_val*.jsonl` ({"ctx", "endings", "label"}, ctx
preprocessed), `lambada_openai_test.jsonl` ({"text"}), `mmlu/test/*.csv` and `mmlu/dev/*.csv` without header.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dipper.errors import ConfigError
from dipper.evaluate import ResultFile

__all__ = ["TASKS", "Item", "Pair", "PairScorer", "encode_pair", "read_task", "run_tasks", "score_items", "task_files"]

Pair = tuple[list[int], list[int]]  # ids of a context (not empty) and of what follows it
Encode = Callable[[str], list[int]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """One question. The continuations start with the space that parts them from the context.

    Attributes:
        right: index of the right one; None where there is one continuation, right if greedy decoding gives it.
    """

    context: str
    continuations: tuple[str, ...]
    right: int | None


class PairScorer(Protocol):
    """Scores continuations."""

    def score_pairs(self, pairs: Sequence[Pair], progress: Progress | None = None) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation, nats, and whether greedy decoding would give it."""


# ------------------------------------------------------------------------------------------------ items


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _arc(path: Path) -> Iterator[Item]:
    for row in _rows(path):
        choices = row["question"]["choices"]
        right = [choice["label"] for choice in choices].index(row["answerKey"])
        context = f"Question: {row['question']['stem']}\nAnswer:"
        yield Item(context, tuple(f" {choice['text']}" for choice in choices), right)


def _piqa(path: Path) -> Iterator[Item]:
    labels = path.with_name(path.stem + "-labels.lst").read_text(encoding="ascii").split()
    for row, label in zip(_rows(path), labels, strict=True):
        yield Item(f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), int(label))


def _hellaswag(path: Path) -> Iterator[Item]:
    for row in _rows(path):
        yield Item(row["ctx"], tuple(f" {ending}" for ending in row["endings"]), int(row["label"]))


def _lambada(path: Path) -> Iterator[Item]:
    for row in _rows(path):
        context, _, word = row["text"].rpartition(" ")
        yield Item(context, (f" {word}",), None)


_LETTERS = "ABCD"


def _mmlu_question(row: Sequence[str]) -> str:
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, row[1:5], strict=True))
    return f"{row[0].strip()}\n{choices}\nAnswer:"


def _csv(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def _mmlu(path: Path, shots: int = 0) -> Iterator[Item]:
    subject = path.name.removesuffix("_test.csv")
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    if shots:
        for row in _csv(path.parent.parent / "dev" / f"{subject}_dev.csv")[:shots]:
            head += f"{_mmlu_question(row)} {row[5]}\n\n"
    for row in _csv(path):
        yield Item(head + _mmlu_question(row), tuple(f" {letter}" for letter in _LETTERS), _LETTERS.index(row[5]))


@dataclass(frozen=True)
class _Task:
    files: str  # pattern under the data folder
    read: Callable[..., Iterator[Item]]
    has_shots: bool = False
    beside: tuple[str, ...] = ()  # what `read` opens, too


TASKS = {
    "arc_easy": _Task("arc_easy_test.jsonl", _arc),
    "arc_challenge": _Task("arc_challenge_test.jsonl", _arc),
    "piqa": _Task("piqa_valid.jsonl", _piqa, beside=("piqa_valid-labels.lst",)),
    "hellaswag": _Task("hellaswag_val*.jsonl", _hellaswag),
    "lambada_openai": _Task("lambada_openai_test.jsonl", _lambada),
    "mmlu": _Task("mmlu/test/*_test.csv", _mmlu, has_shots=True, beside=("mmlu/dev/*_dev.csv",)),
}


def task_files(name: str) -> tuple[str, ...]:
    """Patterns of the files that a task is read from, under its data folder.

    Raises:
        ConfigError: the task is unknown.
    """
    task = _task(name)
    return (task.files, *task.beside)


def _task(name: str) -> _Task:
    if name not in TASKS:
        raise ConfigError(f"There is no task '{name}'; the tasks are {', '.join(TASKS)}.")
    return TASKS[name]


def read_task(
    name: str,
    data: str | os.PathLike[str],
    *,
    limit: int | None = None,
    seed: int | None = None,
    shots: int = 0,
) -> list[Item]:
    """The items of a task.

    Args:
        name: a key of `TASKS`.
        data: the folder of the files named above.
        limit: items at most, of each file (MMLU has one a subject).
        seed: draw those items at random, in the order of the file; None: the first.
        shots: answered questions before each (MMLU).

    Raises:
        ConfigError: the task is unknown, its files are absent or broken, or it takes no shots.
    """
    task = _task(name)
    if shots and not task.has_shots:
        raise ConfigError(f"{name} is asked without examples; leave --shots out.")
    if limit is not None and limit < 1:
        raise ConfigError(f"The limit is {limit}; at least 1 item is needed.")
    paths = sorted(Path(data).glob(task.files))
    if not paths:
        raise ConfigError(
            f"There is no {Path(data) / task.files}, which {name} is read from; give its folder as --data."
        )
    items = []
    for path in paths:
        try:
            read = list(task.read(path, shots) if task.has_shots else task.read(path))
        except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
            raise ConfigError(f"{path} is not as {name} needs it ({type(error).__name__}: {error}).") from None
        items += _some(read, limit, seed)
    return items


def _some(items: list[Item], limit: int | None, seed: int | None) -> list[Item]:
    if limit is None or limit >= len(items):
        return items
    if seed is None:
        return items[:limit]
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


# ------------------------------------------------------------------------------------------------ scores


def encode_pair(encode: Encode, context: str, continuation: str, *, bos_id: int | None, empty_id: int) -> Pair:
    """Ids of a context and of what follows it, parted as lm-evaluation-harness does.

    The two are encoded together and parted where the context's own ids end, so that a token may reach over the border;
    spaces at the context's end go to the continuation, where tokenizers want them.

    Args:
        encode: text to ids, without BOS.
        context: may be empty.
        continuation: what is scored; not empty.
        bos_id: put before the context; None where the model wants none.
        empty_id: stands for an empty context of such a model.

    Returns:
        Two lists, neither of them empty.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    head = [] if bos_id is None else [bos_id]
    before, ids = head + (encode(context) if context else []), head + encode(context + continuation)
    if not before:
        return [empty_id], ids
    n_context = min(len(before), len(ids) - 1)  # something is scored even where the two melt into the context's tokens
    return ids[:n_context], ids[n_context:]


def score_items(
    items: Sequence[Item],
    scorer: PairScorer,
    encode: Encode,
    *,
    bos_id: int | None = None,
    empty_id: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answers every item and says how many were right.

    Args:
        items: of one task.
        scorer: the model.
        encode: text to ids, without BOS.
        bos_id, empty_id: see `encode_pair`.
        progress: called with (pairs done, pairs in all).

    Returns:
        `n`; `acc` and `acc_stderr`; with choices `acc_norm` and `acc_norm_stderr` (log likelihood by character, as in
        lm-evaluation-harness), else `perplexity` and `perplexity_stderr` of the continuations.
    """
    pairs = [
        encode_pair(encode, item.context, text, bos_id=bos_id, empty_id=empty_id)
        for item in items
        for text in item.continuations
    ]
    scored = iter(scorer.score_pairs(pairs, progress))
    answers = [[next(scored) for _ in item.continuations] for item in items]
    return {"n": len(items), **_figures(items, answers)}


def _figures(items: Sequence[Item], answers: Sequence[Sequence[tuple[float, bool]]]) -> dict[str, float | None]:
    if items[0].right is None:
        losses = [-answer[0][0] for answer in answers]
        mean, stderr = _mean(losses)
        perplexity = math.exp(min(mean, 700.0))
        return {
            **_named("acc", [float(answer[0][1]) for answer in answers]),
            "perplexity": perplexity,
            "perplexity_stderr": None if stderr is None else perplexity * stderr,  # to first order
        }
    right, right_by_length = [], []
    for item, answer in zip(items, answers, strict=True):
        likelihoods = np.array([value for value, _ in answer])
        lengths = np.array([len(text) - 1 for text in item.continuations])  # without the space that parts them
        right.append(float(np.argmax(likelihoods) == item.right))
        right_by_length.append(float(np.argmax(likelihoods / np.maximum(lengths, 1)) == item.right))
    return {**_named("acc", right), **_named("acc_norm", right_by_length)}


def _named(name: str, values: Sequence[float]) -> dict[str, float | None]:
    mean, stderr = _mean(values)
    return {name: mean, f"{name}_stderr": stderr}


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error, None for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


# ------------------------------------------------------------------------------------------------ several tasks


def run_tasks(
    names: Sequence[str],
    data: str | os.PathLike[str],
    scorer: PairScorer,
    encode: Encode,
    *,
    config: Mapping[str, Any],
    head: Mapping[str, Any],
    bos_id: int | None = None,
    empty_id: int = 0,
    limit: int | None = None,
    seed: int | None = None,
    shots: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Runs tasks one after the other.

    Args:
        names: keys of `TASKS`.
        data, limit, seed, shots: see `read_task`.
        scorer, encode, bos_id, empty_id: see `score_items`.
        config: JSON types that say what answers; with the arguments above, what a rerun must agree in.
        head: further keys of the result.
        out: keep the result here; tasks that it already has are not run again.
        progress: called with (task, pairs done, pairs in all).

    Returns:
        `schema`, the head, `config`, and `tasks`: by name, the figures of `score_items`, the sha256 of the items and
        the seconds they took.

    Raises:
        ConfigError: see `read_task`, or `out` holds another run's result.
    """
    asked = {**config, "limit": limit, "seed": seed, "shots": shots}
    file = ResultFile(out, asked, key="tasks", head={"schema": "dipper-tasks/1", **head})
    every = {name: read_task(name, data, limit=limit, seed=seed, shots=shots) for name in names}  # errors come first
    for name, items in every.items():
        sha256 = hashlib.sha256(json.dumps([asdict(item) for item in items]).encode()).hexdigest()
        if file.parts.get(name, {}).get("items_sha256") == sha256:
            continue
        told = None if progress is None else partial(progress, name)
        start_s = time.perf_counter()
        figures = score_items(items, scorer, encode, bos_id=bos_id, empty_id=empty_id, progress=told)
        file.save(name, {**figures, "items_sha256": sha256, "seconds": time.perf_counter() - start_s})
    return {**file.content(), "tasks": {name: file.parts[name] for name in names}}
