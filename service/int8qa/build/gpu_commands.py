"""The command about TensorRT's plans beside ``build``: ``check``.

In: a model repository. Out: whether its plans can be loaded on this machine, before a
Triton tries and fails in its own words. Imports no engine until a command runs.
"""

from __future__ import annotations

from pathlib import Path

import typer

from int8qa.build.arguments import RepositoryOption
from int8qa.errors import MissingDependencyError
from int8qa.settings import load_settings


def add_gpu_commands(app: typer.Typer) -> None:
    """Register these commands with ``app``."""
    app.command()(check)


def check(model_repository: RepositoryOption = None) -> None:
    """Hold a repository's TensorRT plans to this machine's TensorRT and GPU.

    To be run before Triton, in the image that serves. A mismatch is refused with both
    versions; a repository without plans passes.
    """
    from int8qa.build.engines.tensorrt_lock import check_repository
    from int8qa.contract import load_contract

    repository = model_repository or load_settings().model_repository
    load_contract(repository)
    built = check_repository(repository)
    state = (
        "no TensorRT plans, nothing to compare"
        if built is None
        else f"plans of {built.library} {built.version} for "
        f"{', '.join(built.compute_capabilities)} can be loaded here"
    )
    typer.echo(f"{repository}: {state}", err=True)


def check_embedded(repository: Path) -> None:
    """Refuse what the embedded Triton could not serve on this machine.

    Raises:
        ContractError: its plans are for another TensorRT or GPU; names both.
        MissingDependencyError: what its plans need is not here.
    """
    from int8qa.build.engines.tensorrt_lock import check_repository
    from int8qa.build.engines.tensorrt_options import Flavour

    built = check_repository(repository)
    if built is not None and built.library == Flavour.TENSORRT:
        raise MissingDependencyError(
            f"{repository} holds plans of tensorrt {built.version}, and the embedded "
            f"Triton has no TensorRT backend: serve them with the tritonserver of NGC "
            f"{built.ngc_release or 'whose TensorRT built them'} (docker compose, "
            f"profile gpu) and `int8qa serve` beside it"
        )
