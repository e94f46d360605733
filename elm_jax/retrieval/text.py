"""The text forms in which instances are embedded, keys and queries alike, and their reader."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from elm_jax.errors import ElmError, nearest

TEXT_FORMATS = {
    "choices_and_instance": "Answer Choices: {answer_choices}, Instance: {inputs}",
    "labels_and_instance": "Answer Choices: {label_list}, Instance: {inputs}",
    "instance": "Instance: {inputs}",
    "choices": "Answer Choices: {answer_choices}",
    "labels": "Answer Choices: {label_list}",
    "bare_instance": "{inputs}",
    "bare_choices": "{answer_choices}",
    "bare_labels": "{label_list}",
    "choices_sep_instance": "{answer_choices}</s>{inputs}",
    "labels_sep_instance": "{label_list}</s>{inputs}",
}
"""The forms compared by Jang et al. 2023 (ELM), Table 10. `answer_choices` are joined by bars, and
'None' where there are none; `label_list` is joined by commas, and empty where there are none."""
TEXT_FORMAT = TEXT_FORMATS["choices_and_instance"]
"""The paper's choice. A form is recorded beside keys, so that none is searched with another."""


def text_format(name: str) -> str:
    """Returns a form by its name, or as it is if it is one.

    Raises:
      ElmError: for any other, with the nearest name.

    >>> text_format('instance')
    'Instance: {inputs}'
    """
    if name in TEXT_FORMATS.values():
        return name
    if name not in TEXT_FORMATS:
        raise ElmError(
            f"unknown text format {name!r}{nearest(name, TEXT_FORMATS)}; "
            f"accepted: {', '.join(TEXT_FORMATS)}"
        )
    return TEXT_FORMATS[name]


def format_instance(
    inputs: str, answer_choices: Sequence[str] | None = None, form: str = TEXT_FORMAT
) -> str:
    """Returns the text of one instance that the embedder sees.

    Args:
      inputs: the prompted input.
      answer_choices: the rendered answer choices; None or empty where the task has none.
      form: one of `TEXT_FORMATS`, or its name.

    Returns:
      The answer choices, joined by single bars, in front of the input; or what `form` says.

    Source: Jang et al. 2023 (ELM), Retrieval of Experts and Table 10. The authors' code embeds the
    template's unrendered choice expression instead; here both sides see the rendered choices.

    >>> format_instance('Is it good?', ['yes', 'no'])
    'Answer Choices: yes|no, Instance: Is it good?'
    >>> format_instance('Summarize: ...')
    'Answer Choices: None, Instance: Summarize: ...'
    >>> format_instance('Is it good?', ['yes', 'no'], 'labels_sep_instance')
    'yes, no</s>Is it good?'
    """
    given = answer_choices or ()
    choices = "|".join(given) if given else "None"
    return text_format(form).format(
        answer_choices=choices, label_list=", ".join(given), inputs=inputs
    )


def read_texts(path: epath.PathLike, form: str = TEXT_FORMAT) -> list[str]:
    """Reads instances, one JSON object a line, as texts to embed.

    Args:
      path: a .jsonl or .jsonl.gz file; each line has `inputs` (or `input`) and optionally
        `answer_choices`, a list of strings. Other keys are ignored, as are blank lines.
      form: one of `TEXT_FORMATS`, or its name.

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
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        lines = text.decode("utf-8-sig").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ElmError(f"{path} is truncated or no UTF-8 text: {error}") from error
    texts = [
        _parse(line, f"{path}:{number}", form)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not texts:
        raise ElmError(f"{path} holds no instances; expected one JSON object a line")
    return texts


def _parse(line: str, where: str, form: str) -> str:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ElmError(f"{where}: broken JSON ({error})") from error
    if not isinstance(row, dict):
        raise ElmError(f"{where}: expected a JSON object, got {type(row).__name__}")
    inputs, choices = row.get("inputs", row.get("input")), row.get("answer_choices")
    if not isinstance(inputs, str) or not inputs.strip():
        raise ElmError(f"{where}: needs 'inputs' (or 'input'), a non-empty string")
    if choices is not None and not (
        isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    ):
        raise ElmError(f"{where}: 'answer_choices' must be a list of strings or null")
    text = format_instance(inputs, choices, form)
    try:
        text.encode()  # JSON can spell lone surrogates, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ElmError(f"{where}: holds a lone surrogate, which is no valid text") from error
    return text
