"""What `generate` is asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from elm_jax.errors import ElmError, nearest


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen; names and meanings are those of Hugging Face's `generate`.

    Greedy by default, a beam search with `num_beams` above 1, and drawn with `do_sample`. An option
    that the chosen way would not look at is refused where it is set.

    Attributes:
      max_new_tokens: most tokens of a sequence, the end-of-sequence token included.
      min_new_tokens: the end-of-sequence token is not chosen before this many others.
      num_beams: hypotheses that a beam search keeps for each input.
      num_return_sequences: sequences returned for each input: the best beams, or so many draws.
      length_penalty: a finished beam's summed log-probability is divided by its length to this
        power; above 0 favours long ones.
      early_stopping: when a beam search leaves an input: True as soon as `num_beams` sequences have
        ended; False when the best running one, at its present length, is no better than the worst
        of them; 'never' when none could still become better.
      do_sample: whether tokens are drawn.
      temperature: scores are divided by it before a draw.
      top_k: draw among so many likeliest tokens; 0 is all.
      top_p: draw among the fewest likeliest tokens that hold this much probability; 1 is all.
      no_repeat_ngram_size: no run of so many tokens comes twice in a sequence; 0 is off.
      eos_id: the end-of-sequence token.
      pad_id: what follows the end of a sequence.

    Raises:
      ElmError: for a value out of its range, or an option without effect.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_id: int = 1
    pad_id: int = 0

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "num_beams": 1, "num_return_sequences": 1}
        for field in dataclasses.fields(self):
            value, minimum = getattr(self, field.name), least.get(field.name, 0)
            if field.type == "int":
                self._check(field.name, _is_int(value) and value >= minimum, f"at least {minimum}")
            elif field.type == "float":
                self._check(field.name, _is_number(value), "a finite number")
        self._check("do_sample", isinstance(self.do_sample, bool), "True or False")
        self._check(
            "early_stopping",
            isinstance(self.early_stopping, bool) or self.early_stopping == "never",
            "True, False or 'never'",
        )
        self._check("temperature", self.temperature > 0, "above 0")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check(
            "min_new_tokens",
            self.min_new_tokens <= self.max_new_tokens,
            f"at most max_new_tokens ({self.max_new_tokens})",
        )
        if self.do_sample and self.num_beams > 1:
            raise ElmError(
                f"do_sample with num_beams {self.num_beams}: a beam search does not draw; set "
                "num_beams=1, or num_return_sequences for several draws"
            )
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise ElmError(
                f"num_return_sequences {self.num_return_sequences} is more than the "
                f"{self.num_beams} that the search keeps; raise num_beams, or set do_sample=True"
            )
        self._check_needed("do_sample=True", self.do_sample, ("temperature", "top_k", "top_p"))
        self._check_needed(
            "num_beams above 1", self.num_beams > 1, ("length_penalty", "early_stopping")
        )

    def _check(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise ElmError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def _check_needed(self, what: str, given: bool, names: tuple[str, ...]) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not given and field.name in names and value != field.default:
                raise ElmError(f"{field.name}={value!r} has no effect without {what}")

    @property
    def hypotheses(self) -> int:
        """H, the sequences that are decoded side by side for each input."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


DECODINGS: Mapping[str, GenerationConfig] = {
    "greedy": GenerationConfig(),
    # Jang et al. 2023, Appendix C, compositional tasks. It also lists a temperature of 1 and early
    # stopping, which change nothing where tokens are drawn, and no number of beams.
    "appendix_c": GenerationConfig(do_sample=True, top_p=0.95, no_repeat_ngram_size=2),
}
"""Ways to generate text, by name."""


def get_decoding(name: str, **changes: Any) -> GenerationConfig:
    """Returns a way to generate text by name, with some of its options changed.

    Raises:
      ElmError: for an unknown name, with the nearest; or options that do not go together.

    >>> get_decoding('appendix_c', max_new_tokens=64).top_p
    0.95
    """
    if name not in DECODINGS:
        raise ElmError(
            f"no decoding {name!r}{nearest(name, DECODINGS)}; there are {', '.join(DECODINGS)}"
        )
    return dataclasses.replace(DECODINGS[name], **changes)
