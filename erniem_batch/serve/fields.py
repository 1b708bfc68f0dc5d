"""Names of fields in errors: only known ones, never what a client sent."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from erniem_batch.serve.messages import REQUESTS, EmbeddingsRequest

# Characters of an unknown name that are compared with the known ones.
COMPARED = 64
# By the path of the route.
MODELS: dict[str, type[BaseModel]] = {
    **{f"/v1/{task}": model for task, model in REQUESTS.items()},
    "/v1/embeddings": EmbeddingsRequest,
}
Place = Sequence[str | int]


def field_names(model: type[BaseModel]) -> list[str]:
    """Names of the fields of a message, as they are sent."""
    return [field.alias or name for name, field in model.model_fields.items()]


def known_place(path: str, place: Place) -> list[str]:
    """The parts of a place in a request that are places in a list or names of known fields."""
    parts = (part for part in place if isinstance(part, int) or part in _all_names(path))
    return [str(part) for part in parts]


def unknown_field(path: str, place: Place) -> tuple[str, list[str]]:
    """What to say about a field that does not exist, and the place of the nearest one that does.

    Args:
        place: of the field, with its name last.

    Example:
        >>> unknown_field("/v1/ner", ("options", "offset_unti"))
        ('unknown field: did you mean offset_unit?', ['options', 'offset_unit'])
    """
    *around, name = place
    parent = known_place(path, around)
    names = field_names(_model_at(MODELS[path], around)) if path in MODELS else []
    nearest = difflib.get_close_matches(str(name)[:COMPARED], names, n=1)
    if nearest:
        return f"unknown field: did you mean {nearest[0]}?", [*parent, *nearest]
    return f"unknown field: there are {', '.join(names)}", parent


def _model_at(model: type[BaseModel], place: Place) -> type[BaseModel]:
    """The message at a place inside a message."""
    for part in place:
        for name, field in model.model_fields.items():
            if part == (field.alias or name):
                model = next(_models_in(field.annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _all_names(path: str) -> set[str]:
    found: set[str] = set()
    waiting = [MODELS[path]] if path in MODELS else []
    while waiting:
        model = waiting.pop()
        found |= set(field_names(model))
        for field in model.model_fields.values():
            waiting += _models_in(field.annotation)
    return found
