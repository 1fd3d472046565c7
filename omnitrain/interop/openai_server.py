"""Servers that speak the OpenAI protocol: vLLM and the like. Needs the extra `post`.

A configuration is data from anyone, and may name any server: a key is sent to no host but the one that the user has
given it for, in the environment variable OMNITRAIN_API_KEYS (``HOST=KEY,HOST=KEY``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

KEYS_VARIABLE = "OMNITRAIN_API_KEYS"


class ServerError(RuntimeError):
    """A server that is not there, or answers what the protocol does not have."""


class OpenAIServer:
    """The server at `url` (as ``http://localhost:8000/v1``) and the model that it calls `model`."""

    def __init__(self, url: str, model: str, *, timeout: float = 120.0) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ServerError("servers of the OpenAI protocol need the extra `post`: uv pip install openai") from error
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server {url!r} is no URL such as http://localhost:8000/v1")
        self.url, self.model = url, model
        keys = dict(pair.strip().split("=", 1) for pair in os.environ.get(KEYS_VARIABLE, "").split(",") if "=" in pair)
        key = keys.get(parts.hostname, "none")
        self._client = OpenAI(base_url=url, api_key=key, organization="", project="", timeout=timeout)

    def prompt_log_probs(self, ids: Sequence[int], k: int, vocabulary: dict[str, int]) -> list[dict[int, float]]:
        """What the model would have written at each position of `ids`: position i tells the k likeliest tokens (and
        perhaps ids[i] itself) after ids[:i], token -> log-probability; the first tells none, and one more those after
        the last.

        Args:
            vocabulary: id of every token by its spelling, for servers that do not answer ``token_id:7``.

        Raises ServerError: no answer, or one without top log-probabilities of the prompt (`echo`).
        """
        answer = self._ask(
            self._client.completions.create, prompt=list(ids), max_tokens=1, echo=True, logprobs=k, temperature=0.0,
            extra_body={"return_tokens_as_token_ids": True},
        )  # fmt: skip
        told = getattr(answer.choices[0].logprobs, "top_logprobs", None) if answer.choices else None
        if told is None or len(told) <= len(ids):
            raise ServerError(f"{self.url} tells no top log-probabilities of a prompt (`echo` with `logprobs`)")
        return [{self._id(t, vocabulary): p for t, p in (at or {}).items()} for at in told[: len(ids) + 1]]

    def _id(self, token: str, vocabulary: dict[str, int]) -> int:
        number = token.removeprefix("token_id:")
        if number != token and number.isdigit():
            return int(number)
        if token not in vocabulary:
            raise ServerError(f"{self.url} tells of a token {token!r}, which the student's tokenizer does not have")
        return vocabulary[token]

    def chat(self, text: str, max_tokens: int = 256) -> str:
        """The greedy answer to one message of the user. Raises ServerError: there is none."""
        message: Any = {"role": "user", "content": text}
        answer = self._ask(
            self._client.chat.completions.create, messages=[message], max_tokens=max_tokens, temperature=0.0
        )
        content = answer.choices[0].message.content if answer.choices else None
        if content is None:
            raise ServerError(f"{self.url} gave no answer")
        return content

    def _ask(self, call: Any, **arguments: Any) -> Any:
        from openai import OpenAIError

        try:
            return call(model=self.model, **arguments)
        except OpenAIError as error:
            raise ServerError(f"{self.url}, model {self.model!r}: {error}") from error
