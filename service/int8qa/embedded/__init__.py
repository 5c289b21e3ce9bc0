"""The Triton child process of `int8qa up`: find, start, watch, stop.

In: a model repository and the embedded settings. Out: a ready gRPC address on
loopback that survives crashes of the server behind it. Refuses to know the
gateway, the build stage and what the models compute. Reading order: `locate`,
`launch`, `log_lines`, `guard`, `supervisor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from int8qa.embedded.locate import TritonInstallation, locate_triton

if TYPE_CHECKING:
    from int8qa.embedded.supervisor import TritonState, TritonSupervisor

__all__ = ["TritonInstallation", "TritonState", "TritonSupervisor", "locate_triton"]


def __getattr__(name: str) -> object:
    """Import the supervisor on first use: it brings gRPC, `locate` brings nothing."""
    if name in {"TritonState", "TritonSupervisor"}:
        from int8qa.embedded import supervisor

        return getattr(supervisor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
