"""Every error of int8qa. No module here knows HTTP statuses or exit codes.

Int8qaError
├── InvalidInputError            a field of the request cannot be answered as given
│   └── InputTooLargeError       … because it is larger than allowed
├── UnknownModelError            the precision or model asked for is not loaded
├── OverloadedError              refused at the door; nothing was done
│   ├── QueueFullError           the queue holds as much as it may
│   ├── DeadlineUnreachableError the queue ahead takes longer than the deadline
│   └── ShuttingDownError        the service is draining
├── DeadlineExceededError        accepted, but not answered in time
├── EngineError                  the engine behind the gateway
│   ├── EngineUnavailableError   Triton is not there, or the model is not ready
│   │   └── NotLoadedError       … Triton is there
│   ├── ModelLoadError           Triton would not load or unload a model
│   └── EngineOutputError        Triton answered, but not with usable logits
├── ConfigurationError           a setting is unknown, out of range or contradictory
├── MissingDependencyError       an optional part is not installed
├── ContractError                a model repository and its server do not agree
├── EmbeddedTritonError          the Triton child process cannot be started or kept
├── GatewayRequestError          the command line could not get an answer from a gateway
└── BuildError                   the build stage
    ├── CheckpointError          the checkpoint is missing, unsafe or of the wrong kind
    ├── DataFileError            a SQuAD-format file is missing or malformed
    ├── RecipeError              a recipe is malformed, or does not fit the model
    ├── ExportError              a graph could not be exported or cleaned
    ├── ParityError              a conversion changed the model's answers
    ├── EnginePrecisionError     the engine would not run in the asked precision
    ├── AccuracyGateError        INT8 lost more accuracy than allowed
    └── RepositoryError          a model repository cannot be written or replaced

A message says what happened, what was measured, what is allowed and what to do
next. It never holds the user's question or context.
"""

from __future__ import annotations


class Int8qaError(Exception):
    """Root of the tree; catch it at an edge, never in between."""


class InvalidInputError(Int8qaError):
    """A field of the request cannot be answered as given."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        """Name of the offending field as the client wrote it, e.g. ``context``."""


class InputTooLargeError(InvalidInputError):
    """A field of the request is larger than allowed."""


class UnknownModelError(Int8qaError):
    """The precision or model asked for is not loaded."""


class OverloadedError(Int8qaError):
    """Refused at the door; nothing was done for the request."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When it is worth asking again, in seconds."""


class QueueFullError(OverloadedError):
    """The queue holds as many padded tokens as it may."""


class DeadlineUnreachableError(OverloadedError):
    """The work queued ahead takes longer than the request's deadline allows."""


class ShuttingDownError(OverloadedError):
    """The service is draining and takes nothing new."""


class DeadlineExceededError(Int8qaError):
    """The request was accepted but not answered within its deadline."""


class EngineError(Int8qaError):
    """The engine behind the gateway failed."""


class EngineUnavailableError(EngineError):
    """Triton is not reachable, or the model is not ready."""

    def __init__(self, message: str, *, retry_after_s: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When it is worth asking again, in seconds."""


class NotLoadedError(EngineUnavailableError):
    """A Triton answers, but has no model of that name ready."""


class ModelLoadError(EngineError):
    """Triton would not load or unload a model; what it served, it serves."""


class EngineOutputError(EngineError):
    """Triton answered, but not with usable logits."""


class ConfigurationError(Int8qaError):
    """A setting is unknown, out of range or contradicts another."""


class MissingDependencyError(Int8qaError):
    """An optional part of the installation is missing."""


class ContractError(Int8qaError):
    """A model repository is absent, foreign, or not what Triton serves."""


class EmbeddedTritonError(Int8qaError):
    """The Triton child process cannot be started or kept alive."""


class GatewayRequestError(Int8qaError):
    """A command could not get an answer from a gateway."""


class BuildError(Int8qaError):
    """The build stage failed; no model repository was changed."""


class CheckpointError(BuildError):
    """The checkpoint is missing, unsafe to load or of the wrong kind."""


class DataFileError(BuildError):
    """A SQuAD-format file is missing or malformed."""


class RecipeError(BuildError):
    """A recipe is malformed, or names tensors the model does not have."""


class ExportError(BuildError):
    """A graph could not be exported or cleaned."""


class ParityError(BuildError):
    """A conversion changed the model's answers more than allowed."""


class EnginePrecisionError(BuildError):
    """The engine would not run the graph in the precision asked for."""


class AccuracyGateError(BuildError):
    """INT8 lost more accuracy than the gate allows."""


class RepositoryError(BuildError):
    """A model repository cannot be written or may not be replaced."""
