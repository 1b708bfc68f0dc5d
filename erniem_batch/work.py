"""How much one request or row may make the model do, and whether its result is still wanted.

Few bytes can ask for gigabytes: each of many names is asked about each window of a long text, and
about each thing found there. So a task counts tokens, windows and spans, and passes the numbers to
the `Work` of the record, before it builds them.
"""

from dataclasses import dataclass, field

from erniem_batch.errors import (
    ErnieMBatchError,
    RecordError,
    RequestTooLargeError,
    WorkCancelledError,
)

# Limits for one row of a batch run: what a row may hold stays below about a gigabyte.
MAX_ROW_TOKENS = 1 << 24
MAX_ROW_WINDOWS = 1 << 19
MAX_ROW_SPANS = 1 << 20
# Limit for one request: about a second of decoding.
MAX_REQUEST_SPANS = 1 << 18
# A token rarely stands for more characters; used where only characters are known.
CHARACTERS_PER_TOKEN = 16


@dataclass(slots=True, eq=False)
class Work:
    """Counts the work of one row, and refuses what is above its limits.

    Attributes:
        max_tokens: tokens of all windows, prompts and special tokens included.
        max_windows: model inputs.
        max_spans: candidate answers, see `charge_spans`.
        n_tokens, n_windows, n_spans: counted so far.
    """

    max_tokens: int = MAX_ROW_TOKENS
    max_windows: int = MAX_ROW_WINDOWS
    max_spans: int = MAX_ROW_SPANS
    n_tokens: int = field(default=0, init=False)
    n_windows: int = field(default=0, init=False)
    n_spans: int = field(default=0, init=False)
    is_cancelled: bool = field(default=False, init=False)

    def start(self) -> None:
        """Begins with a row; counts of an earlier run of the same row do not matter."""
        self.check()
        self.n_tokens = self.n_windows = self.n_spans = 0

    def charge(self, n_tokens: int, n_windows: int) -> None:
        """Adds windows that are about to be built.

        Raises:
            RecordError or RequestTooLargeError: they are above the limit.
            WorkCancelledError: nobody waits for them any more.
        """
        self.require_room(n_tokens, n_windows)
        self.n_tokens += n_tokens
        self.n_windows += n_windows

    def require_room(self, n_tokens: int, n_windows: int = 0) -> None:
        """Raises what `charge` would raise for at least so many tokens, without adding them."""
        self.check()
        tokens, windows = self.n_tokens + n_tokens, self.n_windows + n_windows
        if tokens > self.max_tokens:
            raise self._error(f"at least {tokens} tokens in windows", self.max_tokens)
        if windows > self.max_windows:
            raise self._error(f"at least {windows} windows", self.max_windows)

    def require_room_for_text(self, n_characters: int) -> None:
        """Raises what `charge` would raise for a text that is about to be put together."""
        self.check()
        most = CHARACTERS_PER_TOKEN * self.max_tokens
        if n_characters > most:
            raise self._error(f"{n_characters} characters of prompts", most)

    def charge_spans(self, n_spans: int) -> None:
        """Adds candidate answers that are about to be looked at; raises as `charge` does."""
        self.check()
        self.n_spans += n_spans
        if self.n_spans > self.max_spans:
            raise self._error(f"at least {self.n_spans} spans as candidates", self.max_spans)

    def cancel(self) -> None:
        """Ends the work at its next step, in whichever thread that is."""
        self.is_cancelled = True

    def check(self) -> None:
        """Raises a WorkCancelledError if nobody waits for the result any more."""
        if self.is_cancelled:
            raise WorkCancelledError("nobody waits for this request any more")

    def _error(self, came: str, most: int) -> ErnieMBatchError:
        return RecordError(
            f"the row makes {came}; at most {most} a row: shorten or split the text, or ask for "
            f"less about it"
        )


@dataclass(slots=True, eq=False)
class RequestWork(Work):
    """The same for all items of a request together; above a limit, the request is refused."""

    max_spans: int = MAX_REQUEST_SPANS

    def start(self) -> None:
        """Begins with one item of the request, which adds to what the others made."""
        self.check()

    def _error(self, came: str, most: int) -> ErnieMBatchError:
        return RequestTooLargeError(
            f"the request makes {came}; at most {most} a request: send fewer or shorter texts, or "
            f"ask for less about each (names, labels, choices, position_prob, top_k)"
        )
