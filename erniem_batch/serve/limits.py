"""Limits on what a client may send. Each one is checked before any work that depends on the size.

The operator sets the limits of whole requests in `AppConfig`: `max_body_bytes`, `max_items`,
`max_values`, `max_text_characters` and `max_characters`. The limits here are the same for every
service.
"""

# ---- single fields ------------------------------------------------------------------------------

MAX_ID_CHARACTERS = 256
MAX_LANGUAGE_CHARACTERS = 32
MAX_MODEL_CHARACTERS = 256
MAX_USER_CHARACTERS = 1_024
MAX_REQUEST_ID = 128
# Templates and prefixes, which are put to every label, question or window.
MAX_TEMPLATE_CHARACTERS = 1_000
# A name of a schema with its options, or a label. A prompt must fit into a window of the model.
MAX_NAME_CHARACTERS = 8_192
# Names of a schema, labels, choices, templates; and values of options that are counts.
MAX_COUNT = 10_000

# ---- whole requests -----------------------------------------------------------------------------

# Fields of an object, except of `schema` and `min_score`.
MAX_FIELDS = 32
# All names, labels and templates of `options` together.
MAX_OPTION_CHARACTERS = 262_144
# All hypotheses of a zero-shot request, one for each label.
MAX_CLAIM_CHARACTERS = 1_048_576
# All schemas that are written as text, each distinct one once.
MAX_SCHEMA_CHARACTERS = 65_536
# Those of them that are YAML, which takes a thousand times as long as JSON.
MAX_YAML_CHARACTERS = 8_192

# ---- what runs on the event loop ----------------------------------------------------------------

# Bytes of a body that is read on the event loop. Threads read larger ones.
SMALL_BODY = 16_384
# Characters of schemas and options that are read on the event loop.
SMALL_OPTIONS = 2_000
