"""Every error that mlx_zoo raises for bad input. All share one base class, `MLXZooError`.

A message says what happened, where, and what to do. (`ValueError` is used for a wrong argument.)
"""

from __future__ import annotations


def legible(text: str, keep: str = "\n\t") -> str:
    """`text` with escapes for what a terminal would obey or hide, but for `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


class MLXZooError(Exception):
    """Base class of all errors of this package."""

    def __init__(self, message: str = ""):
        super().__init__(legible(message))  # it may quote what a stranger wrote


class UnknownModel(MLXZooError):
    """No model of that name; the message lists the closest ones."""


class UnsupportedConfig(MLXZooError):
    """A config.json asks for arithmetic that is not implemented; the attribute is named."""


class MappingError(MLXZooError):
    """A checkpoint and a network do not cover each other exactly. `problems` lists every reason."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()):
        self.message = message
        self.problems = problems = tuple(legible(text, keep="") for text in problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{message}: {count}", *problems]) if problems else message)


class CheckpointError(MLXZooError):
    """A checkpoint file is malformed, truncated or inconsistent."""


class UnsafeCheckpoint(CheckpointError):
    """A pickle asks for something other than tensors; nothing of it was executed."""


class UnsupportedFormat(CheckpointError):
    """A file is of a kind that is not read here; the message says how to convert it."""


class DownloadError(MLXZooError):
    """A file could not be fetched."""


class RepositoryNotFound(DownloadError):
    """The hub has no such repository, or it is private and no valid token was given."""


class GatedRepository(DownloadError):
    """The repository's licence must be accepted on the hub first."""


class RevisionNotFound(DownloadError):
    """The repository has no such branch, tag or commit."""


class FileNotInRepository(DownloadError):
    """The repository has no such file at that revision."""


class NotCached(DownloadError):
    """The network is off (or `local_files_only=True`) and the file is not in the cache."""


class UploadError(MLXZooError):
    """A folder could not be uploaded. It is still there; the message says how to do it again."""


class IntegrityError(MLXZooError):
    """Bytes do not have the hash that was promised for them."""


class VerificationError(MLXZooError):
    """A network does not compute what its PyTorch original computes. `report` holds the figures."""

    def __init__(self, message: str, report=None):
        self.report = report
        super().__init__(message)


class MissingDependency(MLXZooError, ImportError):
    """An optional package is needed; the message says which extra installs it."""
