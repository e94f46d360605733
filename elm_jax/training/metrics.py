"""Training metrics on disk: a JSONL file and TensorBoard events, consistent across a resume."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from elm_jax.errors import ElmError

_LOG = logging.getLogger(__name__)


class MetricsWriter:
    """Appends records to `<run>/metrics.jsonl` and scalars to `<run>/tensorboard/`.

    A resumed run starts from `resume(step)`, which drops what came after its checkpoint, so that
    no step is there twice.

    Args:
      folder: the run's folder.
      tensorboard: whether to write event files too (needs the package tensorboardX).
      write: whether to write at all; of several processes, one does.
    """

    def __init__(self, folder: str | Path, *, tensorboard: bool = True, write: bool = True) -> None:
        self.path = epath.Path(folder) / "metrics.jsonl"
        self.records: list[dict[str, Any]] = []
        self._write = write
        self._events: Any = None
        if write:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if tensorboard and write:
            try:
                from tensorboardX.event_file_writer import EventsWriter
            except ImportError:
                _LOG.info("no TensorBoard events: the package tensorboardX is not installed")
            else:
                # Its SummaryWriter would write from a thread, where a full disk cannot be caught.
                events = self.path.parent / "tensorboard"
                events.mkdir(exist_ok=True)
                self._events = EventsWriter(os.fspath(events / "events"), f".{os.getpid()}")

    def resume(self, step: int) -> None:
        """Keeps the records up to `step` and drops the rest, torn last line included."""
        self.records = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    break  # torn by a kill; nothing after it can be newer than the checkpoint
                if record["step"] <= step:
                    self.records.append(record)
        if not self._write:
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        temporary.replace(self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds one record: 'step', run-wide numbers, and 'experts' {id: {name: number}}."""
        self.records.append(dict(record))
        if not self._write:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._events is not None:
            scalars = {k: v for k, v in record.items() if isinstance(v, (int, float))}
            for expert, values in record.get("experts", {}).items():
                scalars.update({f"{expert}/{name}": value for name, value in values.items()})
            self._write_event(int(scalars.pop("step")), scalars)

    def _write_event(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._events.write_event(event)
        self._events.flush()

    def history(self, expert: str) -> list[dict[str, float]]:
        """Returns an expert's curve: list of {'step', 'loss', 'accuracy', ...}."""
        return [
            {"step": record["step"], **record["experts"][expert]}
            for record in self.records
            if expert in record.get("experts", {})
        ]

    def close(self) -> None:
        """Closes the event file."""
        if self._events is not None:
            self._events.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl.

    Raises:
      ElmError: naming file and line where it is not JSON.
    """
    records = []
    for number, line in enumerate(epath.Path(path).read_text().splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ElmError(f"{path}:{number}: broken JSON ({error})") from None
    return records
