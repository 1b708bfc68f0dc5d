"""What decides the results of a run, as one dictionary that can be compared and told to people."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from erniem_batch import __version__
from erniem_batch.config import PredictorConfig
from erniem_batch.job.config import JobConfig
from erniem_batch.model.config import ErnieMConfig
from erniem_batch.tasks.make import min_score_of

# Raised with every change of the package that changes answers: results of two are not mixed.
RESULTS_VERSION = 2

# Each actor finds out how many tokens a pass should have. Batches decide last digits only.
FOUND = "found"

RECORDED_PACKAGES = ("torch", "ray", "pyarrow", "sentencepiece", "numpy")


def settings_of(
    config: JobConfig,
    predictor: PredictorConfig,
    model_config: ErnieMConfig,
    model_digest: str,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that decides results, by name of its flag.

    Args:
        before: settings of the run to go on with; what this one leaves open is taken from there.
    """
    tokens = config.max_batch_tokens or (before or {}).get("max-batch-tokens")
    return {
        "results version": RESULTS_VERSION,
        "task": predictor.task,
        "model": model_digest,
        "device": predictor.device,
        config.text_flag.removeprefix("--"): config.text_column,
        "columns": config.carried_columns,
        "limit": config.limit,
        "input-format": config.input_format,
        "output-format": config.output_format,
        "detect-language": config.detect_language,
        **{f"{name.replace('_', '-')}-column": column for name, column in config.fields.items()},
        **_options(predictor, model_config),
        "window-tokens": config.window_tokens,
        "overlap-tokens": config.overlap_tokens,
        "max-batch-tokens": tokens or FOUND,
        "dtype": config.dtype,
    }


def _options(predictor: PredictorConfig, model_config: ErnieMConfig) -> dict[str, Any]:
    """Options of the task, the threshold in force among them."""
    # As JSON gives them back: to be compared with those of an earlier run.
    values = json.loads(json.dumps(asdict(predictor.options)))
    if "min_score" in values:
        values["min_score"] = min_score_of(predictor, model_config)
    return {name.replace("_", "-"): value for name, value in values.items()}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Digest of settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "model":
            found.append(f"--model has other content ({str(old)[:12]}, now {str(new)[:12]})")
        elif name in ("results version", "task", "device"):
            found.append(f"{name} was {old}, now {new}")
        else:
            found.append(f"--{name} was {old}, now {new}")
    return found


def versions() -> dict[str, str]:
    """Of the package and what it stands on: recorded and shown, never compared."""
    return {
        "erniem-batch": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in RECORDED_PACKAGES},
    }
