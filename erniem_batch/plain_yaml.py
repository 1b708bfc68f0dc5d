"""YAML that people write for us, as it is written: to YAML itself, 1:8 is 68 and `no` is false."""

from typing import Any

import yaml

from erniem_batch import storage
from erniem_batch.errors import ConfigError


def read_plain_yaml(path: str, flag: str) -> Any:
    """The content of a file, local or by URL; every value is text, a list or a mapping.

    Args:
        flag: that names the file, for errors.

    Raises:
        ConfigError: there is no such file, or it is not YAML.
    """
    data = storage.read(storage.normal(path))
    if data is None:
        raise ConfigError(f"{flag}: there is no file {path}")
    try:
        return yaml.load(data.decode("utf-8"), Loader=yaml.BaseLoader)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{flag} {path}: not valid YAML: {error}") from None
