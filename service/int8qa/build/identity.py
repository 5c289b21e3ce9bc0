"""What an outcome depends on: choices, data, code, versions, machine.

In: options, questions, the installation and the machine it runs on. Out: names and
hashes, so that a build or a finding is used again only where it would come out the
same. Measures nothing.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from int8qa import __version__
from int8qa.build.checkpoint import CheckpointFiles
from int8qa.build.cpu import cpu_features
from int8qa.build.engines.tensorrt_lock import read_builder_lock
from int8qa.build.manifest import MANIFEST_VERSION, describe_recipe
from int8qa.build.options import BuildOptions
from int8qa.build.repository import hash_file
from int8qa.build.stored_ranges import has_ranges
from int8qa.build.subject import data_name
from int8qa.errors import MissingDependencyError
from int8qa.reader.squad import SquadQuestion

_VERSIONED = ("torch", "transformers", "nvidia-modelopt", "onnx", "openvino")


def identify_build(
    options: BuildOptions, files: CheckpointFiles
) -> tuple[str, dict[str, Any]]:
    """Hash over all that shapes a build, and the parts by name.

    Raises:
        MissingDependencyError: torch, ModelOpt or OpenVINO is not installed.
    """
    sources = options.sources
    identity = {
        "checkpoint": files.name,
        "recipe": describe_recipe(options.choose_recipe(files.directory)),
        "calibrator": options.calibrator.name,
        "keeps_trained": options.keep_trained and has_ranges(files.directory),
        "smooth": options.smooth,
        "mixed": options.mixed,
        "calibration_limit": sources.calibration_limit,
        "calibration_data": data_name(sources.calibration, "calibration"),
        "evaluation_limit": sources.evaluation_limit,
        "evaluation_data": data_name(sources.evaluation, "evaluation"),
        "gate": options.gate,
        "target": options.target,
        "manifest_version": MANIFEST_VERSION,
        "checkpoint_sha256": files.sha256,
        "calibration_sha256": hash_file(sources.calibration),
        "evaluation_sha256": hash_file(sources.evaluation),
        "versions": read_versions(),
        "code_sha256": hash_code(),
        "machine": describe_machine(),
    }
    if options.plans is not None:
        lock = read_builder_lock(options.plans).describe()
        del lock["driver"]  # a newer one runs the same plans
        identity["tensorrt"] = lock
    return hash_parts(identity), identity


def read_versions() -> dict[str, str]:
    """Versions of what shapes a build.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
    try:
        return {"int8qa": __version__} | {
            package: metadata.version(package) for package in _VERSIONED
        }
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"the build stage needs {error.name}: run `make install` in the checkout, "
            f"or pip install -e '.[build,cpu]'"
        ) from error


def hash_code() -> str:
    """Hash of the build stage's own source: a changed pass is a changed build."""
    root = Path(str(resources.files("int8qa")))
    digest = hashlib.sha256()
    for path in sorted(
        [*(root / "build").rglob("*.py"), *(root / "reader").glob("*.py")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def describe_machine() -> str:
    """The architecture and the instruction sets that decide which kernels run."""
    return f"{platform.machine()} {' '.join(cpu_features())}"


def hash_questions(questions: Iterable[SquadQuestion]) -> str:
    """Hash of questions in their order: ids, texts, contexts and gold answers."""
    return hash_parts([asdict(question) for question in questions])


def hash_parts(parts: Any) -> str:
    """SHA-256 of anything made of JSON types, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
