from dataclasses import FrozenInstanceError

import pytest
from fakes import ADDED_SCHEMA, ner_config

from erniem_batch.config import DEMO
from erniem_batch.errors import ConfigError
from erniem_batch.job import JobConfig
from erniem_batch.job.cluster import (
    RESTARTS,
    Pool,
    local_pool,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": ["in"]}, "--output is needed with --input: give a folder"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"unit_bytes": 0}, "--unit-bytes must be at least 1, got 0"),
        ({"num_cpus_per_actor": 0}, "--num-cpus-per-actor must be at least 1, got 0"),
        ({"num_gpus_per_actor": -0.5}, "--num-gpus-per-actor must be .*, got -0.5"),
        ({"num_gpus_per_actor": 1.5}, "--num-gpus-per-actor must be .*, got 1.5"),
        ({"num_gpus_per_actor": float("nan")}, "--num-gpus-per-actor must be .*, got nan"),
        ({"text_column": ""}, "--text-column must name a column"),
        ({"unit_timeout": 0.0}, "--unit-timeout must be more than 0 seconds, got 0.0"),
        ({"max_dead_letters": "many"}, "--max-dead-letters must be .* got 'many'"),
        ({"max_dead_letters": "-1"}, "--max-dead-letters must be .* got '-1'"),
        ({"max_dead_letters": "101%"}, "--max-dead-letters must be .* got '101%'"),
        ({"max_dead_letters": "0.1"}, "--max-dead-letters must be .* got '0.1'"),
        ({"actors": "0"}, "--actors must be MIN:MAX .* got '0'"),
        ({"actors": "3:2"}, "--actors must be MIN:MAX"),
        ({"actors": "2-3"}, "--actors must be MIN:MAX"),
        ({"actors": ""}, "--actors must be MIN:MAX"),
        ({"aggregation_strategy": "best"}, "aggregation_strategy must be one of none, simple"),
        ({"dtype": "int4"}, "dtype must be one of float32, bfloat16, float16, int8, got 'int4'"),
        ({"min_score": -0.1}, "min_score must be from 0 to 1, got -0.1"),
        ({"window_tokens": 2}, "window_tokens=2 leaves no room"),
        ({"overlap_tokens": 510}, "overlap_tokens=510 must be from 0 to 509"),
        ({"max_batch_tokens": 100}, "window_tokens=512 does not fit in max_batch_tokens=100"),
        *(
            ({"columns": f"id,{name}"}, f"--columns {name}: the job adds")
            for name in ADDED_SCHEMA.names
        ),
    ],
)
def test_impossible_values(options, message):
    with pytest.raises(ConfigError, match=message):
        ner_config(JobConfig, **options)


def test_unknown_keyword_and_frozen():
    with pytest.raises(TypeError, match="actor"):
        ner_config(JobConfig, actor="2")
    with pytest.raises(FrozenInstanceError):
        ner_config(JobConfig).limit = 3


def test_defaults_are_the_demo():
    config = ner_config(JobConfig)
    assert config.is_demo
    assert config.model == DEMO
    assert config.carried_columns is None
    assert config.bytes_per_unit == 1 << 20
    assert ner_config(JobConfig, num_gpus_per_actor=1).bytes_per_unit == 16 << 20
    assert ner_config(JobConfig, unit_bytes=7, num_gpus_per_actor=1).bytes_per_unit == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", []), ("id", ["id"]), (" id , text,", ["id", "text"]), ("id,id,text", ["id", "text"])],
)
def test_carried_columns(text, expected):
    assert ner_config(JobConfig, columns=text).carried_columns == expected


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("2", (2, 2)), ("1:8", (1, 8)), ("2:2", (2, 2))]
)
def test_actor_range(text, expected):
    assert ner_config(JobConfig, actors=text).actor_range == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", (0, None)),
        (" 12 ", (12, None)),
        ("0.1%", (None, 0.001)),
        ("100%", (None, 1.0)),
        ("0%", (None, 0.0)),
    ],
)
def test_allowed_dead_letters(text, expected):
    assert ner_config(JobConfig, max_dead_letters=text).allowed_dead_letters == expected


def test_predictor_gets_all_that_concerns_it():
    config = ner_config(
        JobConfig,
        model="m",
        aggregation_strategy="max",
        min_score=0.3,
        window_tokens=64,
        overlap_tokens=5,
        max_batch_tokens=640,
        dtype="bfloat16",
    )
    predictor = config.predictor
    for name in (
        "model",
        "options",
        "window_tokens",
        "overlap_tokens",
        "max_batch_tokens",
        "dtype",
    ):
        assert getattr(predictor, name) == getattr(config, name)
    assert predictor.device == "cpu"
    assert ner_config(JobConfig, num_gpus_per_actor=0.5).predictor.device == "cuda"


# ---- actors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "options", "expected"),
    [
        (1, {}, Pool(1, 1, 1, 0, RESTARTS)),
        (2, {}, Pool(1, 1, 2, 0, RESTARTS)),
        (4, {}, Pool(1, 1, 4, 0, RESTARTS)),
        (16, {}, Pool(1, 4, 4, 0, RESTARTS)),
        (2, {"actors": "2:2"}, Pool(2, 2, 1, 0, RESTARTS)),
        (2, {"actors": "2:2", "num_cpus_per_actor": 1}, Pool(2, 2, 1, 0, RESTARTS)),
        (2, {"actors": "8"}, Pool(8, 8, 1, 0, RESTARTS)),
        (8, {"num_cpus_per_actor": 2}, Pool(1, 4, 2, 0, RESTARTS)),
        (8, {"num_gpus_per_actor": 1.0}, Pool(1, 1, 1, 1.0, RESTARTS)),
    ],
)
def test_actors_of_one_machine(cores, options, expected):
    assert local_pool(ner_config(JobConfig, **options), cores) == expected
