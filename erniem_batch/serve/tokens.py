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
        ConfigError: something that is no hash; or a file of tokens that is absent or empty, which
            must not open the door to all.
    """
    hashes = list(config.tokens)
    hashes += _hashes(os.environ.get(VARIABLE, "").replace(",", "\n"), VARIABLE)
    if config.tokens_file is not None:
        data = storage.read(storage.normal(config.tokens_file))
        if data is None:
            raise ConfigError(f"tokens_file: there is no file {config.tokens_file}")
        found = _hashes(data.decode("utf-8", "replace"), f"tokens_file {config.tokens_file}")
        if not found:
            raise ConfigError(f"tokens_file {config.tokens_file} holds no hash")
        hashes += found
    return tuple(hashes)


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
