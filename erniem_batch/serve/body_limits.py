"""Limits for requests that are still on their way in.

A proxy knows nothing of an application's settings. So `erniem-batch serve` puts these limits into
the environment before Ray starts; on a cluster the environment of each node may hold them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from erniem_batch.errors import ConfigError

TIMEOUT = "ERNIEM_BATCH_BODY_TIMEOUT_S"
MAX_BYTES = "ERNIEM_BATCH_BODY_MAX_BYTES"
TOTAL_BYTES = "ERNIEM_BATCH_BODY_TOTAL_BYTES"


@dataclass(frozen=True, kw_only=True)
class BodyLimits:
    """Limits for the bodies that one process receives.

    Attributes:
        timeout_s: seconds in which a whole body has to arrive, and before it the whole head.
        max_bytes: size of a body above which the application receives it itself.
        total_bytes: memory for all bodies together, finished or not.
    """

    timeout_s: float = 10.0
    max_bytes: int = 4 << 20
    total_bytes: int = 256 << 20

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read the limits from environment variables; a missing one has its default.

        Raises:
            ConfigError: a variable is not a positive number.
        """
        return cls(
            timeout_s=_number(environment, TIMEOUT, cls.timeout_s),
            max_bytes=int(_number(environment, MAX_BYTES, cls.max_bytes)),
            total_bytes=int(_number(environment, TOTAL_BYTES, cls.total_bytes)),
        )

    def as_environment(self) -> dict[str, str]:
        """Environment variables with these limits."""
        return {
            TIMEOUT: str(self.timeout_s),
            MAX_BYTES: str(self.max_bytes),
            TOTAL_BYTES: str(self.total_bytes),
        }


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"environment variable {name}: expected a positive number")
    return number
