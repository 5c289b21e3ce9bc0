"""The output directory of a run, while it runs and after.

In: a path, and what the run depends on. Out: a folder for what can be resumed, and at
the end the checkpoint, complete or absent. A directory that holds anything else is
never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from int8qa.build.stored_ranges import RANGES_FILENAME, StoredRanges, write_ranges
from int8qa.errors import ConfigurationError, RepositoryError

REPORT_FILENAME = "training.json"
"""Written last: where it is, the run is finished."""
_SCRATCH = ".training"
_RUN = "run.json"


class Workspace:
    """One output directory."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.scratch = output / _SCRATCH
        self.final = self.scratch / "final"

    def read_report(self, options: dict[str, Any]) -> dict[str, Any] | None:
        """The report of a finished run; None if there is none.

        Args:
            options: of the run that is asked for.

        Raises:
            RepositoryError: the report is damaged.
            ConfigurationError: the run was made with other options.
        """
        path = self.output / REPORT_FILENAME
        if not path.is_file():
            return None
        try:
            report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            _check_same(report["options"], options)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise RepositoryError(
                f"{path} is no report of a training run ({type(error).__name__}); give "
                f"a new directory for --output"
            ) from error
        # Killed while it cleared up.
        shutil.rmtree(self.scratch, ignore_errors=True)
        return report

    def check(self, *, resume: bool) -> None:
        """Refuse a directory that cannot be written, before anything slow begins.

        Raises:
            RepositoryError: it is a file, or not empty and not a run to be resumed.
        """
        output = self.output
        if output.exists() and not output.is_dir():
            raise RepositoryError(f"{output} is a file; give a directory for --output")
        if not output.is_dir() or not any(output.iterdir()):
            return
        if not (self.scratch / _RUN).is_file():
            raise RepositoryError(
                f"{output} is not empty and holds no run to resume; give a new "
                f"directory for --output"
            )
        if not resume:
            raise RepositoryError(
                f"{output} holds an unfinished run; add --resume to go on with it, or "
                f"give a new directory for --output"
            )

    def open(self, description: dict[str, Any]) -> int:
        """Make the folder, or hold a run to be resumed to what it began as.

        Returns:
            How often it has been resumed, this time included; 0 for a new run.

        Raises:
            RepositoryError: the directory cannot be written.
            ConfigurationError: the run began with other options, data or checkpoint.
        """
        path = self.scratch / _RUN
        if path.is_file():
            _check_same(json.loads(path.read_text(encoding="utf-8")), description)
            return self._count_resumption()
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".new")
            aside.write_text(json.dumps(description, indent=2), encoding="utf-8")
            aside.rename(path)
        except OSError as error:
            raise RepositoryError(
                f"cannot write to {self.output}: {error.strerror}"
            ) from error
        return 0

    def _count_resumption(self) -> int:
        path = self.scratch / "resumed"
        count = 1 + (int(path.read_text()) if path.is_file() else 0)
        aside = path.with_suffix(".new")
        aside.write_text(str(count))
        aside.rename(path)
        return count

    def forget(self) -> None:
        """Take back ``open`` of a run that never began."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # someone else's files
            self.output.rmdir()

    def keep_ranges(self, ranges: StoredRanges) -> None:
        """Write what a run with quantizers begins with."""
        aside = self.scratch / "aside"
        aside.mkdir(exist_ok=True)
        write_ranges(aside, ranges).rename(self.scratch / RANGES_FILENAME)

    def begin_final(self) -> Path:
        """An empty folder for what will be published."""
        shutil.rmtree(self.final, ignore_errors=True)
        self.final.mkdir()
        return self.final

    def publish(self, report: dict[str, Any]) -> None:
        """Move the finished files out, the report last, and clear up."""
        for path in self.final.iterdir():
            os.replace(path, self.output / path.name)  # noqa: PTH105
        aside = self.scratch / REPORT_FILENAME
        aside.write_text(
            json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8"
        )
        aside.rename(self.output / REPORT_FILENAME)
        shutil.rmtree(self.scratch)


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    # Through JSON: a tuple written is a list read.
    now = json.loads(json.dumps(now))
    changed = sorted(
        name for name in before.keys() | now.keys() if before.get(name) != now.get(name)
    )
    if changed:
        raise ConfigurationError(
            f"this run began with another {', '.join(changed)}; repeat the first "
            f"command and add --resume, or give a new directory for --output"
        )
