"""The one text form in which instances are embedded, keys and queries alike, and its reader."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from elm_jax.errors import ElmError

TEXT_FORMAT = "Answer Choices: {answer_choices}, Instance: {inputs}"
"""Recorded beside every key, so that keys of an older form are never searched with a newer one."""


def format_instance(inputs: str, answer_choices: Sequence[str] | None = None) -> str:
    """Returns the text of one instance that the embedder sees.

    Args:
      inputs: the prompted input.
      answer_choices: the rendered answer choices; None or empty where the task has none.

    Returns:
      The answer choices, joined by single bars, in front of the input.

    Source: Jang et al. 2023 (ELM), Retrieval of Experts. The authors' code embeds the template's
    unrendered choice expression instead; here both sides see the rendered choices.

    >>> format_instance('Is it good?', ['yes', 'no'])
    'Answer Choices: yes|no, Instance: Is it good?'
    >>> format_instance('Summarize: ...')
    'Answer Choices: None, Instance: Summarize: ...'
    """
    choices = "|".join(answer_choices) if answer_choices else "None"
    return TEXT_FORMAT.format(answer_choices=choices, inputs=inputs)


def read_texts(path: epath.PathLike) -> list[str]:
    """Reads instances, one JSON object a line, as texts to embed.

    Args:
      path: a .jsonl or .jsonl.gz file; each line has `inputs` (or `input`) and optionally
        `answer_choices`, a list of strings. Other keys are ignored, as are blank lines.

    Returns:
      The formatted texts, in file order.

    Raises:
      FileNotFoundError: if there is no such file.
      ElmError: if a line is broken (named by file and line), or the file holds no instance.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no instances file {path}")
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ElmError(f"{path} is truncated or no UTF-8 text: {error}") from error
    texts = [
        _parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not texts:
        raise ElmError(f"{path} holds no instances; expected one JSON object a line")
    return texts


def _parse(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ElmError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise ElmError(f"{where}: expected a JSON object, got {type(row).__name__}")
    inputs, choices = row.get("inputs", row.get("input")), row.get("answer_choices")
    if not isinstance(inputs, str) or not inputs.strip():
        raise ElmError(f"{where}: needs 'inputs' (or 'input'), a non-empty string")
    if choices is not None and not (
        isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    ):
        raise ElmError(f"{where}: 'answer_choices' must be a list of strings or null")
    text = format_instance(inputs, choices)
    try:
        text.encode()  # JSON can spell lone surrogates, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ElmError(f"{where}: holds a lone surrogate, which is no valid text") from error
    return text
