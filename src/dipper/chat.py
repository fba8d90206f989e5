"""A conversation that keeps its KV and column caches over turns.

Every turn renders the whole conversation with the bundle's template and prefills only what the engine does not hold
yet. Where the rendering does not begin with what is held (a template that rewrites earlier turns, text cut at a stop
string), the KV cache is emptied, the conversation is prefilled anew and `was_reset` says so. The column cache stays.

    chat = Conversation(engine, tokenizer, system="Answer in one sentence.")
    for step in chat.send("Why is the sky blue?", max_new_tokens=64):
        print(step.text, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dipper.errors import ConfigError
from dipper.generate import GenerationStep, Sampling, stream_generate

if TYPE_CHECKING:
    from dipper.engine import Engine
    from dipper.tokenizer import Tokenizer

__all__ = ["Conversation"]


class Conversation:
    """Messages, and the token ids that the engine's KV cache holds for them."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, system: str | None = None) -> None:
        if not tokenizer.has_chat_template:
            raise ConfigError("This bundle has no chat template; use `dipper run --raw` to complete plain text.")
        self.was_reset = False  # by the latest turn
        self._engine = engine
        self._tokenizer = tokenizer
        self._system = system
        self._n_turns = 0
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation; the column cache stays warm."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self._held: list[int] = []
        self._engine.reset()

    def send(
        self, text: str, *, max_new_tokens: int, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Iterator[GenerationStep]:
        """One turn.

        A turn that fails or is given up before its first token leaves the conversation as it was; one that is given up
        later (the iterator closed, Ctrl-C) keeps the part of the answer that was shown.

        Args:
            text: what the user says.
            max_new_tokens: of the answer.
            sampling: greedy by default; the turn's number is added to its seed.
            stop: strings that end the answer.

        Returns:
            The steps of the answer.

        Raises:
            ConfigError: the conversation does not fit into the context.
        """
        sampling = sampling or Sampling()
        sampling = replace(sampling, seed=sampling.seed + self._n_turns)
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self._tokenizer.encode_chat(messages)
        new = self._new_part(tokens, max_new_tokens)
        steps = stream_generate(
            self._engine, self._tokenizer, new, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
        )
        return self._follow(steps, messages, tokens)

    def _new_part(self, tokens: list[int], max_new_tokens: int) -> list[int]:
        """What is still to be prefilled; empties the KV cache when the rendering does not extend it."""
        if len(tokens) > self._engine.context:
            raise ConfigError(
                f"The conversation has {len(tokens)} tokens and the context is {self._engine.context}: "
                f"start a new one, or use --ctx {len(tokens) + max_new_tokens}."
            )
        n_held = len(self._held)
        self.was_reset = self._held != tokens[:n_held] or n_held >= len(tokens)
        if self.was_reset:
            self._engine.reset()
            self._held, n_held = [], 0
        return tokens[n_held:]

    def _follow(
        self, steps: Iterator[GenerationStep], messages: list[dict[str, str]], tokens: list[int]
    ) -> Iterator[GenerationStep]:
        answer: str | None = None
        try:
            for step in steps:
                tokens.append(step.token)
                answer = (answer or "") + step.text
                yield step
        finally:
            # Ctrl-C may come anywhere: what the engine says it holds is what counts.
            self._held = tokens[: self._engine.n_past]
            if answer is not None:
                self.messages = [*messages, {"role": "assistant", "content": answer}]
                self._n_turns += 1
