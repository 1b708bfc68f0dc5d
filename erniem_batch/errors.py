"""Everything this package raises on purpose.

ErnieMBatchError
├── ConfigError        a run or a model cannot start; the message names the field and the remedy
│   └── DamagedFile    a file of a run folder cannot be read; the message names file and remedy
├── CheckpointError    a model folder is incomplete, damaged or of another shape
├── RecordError        one record is unusable; becomes a Failure, never stops a job
├── RequestTooLargeError  one request makes more work than is allowed; it is refused as a whole
├── WorkCancelledError     nobody waits for a request any more
├── DeviceError        the device can no longer be used; the process must end
├── StorageError       files cannot be listed, read or written; what was tried and why it failed
│   └── Conflict       somebody else changed a control file first
└── JobError           a batch job cannot go on

No message ever holds document text: ids, lengths, positions and type names only.
"""

import traceback
from pathlib import Path
from typing import Any


class ErnieMBatchError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(ErnieMBatchError, ValueError):
    """A setting is wrong; found before any work starts."""


class DamagedFile(ConfigError):
    """A file of a run folder is truncated, changed or not one of ours.

    Attributes:
        info: the `storage.FileInfo` of the damaged file, where a later file may have its name.
    """

    info: Any = None


class CheckpointError(ErnieMBatchError):
    """A model folder cannot be used as it is."""


class RecordError(ErnieMBatchError):
    """One record cannot be processed."""


class RequestTooLargeError(ErnieMBatchError):
    """One request makes more work than one request may make."""


class WorkCancelledError(ErnieMBatchError):
    """Nobody waits for the result of a request any more."""


class DeviceError(ErnieMBatchError):
    """The device can no longer be used; the process must end."""


class JobError(ErnieMBatchError):
    """A batch job cannot start or cannot go on."""


class StorageError(ErnieMBatchError):
    """Files cannot be listed, read or written, after all retries."""


class Conflict(StorageError):
    """A control file was changed by somebody else first."""


def fault_of(error: Exception) -> str:
    """A fault of ours in words: what it was, and where it happened. Its message could hold text of
    a document."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"
