"""lm-evaluation-harness with dipper's models and methods, through its own tasks and its own command line.

    python -m dipper.lm_harness --model dipper --model_args source=smollm2,method=dip,density=0.6 --tasks arc_easy

`DipperLM` registers itself as `dipper` when this module is imported, which the harness's own entry point does not do;
so the command above is the harness's, all its options included. `local_tasks` makes harness tasks of the local files of
`dipper.tasks`: the same items, scored by the harness.

Needs the `torch` and `tasks` extras.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dipper.errors import ConfigError
from dipper.tasks import Item, encode_pair, read_task

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.api.task import ConfigurableTask
except ImportError as error:
    raise ConfigError(f"lm-evaluation-harness is missing ({error}); run `pip install 'dipper[tasks]'`.") from error

if TYPE_CHECKING:
    from dipper.evaluate_torch import Opened

__all__ = ["DipperLM", "local_tasks"]


@register_model("dipper")
class DipperLM(LM):  # type: ignore[misc]
    """A model with a pruning rule, as the harness sees it."""

    def __init__(
        self,
        source: str | None = None,
        method: str = "dense",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        calibration: str | None = None,
        calibration_text: str | None = None,
        opened: Opened | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """Loads a model.

        Args:
            source: a bundle, a GGUF file, a Hugging Face folder, or a name that `dipper pull` knows.
            method: a rule of `dipper.methods`; `options` are its others, such as density.
            device: of PyTorch; None: cuda where there is one.
            dtype: fp32, bf16 or fp16; None: fp32.
            batch_size: sequences at once; "auto" is 16.
            max_length: positions at most; None: the model's.
            calibration, calibration_text: see `evaluate_torch.open_sparse`.
            opened: a model that is loaded already, in place of all but `batch_size` and `max_length`.
            max_batch_size: the harness gives it, and nothing here needs it.

        Raises:
            ConfigError: neither a source nor a model was given, or an option is unknown.
        """
        super().__init__()
        import torch

        from dipper.evaluate_torch import TorchScorer, open_sparse

        self._open = ExitStack()
        if opened is None:
            if source is None:
                raise ConfigError("No model was given; use --model_args source=MODEL.")
            wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
            given = {"name": method, **options}
            opened = self._open.enter_context(
                open_sparse(
                    source,
                    given,
                    device=wanted,
                    dtype=dtype,
                    context=max_length,
                    calibration=calibration,
                    calibration_text=calibration_text,
                )
            )
        batch = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.scorer = TorchScorer(opened, batch=batch, context=max_length)
        self.opened, self.max_length = opened, self.scorer.context

    @property
    def tokenizer_name(self) -> str:
        """Names caches of requests."""
        return str(self.opened.loaded.fingerprint)

    @property
    def _ends(self) -> list[int]:
        tokenizer = self.opened.loaded.tokenizer
        return [] if tokenizer is None else list(tokenizer.eos_ids)

    @property
    def _first_id(self) -> int:
        """Stands before a text that has no context: BOS, or an end of text."""
        bos_id = self.opened.loaded.bos_id
        return bos_id if bos_id is not None else next(iter(self._ends), 0)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation, and whether it is greedy."""
        loaded = self.opened.loaded
        pairs = [
            encode_pair(loaded.encode, *request.args, bos_id=loaded.bos_id, empty_id=self._first_id)
            for request in requests
        ]
        return self._score(pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood of each text as a whole, every token with as much before it as a window allows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pairs, owners = [], []
        for i, request in enumerate(requests):
            ids = self.opened.loaded.encode(request.args[0])
            for window in get_rolling_token_windows(ids, self._first_id, self.max_length, context_len=1):
                context, after = make_disjoint_window(window)
                pairs.append((list(context), list(after)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            sums[i] += value
        return sums

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], silent: bool) -> list[tuple[float, bool]]:
        from tqdm import tqdm

        with tqdm(total=len(pairs), disable=silent) as bar:
            scored: list[tuple[float, bool]] = self.scorer.score_pairs(pairs, lambda done, _: bar.update(done - bar.n))
        return scored

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to a stop string, an end of text or `max_gen_toks` tokens."""
        from tqdm import tqdm

        return [self._generate(*request.args) for request in tqdm(requests, disable=disable_tqdm)]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        import torch

        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise ConfigError("Only greedy generation is done here; leave do_sample out, or use temperature 0.")
        loaded = self.opened.loaded
        if loaded.tokenizer is None:
            raise ConfigError(f"{loaded.name} has no tokenizer that turns ids into text; tasks that generate need one.")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        n_new = int(settings.get("max_gen_toks", 256))
        head = [] if loaded.bos_id is None else [loaded.bos_id]
        ids = (head + loaded.encode(context))[-max(self.max_length - n_new, 1) :] or [self._first_id]
        cache, new, text = None, list[int](), ""
        step = torch.tensor([ids], device=self.opened.model.device)
        with torch.inference_mode():
            while len(new) < n_new:
                output = self.opened.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, token = output.past_key_values, int(output.logits[0, -1].argmax())
                if token in self._ends:
                    break
                new.append(token)
                text = loaded.tokenizer.decode(new)
                if any(stop in text for stop in stops):
                    break
                step = torch.tensor([[token]], device=step.device)
        return text[: min([len(text), *(text.find(stop) for stop in stops if stop in text)])]


def local_tasks(names: Sequence[str], data: str, **options: Any) -> list[Any]:
    """Harness tasks of local files, for `lm_eval.simple_evaluate(model=DipperLM(...), tasks=...)`.

    Args:
        names: keys of `dipper.tasks.TASKS`.
        data: their folder.
        options: limit, seed and shots of `dipper.tasks.read_task`.

    Returns:
        Tasks named `local_NAME`.
    """
    return [_harness_task(f"local_{name}", read_task(name, data, **options)) for name in names]


def _harness_task(name: str, items: Sequence[Item]) -> Any:
    from datasets import Dataset

    is_choice = items[0].right is not None
    docs = [{"context": i.context, "texts": [t[1:] for t in i.continuations], "right": i.right} for i in items]
    metrics = {"acc": "mean", **({"acc_norm": "mean"} if is_choice else {"perplexity": "perplexity"})}
    target: Callable[[dict[str, Any]], Any] = (lambda d: d["right"]) if is_choice else (lambda d: " " + d["texts"][0])
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "output_type": "multiple_choice" if is_choice else "loglikelihood",
        "doc_to_text": lambda doc: doc["context"],
        "doc_to_target": target,
        "target_delimiter": " ",  # of choices only
        "metric_list": [{"metric": metric, "aggregation": kind} for metric, kind in metrics.items()],
    }
    if is_choice:
        config["doc_to_choice"] = lambda doc: doc["texts"]
    return ConfigurableTask(config=config)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
