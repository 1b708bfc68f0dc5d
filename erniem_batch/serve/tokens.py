"""Who may ask: bearer tokens, of which only hashes are kept."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Sequence

from erniem_batch import storage
from erniem_batch.errors import ConfigError
from erniem_batch.serve.config import AppConfig

VARIABLE = "ERNIEM_BATCH_TOKENS"
_HASH = re.compile(r"[0-9a-f]{64}")


def new_token() -> tuple[str, str]:
    """A token for a client, and its hash for the service."""
    token = secrets.token_urlsafe(32)
    return token, hash_of(token)


def hash_of(token: str) -> str:
    """SHA-256 in hex. Tokens are random and long: nobody finds them by trying, so that a slow hash
    would only cost time."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def allowed_hashes(config: AppConfig) -> tuple[str, ...]:
    """Hashes of all tokens that are let in; none: everybody is.

    Raises:
        ConfigError: something that is no hash; or a variable or file of tokens that holds none,
            which must not open the door to all.
    """
    hashes = [*config.tokens, *hashes_of_environment()]
    if config.tokens_file is not None:
        data = storage.read(storage.normal(config.tokens_file))
        if data is None:
            raise ConfigError(f"tokens_file: there is no file {config.tokens_file}")
        where = f"tokens_file {config.tokens_file}"
        hashes += _hashes(data.decode("utf-8", "replace"), where)
    return tuple(hashes)


def hashes_of_environment() -> list[str]:
    """Hashes in ERNIEM_BATCH_TOKENS; none if it is not set.

    Raises:
        ConfigError: it is set, but holds no hash or something that is none.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return []
    return _hashes(text.replace(",", "\n"), f"environment variable {VARIABLE}")


def _hashes(text: str, where: str) -> list[str]:
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    words = [words[0] for words in lines if words]
    for number, word in enumerate(words, start=1):
        if not _HASH.fullmatch(word):
            # Perhaps a token itself, so not repeated here.
            raise ConfigError(
                f"{where}: entry {number} is no SHA-256 in hex; `erniem-batch token` makes a token "
                "and its hash"
            )
    if not words:
        raise ConfigError(
            f"{where} holds no hash of a token: put one there (`erniem-batch token` makes it), or "
            "remove the setting to let everybody in"
        )
    return words


def is_allowed(header: str | None, hashes: Sequence[str]) -> bool:
    """Whether an Authorization header names a token with one of these hashes. Takes the same time
    whichever it is."""
    if not hashes:
        return True
    scheme, _, token = (header or "").partition(" ")
    given = hash_of(token.strip())
    matches = [hmac.compare_digest(given, known) for known in hashes]
    return scheme.lower() == "bearer" and any(matches)
