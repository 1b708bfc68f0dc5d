"""Training without Ray: what a model is shown, what is computed, what comes out, and what is told.

Models are tiny and random, with dropouts that no model has by itself, so that mix-ups show.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fakes import write_jsonl
from safetensors.torch import load_file

from erniem_batch import (
    ErnieMConfig,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    cli,
)
from erniem_batch.config import PredictorConfig
from erniem_batch.errors import ConfigError, ErnieMBatchError, JobError
from erniem_batch.gold import annotated
from erniem_batch.job import lease as lease_module
from erniem_batch.job.lease import require_owner
from erniem_batch.labels import labels_to_spans
from erniem_batch.model.fetch import is_model_file
from erniem_batch.model.heads import IGNORED_LABEL, ErnieMForEmbedding
from erniem_batch.model.overlay import base_name
from erniem_batch.options import (
    ChooseOptions,
    ClassifyOptions,
    EmbedOptions,
    ExtractOptions,
    NerOptions,
    QaOptions,
)
from erniem_batch.predictor import Predictor
from erniem_batch.records import Prediction
from erniem_batch.text.windows import window_starts
from erniem_batch.train import export, loop, run
from erniem_batch.train.config import FinetuneConfig
from erniem_batch.train.data import (
    dev_batches,
    held_out,
    labels_of,
    plan_training,
    prompts_of,
    read_data,
    start_folder,
)
from erniem_batch.train.dev import SCORES
from erniem_batch.train.examples import (
    DRAW,
    RELATION_PROMPTS,
    Drawing,
    Example,
    Prompts,
    _joined,
    read_prompts,
)
from erniem_batch.train.export import best_of
from erniem_batch.train.heads import (
    Rates,
    SharedHeads,
    collate,
    learning_rate_scale,
    make_optimizer,
    new_model,
)
from erniem_batch.train.loop import (
    STATE_FILE,
    Progress,
    Training,
    backward,
    evaluate,
    prepare,
    train,
)
from erniem_batch.train.plan import MicroBatch, interleaved, micro_batches, share_of, steps_of
from erniem_batch.train.session import LocalSession

CONTEXT = (
    "Die Brücke über die Warne wurde 2021 eröffnet. 林若溪设计了图书馆。 "
    "The old hut on Mount Sorrel burned down in a storm; the new one is made of larch wood. "
) * 3
NER = [
    {"lang": "en", "text": "Ada Lovelace met Charles Babbage in London.",
     "spans": [[0, 12, "PER"], [17, 32, "PER"], [36, 42, "LOC"]]},
    {"lang": "zh", "text": "林若溪在北京工作。", "spans": [[0, 3, "PER"], [4, 6, "LOC"]]},
    {"lang": "de", "text": "Siemens baut Züge.", "spans": [[0, 7, "ORG"]]},
    {"lang": "de", "text": "Es regnet.", "spans": []},
]  # fmt: skip
KINDS = ["LOC", "ORG", "PER"]
NER_LABELS = ["O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in "BI")]
DROPOUTS = {
    "hidden_dropout_prob": 0.11,
    "attention_probs_dropout_prob": 0.12,
    "classifier_dropout": 0.13,
}

# ---- rows of all tasks ------------------------------------------------------------------------

NAMES = ["Ada", "Boris", "Carla", "Dmitri", "Eva", "Farid", "Gina", "Hugo"]
PLACES = ["London", "Paris", "Berlin", "Madrid", "Rom", "Kairo"]
TOPICS = {
    "sports": ["ball", "match", "team", "goal"],
    "weather": ["rain", "sun", "wind", "snow"],
    "music": ["song", "piano", "band", "drum"],
}


def _living(n_rows):
    """Who lives where: rows that know their name, its place and the place's place."""
    rng = random.Random(4)
    for i in range(n_rows):
        name, place = rng.choice(NAMES), rng.choice(PLACES)
        more = " and is happy there" * rng.randrange(3)
        text = f"{name} lives in {place}{more}."
        spans = [[0, len(name), "PER"], [len(name) + 10, len(name) + 10 + len(place), "LOC"]]
        yield i, name, place, text, spans


def make_rows(task, n_rows=24):
    """Rows from which the task can be learnt."""
    if task in ("ner", "extract", "embed"):
        return [
            {
                "id": f"{i}",
                "lang": "en" if i % 3 else "de",
                "text": text,
                "spans": spans,
                "relations": [[0, "home", 1]] if i % 4 == 0 else [],
            }
            for i, _, _, text, spans in _living(n_rows)
        ]
    if task == "qa":
        return [
            {
                "id": f"{i}",
                "question": f"Where does {name} live?",
                "context": f"{text} ({i})",
                "answers": [{"text": place, "start": spans[1][0]}] if i % 5 else [],
            }
            for i, name, place, text, spans in _living(n_rows)
        ]
    if task == "choose":
        return [
            {
                "id": f"{i}",
                "premise": text,
                "choices": [f"home of {place}", "nothing", "a ball"][: 2 + i % 2],
                "label": 0,
                "question": "effect",
            }
            for i, _, place, text, _ in _living(n_rows)
        ]
    rng = random.Random(4)
    kinds = [list(TOPICS)[i % 3] for i in range(n_rows)]
    texts = [" ".join(rng.choices(TOPICS[kind], k=3 + i % 7)) for i, kind in enumerate(kinds)]
    return [
        {"id": f"{i}", "text": text, "label": kind}
        for i, (kind, text) in enumerate(zip(kinds, texts, strict=True))
    ]


OPTIONS = {
    "ner": NerOptions(min_score=0.0),
    "classify": ClassifyOptions(),
    "choose": ChooseOptions(),
    "qa": QaOptions(),
    "extract": ExtractOptions(schema="PER, LOC"),
    "embed": EmbedOptions(),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer) -> Path:
    """A folder with a tiny random token classifier that recommends a threshold."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "start"
    config = ErnieMConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=130,
        initializer_range=0.1,
        **DROPOUTS,
        extra={"task_specific_params": {"ner": {"min_score": 0.7}}},
    ).with_labels(["O", "B-PER", "I-PER"])
    ErnieMForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rows(task, rows):
    return [annotated(task, row, f"r{i}") for i, row in enumerate(rows)]


def _draw(task, rows, tokenizer, seed=0, **how):
    drawing = Drawing(**{"max_length": 120, **how})
    return DRAW[task](_rows(task, rows), tokenizer, drawing, random.Random(seed))


def _tokens(tokenizer, text):
    return tokenizer.encode_batch([text]).of(0)


def _segments(tokenizer, ids):
    """The two texts of a sequence, as lists of ids."""
    ids = ids.tolist()
    at = ids.index(tokenizer.sep_token_id)
    assert ids[0] == tokenizer.cls_token_id
    assert ids[at : at + 2] == [tokenizer.sep_token_id] * 2
    assert ids[-1] == tokenizer.sep_token_id
    return ids[1:at], ids[at + 2 : -1]


# ---- examples: ner ----------------------------------------------------------------------------


def test_ner_labels_are_of_tokens(tokenizer):
    examples = _draw("ner", NER, tokenizer, labels=NER_LABELS)
    for row, example in zip(NER, examples, strict=True):
        targets = example.targets["labels"]
        tokens = _tokens(tokenizer, row["text"])
        assert example.ids[0].tolist()[1:-1] == tokens.ids.tolist()
        assert len(targets) == len(example.ids[0])
        assert targets[0] == targets[-1] == IGNORED_LABEL
        for target, a, b in zip(targets[1:-1], tokens.starts, tokens.ends, strict=True):
            assert (target == IGNORED_LABEL) == row["text"][a:b].isspace()
        kept = [i for i, target in enumerate(targets[1:-1]) if target != IGNORED_LABEL]
        found = labels_to_spans(
            [NER_LABELS[targets[1 + i]] for i in kept],
            [(tokens.starts[i], tokens.ends[i]) for i in kept],
        )
        assert [(row["text"][a:b].strip(), kind) for a, b, kind in found] == [
            (row["text"][a:b], kind) for a, b, kind in row["spans"]
        ]


def test_joined_sentences_shift_their_spans():
    rows = _rows("ner", NER * 5)
    joined = _joined(rows, 0.6, random.Random(3))
    assert 3 < len(joined) < len(rows)
    found = Counter((text[a:b], kind) for text, spans in joined for a, b, kind in spans)
    assert found == Counter((r["text"][a:b], k) for r in NER * 5 for a, b, k in r["spans"])
    texts = [text for text, _ in joined]
    assert sum(map(len, texts)) - sum(len(r["text"]) for r in NER * 5) == sum(
        text.count(". ") for text in texts
    )
    assert any("。林" in text for text in texts), "no space in Chinese"
    assert not any("林" in text and "." in text for text in texts), "one language each"


# ---- examples: qa -----------------------------------------------------------------------------


def _question(answer="2021", occurrence=0, **fields):
    start = -1
    for _ in range(occurrence + 1):
        start = CONTEXT.index(answer, start + 1)
    answers = [{"text": answer, "start": start}]
    return {"question": "Was steht hier?", "context": CONTEXT, "answers": answers, **fields}


ANSWERS = ["2021", "林若溪", "Mount Sorrel", "larch wood", "Die Brücke"]


@pytest.mark.parametrize("occurrence", [0, 1, 2])
@pytest.mark.parametrize("answer", ANSWERS)
def test_qa_places_point_at_the_answer(tokenizer, answer, occurrence):
    row = _question(answer, occurrence)
    examples = _draw("qa", [row], tokenizer, max_length=64)
    context = _tokens(tokenizer, CONTEXT)
    before = len(_tokens(tokenizer, row["question"]).ids) + 3
    size = 64 - before - 1
    starts = window_starts(len(context.ids), size, size // 2)
    assert len(starts) > 2
    a = row["answers"][0]["start"]
    n_found = 0
    for start, example in zip(starts, examples, strict=True):
        assert example.longest <= 64
        first, last = example.targets["starts"], example.targets["ends"]
        shift = start - before
        held = context.starts[start] <= a and a + len(answer) <= context.ends[start + size - 1]
        assert (first > 0) == held
        if held:
            n_found += 1
            place = slice(context.starts[first + shift], context.ends[last + shift])
            assert CONTEXT[place].strip() == answer
            assert a - 1 <= place.start <= a  # this place, not another with the same words
        else:
            assert first == last == 0  # [CLS]
    assert n_found >= 1


def test_qa_windows_cover_the_context(tokenizer):
    examples = _draw("qa", [_question()], tokenizer, max_length=64)
    context = _tokens(tokenizer, CONTEXT).ids.tolist()
    question = _tokens(tokenizer, "Was steht hier?").ids.tolist()
    pieces = [_segments(tokenizer, example.ids[0]) for example in examples]
    assert all(first == question for first, _ in pieces)
    assert pieces[0][1] == context[: len(pieces[0][1])]
    assert pieces[-1][1] == context[-len(pieces[-1][1]) :]


def test_a_question_without_an_answer(tokenizer):
    examples = _draw("qa", [_question(answers=[])], tokenizer, max_length=64, crop=20)
    assert len(examples) > 2  # crops are for answers
    assert {(e.targets["starts"], e.targets["ends"]) for e in examples} == {(0, 0)}


@pytest.mark.parametrize("crop", [1, 10, 30, 500])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_crop_holds_the_answer(tokenizer, answer, crop):
    before = len(_tokens(tokenizer, "Was steht hier?").ids) + 3
    places = set()
    for seed in range(12):
        (example,) = _draw("qa", [_question(answer, 1)], tokenizer, seed, max_length=64, crop=crop)
        ids = example.ids[0].tolist()
        first, last = example.targets["starts"], example.targets["ends"]
        assert before <= first <= last < len(ids) - 1
        assert tokenizer.decode(ids[first : last + 1]).strip().replace(" ", "") == answer.replace(
            " ", ""
        )
        longest = max(min(crop, 64 - before - 1), last - first + 1)
        assert len(ids) == before + longest + 1
        places.add(first)
    assert crop == 1 or len(places) > 1


def test_one_of_several_answers_is_drawn(tokenizer):
    answers = [{"text": "2021", "start": CONTEXT.index("2021")}]
    answers += [{"text": "Warne", "start": CONTEXT.index("Warne")}]
    row = _question(answers=answers)
    drawn = {_draw("qa", [row], tokenizer, seed, crop=8)[0].targets["ends"] for seed in range(20)}
    assert len(drawn) > 1


# ---- examples: extract ------------------------------------------------------------------------


def _asked(tokenizer, rows, examples):
    """Language, prompt and found surfaces of each example."""
    texts = {tuple(_tokens(tokenizer, r["text"]).ids.tolist()): r for r in rows}
    for example in examples:
        prompt, ids = _segments(tokenizer, example.ids[0])
        row = texts[tuple(ids)]
        tokens = _tokens(tokenizer, row["text"])
        before = len(prompt) + 3
        starts, ends = (np.flatnonzero(example.targets[n]) - before for n in ("starts", "ends"))
        assert all(len(x) == len(example.ids[0]) for x in example.targets.values())
        found = [
            row["text"][tokens.starts[a] : tokens.ends[b]].strip()
            for a, b in zip(starts, ends, strict=True)
        ]
        yield row, tokenizer.decode(prompt).strip(), found


def test_starts_and_ends_are_those_of_the_spans(tokenizer):
    examples = _draw("extract", NER, tokenizer, labels=KINDS)
    asked = list(_asked(tokenizer, NER, examples))
    for row, prompt, found in asked:
        assert found == [row["text"][a:b] for a, b, kind in row["spans"] if kind == prompt]
    assert sum(bool(found) for _, _, found in asked) == 5
    assert sum(not found for _, _, found in asked) == 5  # of seven that could be


@pytest.mark.parametrize(("negatives", "expected"), [(0.0, 5), (0.4, 7), (1.0, 10), (9.0, 12)])
def test_share_of_prompts_in_vain(tokenizer, negatives, expected):
    assert len(_draw("extract", NER, tokenizer, labels=KINDS, negatives=negatives)) == expected


def test_rows_that_only_ask_in_vain(tokenizer):
    rows = [{"content": "Es regnet.", "prompt": "Ort", "result_list": []}] * 3
    examples = _draw("extract", rows, tokenizer)
    assert len(examples) == 1
    assert not any(example.targets["starts"].any() for example in examples)


def test_prompts_by_language(tokenizer):
    prompts = read_prompts(
        {"*": {"PER": ["Person", "Mensch"], "LOC": "Ort"}, "zh": {"PER": "人"}}, "prompts"
    )
    assert prompts.of("PER", "zh") == ["人", "Person", "Mensch"]
    assert prompts.of("PER", "de") == ["Person", "Mensch"]
    assert prompts.of("ORG", "de") == ["ORG"]
    asked = Counter()
    for seed in range(20):
        examples = _draw(
            "extract", NER, tokenizer, seed, labels=KINDS, negatives=9.0, prompts=prompts
        )
        asked.update((row["lang"], name) for row, name, _ in _asked(tokenizer, NER, examples))
    names = {language: {n for at, n in asked if at == language} for language, _ in asked}
    assert names == {
        "en": {"Person", "Mensch", "Ort", "ORG"},
        "de": {"Person", "Mensch", "Ort", "ORG"},
        "zh": {"人", "Person", "Mensch", "Ort", "ORG"},
    }


def test_relations_are_asked_of_each_subject(tokenizer):
    rows = [{**NER[0], "relations": [[0, "friend", 1], [0, "city", 2]]}]
    asked = {}
    for seed in range(8):
        examples = _draw("extract", rows, tokenizer, seed, labels=KINDS, negatives=9.0)
        for _, prompt, found in _asked(tokenizer, rows, examples):
            asked[prompt.replace(" ", "")] = found
    for template in RELATION_PROMPTS:
        for subject, relation, found in (
            ("Ada Lovelace", "friend", ["Charles Babbage"]),
            ("Ada Lovelace", "city", ["London"]),
            ("Charles Babbage", "friend", []),
            ("London", "city", []),
        ):
            prompt = template.format(subject=subject, relation=relation)
            assert asked[prompt.replace(" ", "")] == found
    assert len(asked) == 3 + 2 * 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a mapping from languages"),
        ({"de": ["Person"]}, "'de' must map labels to names"),
        ({"de": {"PER": 3}}, "de.PER must be a name or a list of names"),
        ({"de": {"PER": [""]}}, "de.PER must be a name or a list of names"),
    ],
)
def test_prompts_that_are_none(content, message):
    with pytest.raises(ConfigError, match=f"--prompts p: {message}"):
        read_prompts(content, "--prompts p")


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text('{"no": {"PER": "yes"}}', encoding="utf-8")  # no Norwegian is false
    assert prompts_of(_config(prompts=str(path))).of("PER", "no") == ["yes"]
    assert prompts_of(_config()) == Prompts()
    with pytest.raises(ConfigError, match="--prompts: there is no file"):
        prompts_of(_config(prompts=str(tmp_path / "none")))
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--prompts .*: not valid YAML"):
        prompts_of(_config(prompts=str(path)))


# ---- examples: whole texts --------------------------------------------------------------------


def test_choices_are_shuffled_and_the_label_follows(tokenizer):
    choices = ["a hut", "a storm", "larch wood", "a bridge"]
    row = {"premise": "It burned down.", "choices": choices, "label": 2, "question": "cause"}
    places = set()
    for seed in range(16):
        (example,) = _draw("choose", [row], tokenizer, seed)
        pairs = [_segments(tokenizer, ids) for ids in example.ids]
        found = [tokenizer.decode(second).strip() for _, second in pairs]
        assert sorted(found) == sorted(choices)
        assert found[example.targets["labels"]] == "larch wood"
        assert {tokenizer.decode(first).strip() for first, _ in pairs} == {
            "It burned down. What was the cause of this?"
        }
        places.add(example.targets["labels"])
    assert places == {0, 1, 2, 3}


def test_targets_of_classes(tokenizer):
    labels = ["a", "b", "c"]
    rows = [{"text": "x", "label": "b"}, {"text": "x", "text_pair": "y", "label": "c"}]
    one, two = _draw("classify", rows, tokenizer, labels=labels)
    assert (one.targets["labels"], two.targets["labels"]) == (1, 2)
    assert len(one.ids[0]) == len(_tokens(tokenizer, "x").ids) + 2
    assert _segments(tokenizer, two.ids[0])[1] == _tokens(tokenizer, "y").ids.tolist()
    rows = [{"text": "x", "label": ["c", "a"]}, {"text": "x", "label": []}]
    found = [
        e.targets["labels"].tolist() for e in _draw("classify", rows, tokenizer, labels=labels)
    ]
    assert found == [[1, 0, 1], [0, 0, 0]]
    (example,) = _draw("classify", [{"text": "x", "label": 2}], tokenizer, labels=["score"])
    assert example.targets["labels"] == np.float32(2)


LONG = "wort " * 200
LONG_ROWS = {
    "ner": [{"text": LONG + "Berlin", "spans": [[0, 4, "PER"], [1000, 1006, "LOC"]]}],
    "classify": [
        {"text": LONG, "label": "a"},
        {"text": LONG, "text_pair": LONG, "label": "a"},
        {"text": LONG, "text_pair": "kurz", "label": "a"},
        {"text": "kurz", "text_pair": LONG, "label": "a"},
    ],
    "choose": [{"premise": LONG, "choices": [LONG, "kurz", ""], "label": 0}],
    "qa": [
        {"question": LONG, "context": LONG, "answers": [{"text": "wort", "start": 500}]},
        {"question": "kurz", "context": LONG, "answers": []},
    ],
    "extract": [
        {"text": LONG + "Berlin", "spans": [[0, 4, "PER"], [1000, 1006, "LOC"]]},
        {"content": LONG, "prompt": LONG, "result_list": [{"start": 0, "end": 4}]},
    ],
    "embed": [{"text": LONG}],
}


@pytest.mark.parametrize("max_length", [8, 9, 20, 40, 64, 120])
@pytest.mark.parametrize("task", LONG_ROWS)
def test_nothing_is_longer_than_it_may_be(tokenizer, task, max_length):
    """Once, long questions took all of a short example, and made it longer than that."""
    labels = {"ner": NER_LABELS, "classify": ["a"], "extract": ["LOC", "PER"]}.get(task, ())
    how = {"labels": labels, "max_length": max_length}
    if task == "embed":
        how["vectors"] = np.zeros((1, 16), dtype=np.float32)
    for crop in (None, 10):
        examples = _draw(task, LONG_ROWS[task], tokenizer, crop=crop, **how)
        assert max(example.longest for example in examples) == max_length
        for example in examples:
            if task in ("ner", "extract"):
                assert {len(x) for x in example.targets.values()} == {example.longest}


def test_spans_beyond_the_end_have_no_label(tokenizer):
    (example,) = _draw("ner", LONG_ROWS["ner"], tokenizer, labels=NER_LABELS, max_length=40)
    kinds = {NER_LABELS[t] for t in example.targets["labels"] if t != IGNORED_LABEL}
    assert {"O", "B-PER"} <= kinds <= {"O", "B-PER", "I-PER"}
    examples = _draw("extract", LONG_ROWS["extract"][:1], tokenizer, labels=["LOC"], max_length=40)
    assert not any(x.any() for e in examples for x in e.targets.values())


def test_both_parts_of_a_pair_are_kept(tokenizer):
    examples = _draw("classify", LONG_ROWS["classify"], tokenizer, labels=["a"], max_length=40)
    lengths = [
        [len(part) for part in _segments(tokenizer, example.ids[0])] for example in examples[1:]
    ]
    short = len(_tokens(tokenizer, "kurz").ids)
    assert lengths == [[18, 18], [36 - short, short], [short, 36 - short]]


# ---- plan -------------------------------------------------------------------------------------


def _example(length, n_sequences=1):
    return Example(tuple(np.arange(length) for _ in range(n_sequences)), {"labels": 0})


def _many(n=200, seed=1):
    rng = random.Random(seed)
    return [_example(rng.randint(3, 90), rng.choice([1, 1, 2, 4])) for _ in range(n)]


@pytest.mark.parametrize("budget", [16, 100, 333, 5000])
def test_every_example_once_and_within_the_budget(budget):
    examples = _many()
    batches = micro_batches("choose", examples, budget, random.Random(0))
    found = [id(example) for batch in batches for example in batch.examples]
    assert sorted(found) == sorted(map(id, examples))
    for batch in batches:
        width = max(len(ids) for e in batch.examples for ids in e.ids)
        n_sequences = sum(len(e.ids) for e in batch.examples)
        assert batch.n_padded_tokens == width * n_sequences
        assert batch.n_padded_tokens <= budget or len(batch.examples) == 1
        assert batch.n_tokens == sum(len(ids) for e in batch.examples for ids in e.ids)
    padded, real = (sum(getattr(b, n) for b in batches) for n in ("n_padded_tokens", "n_tokens"))
    assert real <= padded
    assert budget > 1000 or padded < 1.2 * real


def test_batches_follow_the_seed():
    examples = _many()
    one, same, other = (
        [[id(e) for e in b.examples] for b in micro_batches("qa", examples, 300, random.Random(s))]
        for s in (1, 1, 2)
    )
    assert one == same
    assert one != other
    lengths = [max(len(e.ids[0]) for e in b.examples) for b in micro_batches(
        "qa", examples, 300, random.Random(1))]  # fmt: skip
    assert lengths != sorted(lengths)


def test_targets_are_counted():
    labels = np.array([IGNORED_LABEL, 3, 0, IGNORED_LABEL])
    batch = MicroBatch("ner", (Example((np.arange(4),), {"labels": labels}), _ner_example(5)))
    assert batch.n_targets == 2 + 3
    assert MicroBatch("choose", (_example(4, 3), _example(5, 2))).n_targets == 2


def _ner_example(length):
    labels = np.array([IGNORED_LABEL, *[0] * (length - 2), IGNORED_LABEL])
    return Example((np.arange(length),), {"labels": labels})


@pytest.mark.parametrize("counts", [{"a": 40, "b": 10}, {"a": 7, "b": 7, "c": 21}, {"a": 3}])
def test_tasks_are_spread(counts):
    """In any part of the plan each task has its share, give or take one."""
    streams = {
        task: [MicroBatch(task, (_example(3 + i),)) for i in range(n)] for task, n in counts.items()
    }
    plan = interleaved(streams)
    for task in streams:
        assert [batch for batch in plan if batch.task == task] == streams[task]
    for task, count in counts.items():
        seen = 0
        for i, batch in enumerate(plan):
            seen += batch.task == task
            assert abs(seen - (i + 1) * count / len(plan)) <= 1.5
    assert plan == interleaved(streams)


def test_steps_and_shares():
    batches = [MicroBatch("a", (_example(3 + i),)) for i in range(11)]
    steps = steps_of(batches, 4)
    assert [len(step) for step in steps] == [4, 4, 3]
    assert [batch for step in steps for batch in step] == batches
    for step in steps:
        for world_size in range(1, 6):
            shares = [share_of(step, rank, world_size) for rank in range(world_size)]
            assert sorted((i for share in shares for i, _ in share)) == list(range(len(step)))
            assert all(step[i] is batch for share in shares for i, batch in share)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def _config(**values):
    return FinetuneConfig(
        **{"model": "demo", "train": ("x.jsonl",), "output": "out", "task": "ner", **values}
    )


def _files(folder, tasks, n_rows=24):
    return tuple(
        f"{task}={write_jsonl(folder / f'{task}.jsonl', make_rows(task, n_rows))}" for task in tasks
    )


def _small(start, folder, tasks, n_rows=24, **values):
    """A training of a few short steps."""
    return _config(
        **{
            "model": str(start),
            "train": _files(folder, tasks, n_rows),
            "output": str(folder / "out"),
            "task": None,
            "max_length": ("64",),
            "max_batch_tokens": 128,
            "learning_rate": 3e-3,
            "hold_out": 0.25,
            "epochs": ("1",),
            "evaluations": 3,
            **values,
        }
    )


def _plan(config, tokenizer, start):
    data = read_data(config)
    return data, plan_training(config, data, tokenizer, str(start))


def _seen(steps, task="classify"):
    """How often each sequence is in the plan."""
    batches = [batch for step in steps for batch in step if batch.task == task]
    return Counter(tuple(e.ids[0].tolist()) for batch in batches for e in batch.examples)


@pytest.mark.parametrize("epochs", ["1", "3", "0.5", "2.5"])
def test_passes(start, tokenizer, tmp_path, epochs):
    config = _small(start, tmp_path, ["classify"], 40, epochs=(epochs,), max_batch_tokens=24)
    (data,), steps = _plan(config, tokenizer, start)
    whole, part = divmod(float(epochs), 1)
    once = _seen(_plan(replace(config, epochs=("1",)), tokenizer, start)[1])
    assert sum(once.values()) == len(data.train)
    seen = _seen(steps)
    for ids, times in once.items():
        assert whole * times <= seen[ids] <= (whole + (part > 0)) * times
    share = sum(seen.values()) / len(data.train)
    assert abs(share - float(epochs)) < 0.1


def test_the_plan_follows_the_seed(start, tokenizer, tmp_path):
    config = _small(start, tmp_path, ["ner", "choose", "qa", "extract"], join=0.5, crop=6)
    one, same, other = (
        _as_text(_plan(replace(config, seed=seed), tokenizer, start)[1]) for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other
    two_epochs = _as_text(_plan(replace(config, epochs=("2",)), tokenizer, start)[1])
    half = len(two_epochs) // 2
    assert two_epochs[:half] != two_epochs[half:], "drawn anew"


def _as_text(steps):
    return [
        [
            (b.task, [([i.tolist() for i in e.ids], str(e.targets)) for e in b.examples])
            for b in step
        ]
        for step in steps
    ]


def test_epochs_of_tasks_and_the_length_of_steps(start, tokenizer, tmp_path):
    config = _small(
        start, tmp_path, ["classify", "ner"], epochs=("1", "ner=2"), workers=2, accumulate=2
    )
    _, steps = _plan(config, tokenizer, start)
    assert {len(step) for step in steps[:-1]} == {4}
    once = _plan(replace(config, epochs=("1",)), tokenizer, start)[1]
    n_batches = [Counter(b.task for step in s for b in step) for s in (once, steps)]
    assert n_batches[1]["classify"] == n_batches[0]["classify"]
    assert 1.5 * n_batches[0]["ner"] < n_batches[1]["ner"] < 2.5 * n_batches[0]["ner"]
    assert len(_plan(replace(config, max_steps=2), tokenizer, start)[1]) == 2


@pytest.mark.parametrize(
    ("oversample", "german", "english"),
    [((), 1, 1), (("de=3",), 3, 1), (("*=2", "de=0"), 0, 2), (("ner:de=2", "qa:de=9"), 2, 1)],
)
def test_oversampling(start, tokenizer, tmp_path, oversample, german, english):
    config = _small(start, tmp_path, ["ner"], join=0.0, oversample=oversample)
    (data,), steps = _plan(config, tokenizer, start)
    counts = Counter(row.language for row in data.train)
    n_examples = sum(_seen(steps, "ner").values())
    assert n_examples == german * counts["de"] + english * counts["en"]


def test_a_part_of_the_rows_is_drawn_anew(start, tokenizer, tmp_path):
    config = _small(start, tmp_path, ["classify"], 60, oversample=("*=0.5",), epochs=("2",))
    (data,), steps = _plan(config, tokenizer, start)
    seen = _seen(steps)
    assert 0.6 < sum(seen.values()) / len(data.train) < 1.4
    assert {1, 2} <= set(seen.values())


def test_nothing_to_train_on(start, tokenizer, tmp_path):
    config = _small(start, tmp_path, ["ner"], oversample=("*=0",))
    with pytest.raises(ConfigError, match="ner: --epochs and --oversample leave nothing"):
        _plan(config, tokenizer, start)


def test_rows_to_measure_on_are_never_joined_or_cropped(start, tokenizer, tmp_path):
    config = _small(start, tmp_path, ["ner", "qa"], join=0.9, crop=3)
    data = read_data(config)
    batches = dev_batches(config, data, tokenizer, str(start))
    assert [sum(len(b.examples) for b in batches if b.task == item.task) for item in data] == [
        len(item.dev) for item in data
    ]


# ---- data -------------------------------------------------------------------------------------


def test_paragraphs_are_kept_out_whole_and_in_all_languages():
    def rows(word, order):
        made = [
            {"id": f"q{i}", "context": f"{word} {i // 5}", "question": "?", "answers": []}
            for i in range(200)
        ]
        order.shuffle(made)
        return [annotated("qa", row) for row in made]

    english, german = rows("paragraph", random.Random(1)), rows("Absatz", random.Random(2))
    out, same = (
        {row.record.id for row, is_out in zip(all_, held_out(all_, 0.3), strict=True) if is_out}
        for all_ in (english, german)
    )
    assert out == same
    assert 0.1 < len(out) / 200 < 0.5
    assert {int(i[1:]) // 5 for i in out}.isdisjoint(
        int(row.record.id[1:]) // 5 for row in english if row.record.id not in out
    )


def test_rows_to_measure_on(start, tmp_path):
    config = _small(start, tmp_path, ["ner"], 60, dev_rows=3)
    (data,) = read_data(config)
    assert Counter(row.language for row in data.dev) == {"de": 3, "en": 3}
    assert len(data.train) < 60
    assert not {r.record.id for r in data.dev} & {r.record.id for r in data.train}
    dev = write_jsonl(tmp_path / "dev.jsonl", make_rows("ner", 6))
    (data,) = read_data(replace(config, dev=(f"ner={dev}",)))
    assert (len(data.train), len(data.dev)) == (60, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": ("nowhere.jsonl",)}, r"^--train .*no file matches"),
        ({"dev": ("nowhere.jsonl",)}, r"^--dev .*no file matches"),
        ({"hold_out": 0.999999}, r"ner: --hold-out 0.999999 leaves no rows"),
        ({"hold_out": 0.0, "patience": 2}, r"--patience needs rows to measure on"),
    ],
)
def test_data_that_cannot_be_used(start, tmp_path, values, message):
    config = replace(_small(start, tmp_path, ["ner"]), task="ner", **values)
    with pytest.raises(ConfigError, match=message):
        read_data(config)


def test_labels_of_heads(start):
    model = ErnieMConfig.from_pretrained(start)
    assert labels_of("ner", _rows("ner", NER), model) == (NER_LABELS, None)
    # The order of the model is kept where its labels are the same.
    own = model.with_labels(["I-ORG", "O", "B-ORG"])
    assert labels_of("ner", _rows("ner", [NER[2]]), own)[0] == ["I-ORG", "O", "B-ORG"]
    assert labels_of("extract", _rows("extract", NER), model) == (KINDS, None)
    single = _rows("classify", [{"text": "a", "label": x} for x in "ba"])
    assert labels_of("classify", single, model) == (["a", "b"], "single_label_classification")
    several = _rows("classify", [{"text": "a", "label": x} for x in (["b"], ["a", "c"], [])])
    kind = "multi_label_classification"
    assert labels_of("classify", several, model) == (["a", "b", "c"], kind)
    number = _rows("classify", [{"text": "a", "label": 0.5}])
    assert labels_of("classify", number, model) == (["score"], "regression")
    for task in ("choose", "qa", "embed"):
        assert labels_of(task, [], model) == ([], None)
    with pytest.raises(ConfigError, match="labels are names in some rows, and lists"):
        labels_of("classify", [*single, *several], model)


# ---- scores -----------------------------------------------------------------------------------


def _score(task, rows, values):
    total, count = SCORES[task](_rows(task, rows), values)
    return total / count


def test_scores():
    """None stands for a row that failed: nothing was found there."""
    entity = SimpleNamespace(start=0, end=12, label="PER")
    assert _score("ner", NER, [[entity], None, [], []]) == 2 * 1 / (6 + 1)
    spans = [[(0, 12, "PER"), (13, 16, "PER")], [], [], []]
    assert _score("extract", NER, spans) == 2 * 1 / (6 + 2)
    rows = [{"text": "x", "label": label} for label in "aab"]
    labels = [[SimpleNamespace(label="a", score=0.9)]] * 2
    assert _score("classify", rows, [*labels, None]) == 2 / 3
    rows = [{"text": "x", "label": ["a"]}]
    both = [SimpleNamespace(label="a", score=0.9), SimpleNamespace(label="b", score=0.7)]
    assert _score("classify", rows, [both]) == 1 / 2
    number = [[SimpleNamespace(label="score", score=1.5)]]
    assert _score("classify", [{"text": "x", "label": 2}], number) == -0.25
    rows = make_rows("choose", 4)
    choices = [SimpleNamespace(best=best) for best in (0, 1, None)]
    assert _score("choose", rows, [*choices, None]) == 1 / 4
    rows = [_question("larch wood"), _question("2021"), _question(answers=[])]
    answers = [SimpleNamespace(best=SimpleNamespace(text="larch")), SimpleNamespace(best=None)]
    assert _score("qa", rows, [*answers, answers[1]]) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert _score("qa", rows, [None, None, answers[0]]) == 0.0


# ---- losses -----------------------------------------------------------------------------------


def _heads(start, task, rows, tokenizer):
    """A head without dropout, and its examples."""
    gold = _rows(task, rows)
    labels, problem_type = labels_of(task, gold, ErnieMConfig.from_pretrained(start))
    own = labels if task in ("ner", "classify") else ()
    torch.manual_seed(5)
    heads = SharedHeads({task: new_model(task, start, own, problem_type, 0.0)})
    vectors = np.random.default_rng(3).normal(size=(len(rows), 16)).astype(np.float32)
    how = Drawing(max_length=120, labels=labels, vectors=vectors)
    return heads, DRAW[task](gold, tokenizer, how, random.Random(0))


LOSS_ROWS = {
    "ner": ("ner", NER),
    "single": ("classify", make_rows("classify", 6)),
    "multi": ("classify", [{"text": "a b c", "label": ["x"]}, {"text": "d", "label": ["y", "z"]}]),
    "regression": ("classify", [{"text": "a b c", "label": 1.5}, {"text": "d", "label": -1}]),
    "choose": ("choose", [row for row in make_rows("choose", 8) if len(row["choices"]) == 3]),
    "qa": ("qa", make_rows("qa", 6)),
    "extract": ("extract", NER),
    "embed": ("embed", make_rows("embed", 4)),
}


def _padded(batch, name, filler):
    width = max(example.longest for example in batch.examples)
    rows = [example.targets[name] for example in batch.examples]
    return torch.tensor(
        np.array([np.pad(row, (0, width - len(row)), constant_values=filler) for row in rows])
    )


def _whole(batch, name):
    return torch.tensor(np.array([example.targets[name] for example in batch.examples]))


@pytest.mark.parametrize("kind", ["ner", "single", "multi", "regression", "choose", "qa"])
def test_losses_are_those_of_the_heads(start, tokenizer, kind):
    task, rows = LOSS_ROWS[kind]
    heads, examples = _heads(start, task, rows, tokenizer)
    batch = MicroBatch(task, tuple(examples))
    input_ids = collate(batch, 1)
    assert len({example.longest for example in examples}) > 1, "padding"
    if task == "ner":
        expected = heads[task](input_ids, labels=_padded(batch, "labels", IGNORED_LABEL)).loss
    elif task == "qa":
        places = {f"{n}_positions": _whole(batch, f"{n}s") for n in ("start", "end")}
        expected = heads[task](input_ids, **places).loss
    elif task == "choose":
        shape = (len(rows), 3, input_ids.size(1))
        expected = heads[task](input_ids.view(shape), labels=_whole(batch, "labels")).loss
    else:
        expected = heads[task](input_ids, labels=_whole(batch, "labels")).loss
    found = heads.loss(batch, torch.device("cpu")) / batch.n_targets
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_rows_with_any_number_of_choices(start, tokenizer):
    heads, examples = _heads(start, "choose", make_rows("choose", 8), tokenizer)
    assert len({len(example.ids) for example in examples}) > 1
    total = heads.loss(MicroBatch("choose", tuple(examples)), torch.device("cpu"))
    each = [heads.loss(MicroBatch("choose", (e,)), torch.device("cpu")) for e in examples]
    assert total.item() == pytest.approx(sum(each).item(), abs=1e-5)


def test_the_loss_of_spans(start, tokenizer):
    """Token by token, and whatever stands beside it in the batch."""
    heads, examples = _heads(start, "extract", NER, tokenizer)
    expected = 0.0
    for example in examples:
        output = heads["extract"](torch.tensor(example.ids[0])[None])
        for logits, name in ((output.start_logits, "starts"), (output.end_logits, "ends")):
            for logit, target in zip(logits[0].sigmoid(), example.targets[name], strict=True):
                expected -= (logit if target else 1 - logit).log().item() / 2
    batch = MicroBatch("extract", tuple(examples))
    loss = heads.loss(batch, torch.device("cpu")).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    longer = Example((np.full(120, 5),), {n: np.zeros(120, np.float32) for n in ("starts", "ends")})
    alone = heads.loss(MicroBatch("extract", (longer,)), torch.device("cpu")).item()
    both = heads.loss(replace(batch, examples=(*examples, longer)), torch.device("cpu")).item()
    assert both - alone == pytest.approx(loss, rel=1e-5)


def test_the_loss_of_vectors(start, tokenizer):
    heads, examples = _heads(start, "embed", make_rows("embed", 4), tokenizer)
    batch = MicroBatch("embed", tuple(examples))
    vectors = heads["embed"](collate(batch, 1)).logits
    wanted = _whole(batch, "vector")
    expected = (1 - F.cosine_similarity(vectors, wanted)).sum().item()
    assert heads.loss(batch, torch.device("cpu")).item() == pytest.approx(expected, abs=1e-6)
    same = [
        replace(example, targets={"vector": 3 * vector.detach().numpy()})
        for example, vector in zip(examples, vectors, strict=True)
    ]
    loss = heads.loss(MicroBatch("embed", tuple(same)), torch.device("cpu"))
    assert loss.item() == pytest.approx(0, abs=1e-5)


# ---- gradients --------------------------------------------------------------------------------


def _gradients(training, step, number=0):
    training.heads.train()
    training.heads.zero_grad(set_to_none=True)
    losses = backward(training, step, number)
    named = training.heads.named_parameters()
    return losses, {name: p.grad.clone() for name, p in named if p.grad is not None}


def _require_close(ours, theirs, atol=3e-6):
    # Sums in float32 whose order depends on the processor.
    assert ours.keys() == theirs.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs.values())
    for name, gradient in theirs.items():
        size = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(ours[name], gradient, atol=atol * size, rtol=0, msg=name)


def _prepared(config, folder) -> Training:
    return prepare(config, LocalSession(folder / "state"))


@pytest.mark.parametrize("task", ["ner", "classify", "choose", "qa", "extract", "embed"])
def test_two_batches_are_as_good_as_one(start, tmp_path, task):
    """A step is divided by the targets of all of it, not by those of each batch."""
    training = _prepared(_small(start, tmp_path, [task], 40, dropout=0.0), tmp_path)
    examples = [e for step in training.steps for batch in step for e in batch.examples]
    if task == "qa":  # padding is a place where an answer may be, as in the head's own loss
        (longest, _), *_ = Counter(e.longest for e in examples).most_common()
        examples = [e for e in examples if e.longest == longest]
    elif task == "embed":  # its own vectors teach a model nothing
        vectors = np.random.default_rng(3).normal(size=(len(examples), 16)).astype(np.float32)
        examples = [
            replace(e, targets={"vector": v}) for e, v in zip(examples, vectors, strict=True)
        ]
    assert len(examples) > 3
    one, two = (MicroBatch(task, tuple(part)) for part in (examples[:2], examples[2:]))
    both = MicroBatch(task, tuple(examples))
    losses, apart = _gradients(training, (one, two))
    loss, together = _gradients(training, (both,))
    _require_close(apart, together)
    assert losses[task] == pytest.approx(loss[task], rel=1e-6)


def _uneven_step(training):
    """Two batches of ner with different numbers of targets, one of classify, none of qa."""
    batches = [batch for step in training.steps for batch in step]
    ner = sorted((b for b in batches if b.task == "ner"), key=lambda batch: batch.n_targets)
    classify = next(batch for batch in batches if batch.task == "classify")
    assert ner[0].n_targets < ner[-1].n_targets
    return ner[0], ner[-1], classify


def test_what_a_task_weighs(start, tmp_path):
    """The mean over batches, each task by its weight; heads that are not asked get nothing."""
    config = _small(start, tmp_path, ["ner", "classify", "qa"], dropout=0.0)
    training = _prepared(config, tmp_path)
    a, b, c = _uneven_step(training)
    losses, all_ = _gradients(training, (a, b, c))
    ner, of_ner = _gradients(training, (a, b))
    classify, of_classify = _gradients(training, (c,))
    assert losses == pytest.approx({**ner, **classify}, abs=1e-6)
    summed = {
        name: 2 / 3 * of_ner.get(name, 0.0) + 1 / 3 * of_classify.get(name, 0.0) for name in all_
    }
    _require_close(all_, summed)
    assert not [name for name in all_ if ".qa." in name]
    training.config = replace(config, task_weight=("ner=3", "classify=0.5"))
    _, weighted = _gradients(training, (a, b, c))
    summed = {
        name: 2 * of_ner.get(name, 0.0) + 0.5 / 3 * of_classify.get(name, 0.0) for name in all_
    }
    _require_close(weighted, summed, atol=3e-6)


def test_dropout_follows_seed_step_and_place(start, tmp_path):
    training = _prepared(_small(start, tmp_path, ["ner"]), tmp_path)
    step = training.steps[0] + training.steps[1]
    torch.manual_seed(1)
    one = _gradients(training, step)
    torch.manual_seed(2)
    same = _gradients(training, step)
    assert one[0] == same[0]
    assert all(torch.equal(one[1][name], same[1][name]) for name in one[1])
    assert _gradients(training, step, number=1)[0] != one[0]
    assert _gradients(training, step[::-1])[0] != one[0]


def _one_of_two(rank, config, folder):
    """What each of two processes does; both write down what they got."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    session = LocalSession(folder / "state")
    session.rank, session.world_size = rank, 2
    training = prepare(config, session)
    losses, gradients = _gradients(training, _uneven_step(training))
    alone, gradients_alone = _gradients(training, _uneven_step(training)[2:])
    figures = evaluate(training)
    content = (losses, gradients, alone, gradients_alone, figures)
    torch.save(content, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_as_good_as_one(start, tmp_path, monkeypatch):
    """Different numbers of targets on each, a head that no step touches, a worker without work;
    and their measurements."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    config = _small(start, tmp_path, ["ner", "classify", "qa"])
    # A forked child needs no second import of torch; threads for a GPU would forbid it.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(
        _one_of_two, (config, tmp_path), nprocs=2, start_method=method
    )
    training = _prepared(config, tmp_path)
    step = _uneven_step(training)
    losses, gradients = _gradients(training, step)
    alone, gradients_alone = _gradients(training, step[2:])
    figures = evaluate(training)
    assert len(figures) == 8
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"{rank}.pt")
        assert theirs[0] == pytest.approx(losses, abs=1e-6)
        _require_close(theirs[1], gradients)
        assert theirs[2] == pytest.approx(alone, abs=1e-6)
        _require_close(theirs[3], gradients_alone)
        assert theirs[4] == pytest.approx(figures, abs=1e-6)


# ---- optimizer --------------------------------------------------------------------------------

ALL_TASKS = ["ner", "classify", "choose", "qa", "extract", "embed"]


def _groups(start, rates, tasks=ALL_TASKS):
    """Learning rate and weight decay of each parameter that learns, by name."""
    heads = SharedHeads(
        {t: new_model(t, start, ["O", "a"] if t == "ner" else (), None, None) for t in tasks}
    )
    optimizer = make_optimizer(heads, rates, 2)
    names = {id(p): name for name, p in heads.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    learning = {name for name, p in heads.named_parameters() if p.requires_grad}
    assert found.keys() == learning
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    return found


def _rate(groups, part):
    (rate,) = {round(rate, 9) for name, (rate, _) in groups.items() if part in name}
    return rate


def test_learning_rates(start):
    groups = _groups(start, Rates(peak=1e-3, head=4.0, layer_decay=0.5, weight_decay=0.1))
    assert _rate(groups, "encoder.layers.1.") == 1e-3
    assert _rate(groups, "encoder.layers.0.") == 5e-4
    assert _rate(groups, "embeddings.") == 2.5e-4
    for part in ("classifier.", "qa_outputs.", "linear_start.", "linear_end.", "pooler."):
        assert _rate(groups, part) == 4e-3
    # No loss reaches the pooler of extract; each of the others learns its own.
    poolers = {name for name in groups if "pooler" in name}
    assert poolers == {
        f"models.{task}.ernie_m.pooler.dense.{part}"
        for task in ("classify", "choose")
        for part in ("weight", "bias")
    }
    assert not [name for name in groups if "encoder" in name and not name.startswith("models.ner.")]
    for name, (_, decay) in groups.items():
        is_matrix = name.endswith("weight") and "norm" not in name and "embeddings" not in name
        assert decay == (0.1 if is_matrix else 0.0), name


def test_what_is_frozen(start):
    everything = _groups(start, Rates())
    frozen = _groups(start, Rates(frozen_layers=1))
    assert everything.keys() - frozen.keys() == {
        name for name in everything if "embeddings." in name or "layers.0." in name
    }
    embeddings = _groups(start, Rates(frozen_embeddings=True))
    assert everything.keys() - embeddings.keys() == {n for n in everything if "embeddings." in n}
    heads = _groups(start, Rates(frozen_layers=2))
    assert not [name for name in heads if ".encoder." in name or "embeddings." in name]


@pytest.mark.parametrize(
    ("n_steps", "warmup"), [(1, 0.0), (1, 0.5), (10, 0.0), (10, 0.25), (7, 0.99)]
)
def test_the_rate_rises_and_falls(n_steps, warmup):
    scales = [learning_rate_scale(step, n_steps, warmup) for step in range(n_steps)]
    assert max(scales) == 1.0
    assert min(scales) > 0
    top = scales.index(1.0)
    assert top + 1 == max(1, int(np.ceil(n_steps * warmup)))
    assert all(a < b for a, b in pairwise(scales[: top + 1]))
    # What falls would be 0 one step after the last.
    assert all(a > b for a, b in pairwise(scales[top + 1 :]))
    assert scales[-1] <= 1 / max(1, n_steps - top - 1)


def test_a_head_is_kept_if_its_labels_are_the_same(start):
    """And not if there are just as many; thresholds of the model as it was never are."""
    before = ErnieMForTokenClassification.from_pretrained(start)
    assert "task_specific_params" in before.config.extra
    same = new_model("ner", start, before.config.labels, None, None)
    assert torch.equal(same.classifier.weight, before.classifier.weight)
    other = new_model("ner", start, ["O", "B-LOC", "I-LOC"], None, None)
    assert not torch.equal(other.classifier.weight, before.classifier.weight)
    assert other.config.labels == ["O", "B-LOC", "I-LOC"]
    for model in (same, other):
        assert "task_specific_params" not in model.config.extra


# ---- whole trainings --------------------------------------------------------------------------


@pytest.fixture
def no_picture(monkeypatch):
    """Drawing takes longer than the trainings here."""
    monkeypatch.setattr(export, "curve", lambda history: None)


class Interrupted(Exception):
    """What a test ends a training with."""


class DyingSession(LocalSession):
    """Ends the training at one of its reports."""

    def __init__(self, folder, at, keeps):
        super().__init__(folder)
        self.at, self.keeps = at, keeps

    def report(self, metrics, folder):
        last = len(self.reports) + 1 == self.at
        if not last or self.keeps:
            super().report(metrics, folder)
        if last:
            raise Interrupted


def _run(config, name, session=None) -> tuple[Progress, Path]:
    """Trains into a folder of its own beside the output of the config."""
    output = Path(config.output).parent / name
    session = session or LocalSession(output.parent / f"{name}-state")
    return train(replace(config, output=str(output)), session), output


def _tensors(folder):
    return {
        f"{path.parent.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _require_same_models(one, two):
    ours, theirs = _tensors(one), _tensors(two)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_same_seed_gives_the_same_model(start, tmp_path, no_picture):
    config = _small(start, tmp_path, ["ner", "classify"], 12)
    one, two, other = (
        _run(replace(config, seed=seed), name) for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert one[0].history == two[0].history
    _require_same_models(one[1], two[1])
    assert other[0].history != one[0].history
    assert torch.are_deterministic_algorithms_enabled() is False


@pytest.mark.parametrize(("at", "keeps"), [(2, True), (2, False), (3, True)])
def test_an_interrupted_training_goes_on(start, tmp_path, no_picture, at, keeps):
    """With dropout, prompts drawn anew, two tasks and two epochs; the same figures and weights."""
    config = _small(
        start, tmp_path, ["ner", "extract"], 16, epochs=("1.5",), accumulate=2, join=0.5
    )
    whole, straight = _run(config, "straight")
    assert [entry["step"] for entry in whole.history][-1] == whole.step > 3
    state = tmp_path / "broken-state"
    with pytest.raises(Interrupted):
        _run(config, "broken", DyingSession(state, at, keeps))
    assert not (tmp_path / "broken" / "config.json").exists()
    assert len(torch.load(state / STATE_FILE)["progress"]["history"]) == at - (not keeps)
    again = LocalSession(state)
    after, resumed = _run(config, "broken", again)
    assert len(again.reports) == 3 - at + (not keeps)
    assert vars(after) == vars(whole)
    _require_same_models(straight, resumed)
    assert json.loads((resumed / export.HISTORY).read_text()) == whole.history
    assert {p.name for p in state.iterdir()} == {STATE_FILE}


@dataclass
class Script:
    """Stands for `evaluate`: gives scores that are written down, and notes the weights."""

    scores: list[float]
    weights: list = None

    def __call__(self, training):
        self.weights = self.weights or []
        self.weights.append({n: p.detach().clone() for n, p in training.heads.named_parameters()})
        n = len(training.progress.history)
        return {"score": self.scores[n], "dev_loss": 1.0}


def test_patience_and_the_best_step(start, tmp_path, no_picture, monkeypatch):
    """The step with the best score is what is saved, and training ends when none is better."""
    script = Script([0.1, 0.5, 0.3, 0.5, 0.9, 0.9])
    monkeypatch.setattr(loop, "evaluate", script)
    config = _small(start, tmp_path, ["ner"], 20, max_batch_tokens=40, evaluations=6, patience=2)
    progress, output = _run(config, "out")
    assert [entry["score"] for entry in progress.history] == [0.1, 0.5, 0.3, 0.5]
    assert progress.best_step == progress.history[1]["step"]
    assert progress.step == progress.history[3]["step"]
    tensors = load_file(output / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(tensor, script.weights[1][f"models.ner.{name}"])
    assert not torch.equal(
        tensors["classifier.weight"], script.weights[3]["models.ner.classifier.weight"]
    )


def test_patience_is_over_for_a_resumed_training_too(start, tmp_path, no_picture, monkeypatch):
    """Once, a run that was killed after its last measurement went on beyond it."""
    monkeypatch.setattr(loop, "evaluate", Script([0.5, 0.3, 0.3, 0.9]))
    config = _small(start, tmp_path, ["ner"], 20, max_batch_tokens=40, evaluations=4, patience=1)
    with pytest.raises(Interrupted):
        _run(config, "out", DyingSession(tmp_path / "out-state", 2, keeps=True))
    progress, _ = _run(config, "out")
    assert [entry["score"] for entry in progress.history] == [0.5, 0.3]
    assert progress.best_step == progress.history[0]["step"]


def test_the_best_measurement():
    def entry(score, dev_loss):
        return {"score": score, "dev_loss": dev_loss}

    history = [entry(0.2, 1.0), entry(0.5, 0.9), entry(0.5, 0.7), entry(0.5, 0.7), entry(0.4, 0.1)]
    assert best_of(history) is history[2]
    assert best_of([{"step": 1}, last := {"step": 2}]) is last


def test_measurements_are_spread():
    assert loop._measurements(100, 4) == {25, 50, 75, 100}
    assert loop._measurements(3, 10) == {1, 2, 3}
    assert all(max(loop._measurements(n, w)) == n for n in range(1, 60) for w in range(1, 20))


def test_without_rows_to_measure_on(start, tmp_path, no_picture):
    progress, output = _run(_small(start, tmp_path, ["ner"], 8, hold_out=0.0), "out")
    assert progress.best_step == progress.step
    assert set(progress.history[-1]) == {"step", "tokens", "loss", "loss.ner"}
    assert (output / "config.json").exists()


LEARNING = {"dropout": 0.0, "learning_rate": 1e-2, "epochs": ("8",), "evaluations": 2}


def test_it_learns_topics(start, tmp_path, no_picture):
    progress, output = _run(_small(start, tmp_path, ["classify"], 60, **LEARNING), "out")
    assert progress.history[-1]["score"] > 0.9  # by chance 0.33
    assert progress.history[-1]["loss"] < progress.history[0]["loss"] / 2
    model = _load(output, "classify")
    texts = {"goal team ball": "sports", "snow wind": "weather", "drum band song": "music"}
    found = model.predict([annotated("embed", {"text": text}).record for text in texts])
    assert [outcome.value[0].label for outcome in found] == list(texts.values())


def test_it_learns_entities(start, tmp_path, no_picture):
    progress, _ = _run(_small(start, tmp_path, ["ner"], 60, **LEARNING), "out")
    assert progress.history[-1]["score"] > 0.9


def test_it_learns_to_choose(start, tmp_path, no_picture):
    config = _small(start, tmp_path, ["choose"], 60, **{**LEARNING, "epochs": ("1",)})
    progress, _ = _run(config, "out")
    assert progress.history[-1]["score"] > 0.9  # by chance 0.42


def test_it_learns_numbers(start, tmp_path, no_picture):
    """Once, a regression had two outputs."""
    rows = [
        {**row, "label": list(TOPICS).index(row["label"]) - 1} for row in make_rows("classify", 60)
    ]
    config = _small(start, tmp_path, ["classify"], **LEARNING)
    write_jsonl(tmp_path / "classify.jsonl", rows)
    progress, output = _run(config, "out")
    assert progress.history[-1]["score"] > -0.2  # minus the squared error; by chance -0.67
    assert ErnieMConfig.from_pretrained(output).problem_type == "regression"


def test_vectors_come_near_those_of_the_teacher(start, tmp_path, tokenizer, no_picture):
    """The start is its own teacher unless another is named; models may be shorter than windows."""
    torch.manual_seed(9)
    config = ErnieMConfig.from_pretrained(start)
    ErnieMForEmbedding(replace(config, mask_mode="paddle")).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    config = _small(start, tmp_path, ["embed"], 60, teacher=str(tmp_path / "teacher"), **LEARNING)
    progress, _ = _run(config, "out")
    first, last = progress.history[0], progress.history[-1]
    assert last["dev_loss"] < 0.5 * first["loss"]
    assert last["score"] == -last["dev_loss"]
    own = replace(config, teacher=None, learning_rate=1e-12, evaluations=1, epochs=("0.1",))
    assert _run(own, "own")[0].history[-1]["dev_loss"] == pytest.approx(0, abs=1e-5)


# ---- what comes out ---------------------------------------------------------------------------


def _load(folder, task) -> Predictor:
    return Predictor.load(
        PredictorConfig(
            model=str(folder), options=OPTIONS[task], window_tokens=64, overlap_tokens=16,
            device="cpu", n_threads=1,
        )
    )  # fmt: skip


def _predicts(folder, task):
    """Values of a few rows by the model of a folder."""
    outcomes = _load(folder, task).predict([r.record for r in _rows(task, make_rows(task, 4))])
    assert all(isinstance(outcome, Prediction) for outcome in outcomes), outcomes
    return [outcome.value for outcome in outcomes]


def _dropouts(folder):
    config = ErnieMConfig.from_pretrained(folder)
    return {name: getattr(config, name) for name in DROPOUTS}


@pytest.mark.parametrize("task", ALL_TASKS)
def test_one_task_is_one_model(start, tmp_path, no_picture, task):
    config = _small(start, tmp_path, [task], 12, dropout=0.0, max_steps=2, evaluations=2)
    progress, output = _run(config, "out")
    assert progress.step == 2
    assert len(_predicts(output, task)) == 4
    assert _dropouts(output) == DROPOUTS
    assert base_name(output) is None
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "model.safetensors", export.HISTORY}
    assert not is_model_file(export.HISTORY)
    history = json.loads((output / export.HISTORY).read_text())
    assert history == progress.history
    assert {"step", "tokens", "loss", f"loss.{task}", "dev_loss", "score"} <= set(history[0])
    assert (f"score.{task}" in history[0]) == (task != "embed")
    assert 0 < history[0]["tokens"] < history[1]["tokens"] == progress.tokens


@pytest.mark.parametrize("weights", ["float32", "float16", "int8"])
def test_several_tasks_share_an_encoder(start, tmp_path, no_picture, weights, monkeypatch):
    monkeypatch.setenv("ERNIEM_BATCH_CACHE", str(tmp_path / "cache"))
    tasks = ["ner", "classify", "embed", "extract"]
    config = _small(start, tmp_path, tasks, 12, max_steps=4, evaluations=1, storage=weights)
    _, output = _run(config, "out")
    folders = {path.name for path in output.iterdir() if path.is_dir()}
    assert folders == {"encoder", "ner", "classify", "extract"}
    for task in tasks:
        folder = str(output / ("encoder" if task == "embed" else task))
        assert len(_predicts(folder, task)) == 4
        # By its URL too, where the base has to be fetched with it.
        assert len(_predicts(f"file://{folder}", task)) == 4
        assert _dropouts(folder) == DROPOUTS
    encoder = load_file(output / "encoder" / "model.safetensors")
    assert not [name for name in encoder if "classifier" in name or "pooler" in name]
    for name in folders - {"encoder"}:
        assert base_name(output / name) == "../encoder"
        own = load_file(output / name / "model.safetensors")
        assert all(key.startswith(("classifier", "linear_", "ernie_m.pooler")) for key in own), (
            "nothing of the encoder"
        )
        assert not (output / name / "sentencepiece.bpe.model").exists()
    assert ErnieMConfig.from_pretrained(output / "classify").labels == sorted(TOPICS)
    assert "task_specific_params" not in ErnieMConfig.from_pretrained(output / "encoder").extra


def test_how_weights_are_stored(start, tmp_path, no_picture):
    folders = {}
    for weights in ("float32", "float16", "int8"):
        config = _small(start, tmp_path, ["ner"], 12, max_steps=2, evaluations=1, storage=weights)
        folders[weights] = _run(config, weights)[1]
    sizes = {w: (f / "model.safetensors").stat().st_size for w, f in folders.items()}
    assert 0.49 < sizes["float16"] / sizes["float32"] < 0.55
    assert 0.24 < sizes["int8"] / sizes["float32"] < 0.4  # rows are short here
    for weights, kind in (("float32", torch.float32), ("float16", torch.float16)):
        assert {t.dtype for t in load_file(folders[weights] / "model.safetensors").values()} == {
            kind
        }
    stored = {t.dtype for t in load_file(folders["int8"] / "model.safetensors").values()}
    assert torch.int8 in stored
    values = [_predicts(folder, "ner") for folder in folders.values()]
    assert len(values[0]) == len(values[1]) == len(values[2]) == 4
    whole, half = (_tensors(folders[weights]) for weights in ("float32", "float16"))
    assert all(torch.equal(tensor.half(), half[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_precision(start, tmp_path, no_picture, dtype):
    """The weights stay float32."""
    config = _small(start, tmp_path, ["ner"], 12, max_steps=2, evaluations=1, dtype=dtype)
    progress, output = _run(config, "out")
    assert np.isfinite(progress.history[-1]["dev_loss"])
    assert {t.dtype for t in _tensors(output).values()} == {torch.float32}


def test_a_picture():
    history = [
        {"step": s, "tokens": 1000 * s, "loss": 1 / s, "loss.ner": 1 / s, "loss.qa": 2 / s}
        | ({"dev_loss": 1.0, "score": 0.5, "score.ner": 0.4, "dev_loss.ner": 1.0} if s > 1 else {})
        for s in range(1, 4)
    ]
    for figures in (history, [{"step": 1, "tokens": 10, "loss": None}]):
        picture = export.curve(figures)
        assert picture is not None
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert picture.endswith(b"IEND\xaeB`\x82")
    assert export.curve([]) is None


def test_history_and_picture_are_written(tmp_path):
    export.write_history(
        str(tmp_path / "out"), [{"step": 1, "tokens": 10, "loss": 1.0}], lambda: None
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"training_results.json", "curve.png"}
    # A place that cannot be written to is no reason to lose a training.
    (tmp_path / "file").write_bytes(b"")
    export.write_history(
        str(tmp_path / "file"), [{"step": 1, "tokens": 10, "loss": 1.0}], lambda: None
    )


# ---- settings ---------------------------------------------------------------------------------

WRONG = [
    ({"max_batch_tokens": 7}, "--max-batch-tokens must be at least 8, got 7"),
    ({"accumulate": 0}, "--accumulate must be at least 1, got 0"),
    ({"workers": 0}, "--workers must be at least 1"),
    ({"evaluations": 0}, "--evaluations must be at least 1"),
    ({"dev_rows": 0}, "--dev-rows must be at least 1"),
    ({"frozen_layers": -1}, "--frozen-layers must be at least 0"),
    ({"num_gpus_per_worker": -0.5}, "--num-gpus-per-worker must be at least 0"),
    ({"weight_decay": -1e-3}, "--weight-decay must be at least 0"),
    ({"weight_decay": float("nan")}, "--weight-decay must be at least 0"),
    ({"negatives": -1.0}, "--negatives must be at least 0"),
    ({"max_steps": 0}, "--max-steps must be at least 1"),
    ({"num_cpus_per_worker": 0}, "--num-cpus-per-worker must be at least 1"),
    ({"patience": 0}, "--patience must be at least 1"),
    ({"crop": 0}, "--crop must be at least 1"),
    ({"hold_out": 1.0}, "--hold-out must be from 0 to below 1, got 1.0"),
    ({"warmup": -0.1}, "--warmup must be from 0 to below 1"),
    ({"join": 1.0}, "--join must be from 0 to below 1"),
    ({"dropout": 1.0}, "--dropout must be from 0 to below 1"),
    ({"dropout": float("nan")}, "--dropout must be from 0 to below 1"),
    ({"layer_decay": 0.0}, "--layer-decay must be above 0 and at most 1"),
    ({"layer_decay": 1.1}, "--layer-decay must be above 0 and at most 1, got 1.1"),
    ({"learning_rate": 0.0}, "--learning-rate must be above 0"),
    ({"learning_rate": float("inf")}, "--learning-rate must be above 0"),
    ({"head_rate": -1.0}, "--head-rate must be above 0"),
    ({"max_grad_norm": 0.0}, "--max-grad-norm must be above 0"),
    ({"task": "tag"}, "--task must be one of ner, .*; got 'tag'"),
    ({"task": "ner,,qa"}, "--task must be one of .*; got ''"),
    ({"task": None}, "--task must be one of .*; none is named"),
    ({"train": ()}, "--train: there is nothing for ner: write ner=FILES"),
    ({"train": ("ner=a",), "task": "ner,qa"}, "--train: there is nothing for qa"),
    ({"train": ("ner=a", "qa=b")}, "--train qa=b: --task does not name this task"),
    ({"epochs": ("2", "qa=1")}, "--epochs qa=1: --task does not name this task"),
    ({"epochs": ("0",)}, "--epochs must be a number above 0, got '0'"),
    ({"epochs": ("inf",)}, "--epochs must be a number above 0, got 'inf'"),
    ({"epochs": ("ner=many",)}, "--epochs must be a number above 0, got 'many'"),
    ({"max_length": ("7",)}, "--max-length must be at least 8, got 7"),
    ({"max_length": ("x",)}, "--max-length must be a number above 0, got 'x'"),
    ({"task_weight": ("ner=-1",)}, "--task-weight must be a number above 0, got '-1'"),
    ({"oversample": ("de",)}, "--oversample must be LANG=FACTOR .*, got 'de'"),
    ({"oversample": ("de=-1",)}, "--oversample must be LANG=FACTOR"),
    ({"oversample": ("de=nan",)}, "--oversample must be LANG=FACTOR"),
    ({"oversample": ("=2",)}, "--oversample must be LANG=FACTOR"),
    ({"oversample": ("tag:de=2",)}, "--oversample must be LANG=FACTOR or TASK:LANG=FACTOR"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_settings_are_checked_when_they_are_made(values, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        _config(**values)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--accumulate", "0"], "--accumulate must be at least 1, got 0"),
        (["--epochs", "qa=2"], "--epochs qa=2: --task does not name this task"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--dtype", "float8"], "--dtype"),
        (["--epoch", "3"], "--epoch"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, capsys, monkeypatch, flags, message):
    """One sentence, exit code 2, and nothing was begun."""
    monkeypatch.setattr(cli, "configure_logging", lambda: None)
    arguments = {
        "--task": "ner",
        "--model": "demo",
        "--train": "x",
        "--output": str(tmp_path / "o"),
    }
    arguments |= dict([flags])
    assert cli.main(["finetune", *(x for pair in arguments.items() for x in pair)]) == 2
    said = capsys.readouterr()
    assert message in " ".join((said.err + said.out).split())
    assert "Traceback" not in said.err
    assert not (tmp_path / "o").exists()


def test_values_of_tasks():
    config = _config(
        task=None,
        train=("ner=a", "ner=b", "qa=c", "d"),
        dev=("qa=e",),
        epochs=("2", "qa=4"),
        max_length=("ner=50",),
        task_weight=("qa=0.5",),
        oversample=("de=2", "qa:de=3", "*=0.5"),
    )
    assert config.tasks == ["ner", "qa"]
    assert [config.inputs(task) for task in config.tasks] == [["a", "b"], ["c"]]
    assert [config.dev_inputs(task) for task in config.tasks] == [[], ["e"]]
    assert [config.epochs_of(task) for task in config.tasks] == [2, 4]
    assert [config.max_length_of(task) for task in config.tasks] == [50, 384]
    assert [config.weight_of(task) for task in config.tasks] == [1.0, 0.5]
    assert config.factors("ner") == {"de": 2, "*": 0.5}
    assert config.factors("qa") == {"de": 3, "*": 0.5}
    assert _config(task="qa, ner,qa").tasks == ["qa", "ner"]
    # A file whose name looks like one of these.
    assert _config(train=("part=1/x.jsonl",)).inputs("ner") == ["part=1/x.jsonl"]


def test_who_computes_is_no_setting():
    two = _config(workers=2, accumulate=1, output="a", address="x", num_cpus_per_worker=1)
    one = _config(workers=1, accumulate=2, output="b", overwrite=True)
    assert two.settings() == one.settings()
    assert _config().settings() != one.settings()
    assert json.loads(json.dumps(one.settings())) is not None


def test_paths_for_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = _config(
        model="model", train=("ner=a", "s3://b/c"), dev=("d",), output="out", teacher="org/name"
    ).with_absolute_paths()
    here = str(tmp_path)
    assert config.train == (f"ner={here}/a", "s3://b/c")
    assert (config.dev, config.output) == ((f"{here}/d",), f"{here}/out")
    assert (config.model, config.teacher) == (f"{here}/model", "org/name")
    assert config.settings() == config.with_absolute_paths().settings()


# ---- runs -------------------------------------------------------------------------------------


@pytest.fixture
def small_run(start, tmp_path, monkeypatch, no_picture):
    """`run.finetune` with a LocalSession in place of Ray; notes how often it trained."""
    fits = []

    def fit(config, output, lease, name):
        fits.append(output)
        train(config, LocalSession(Path(output) / run.RUN / name))

    monkeypatch.setattr(run, "_fit", fit)
    config = _small(start, tmp_path, ["ner"], 12, max_steps=2, evaluations=1)
    return config, fits


def test_a_finished_training_does_nothing(small_run, tmp_path):
    config, fits = small_run
    report = run.finetune(config)
    assert (report.steps, report.tasks, report.output) == (2, ["ner"], config.output)
    assert report.score is not None
    assert report.history.endswith("/out/training_results.json")
    assert json.loads(report.as_line())["best_step"] == 2
    output = tmp_path / "out"
    assert not (output / run.RUN).exists()
    assert not is_model_file(run.DONE)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert run.finetune(replace(config, workers=1, num_cpus_per_worker=1)) == report
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    with pytest.raises(ConfigError, match=r"other settings \(--learning-rate, --seed\)"):
        run.finetune(replace(config, seed=8, learning_rate=1.0))
    assert len(fits) == 1
    (output / "left over").write_bytes(b"x")
    again = run.finetune(replace(config, seed=8, overwrite=True))
    assert len(fits) == 2
    assert (again.steps, again.output) == (report.steps, report.output)
    assert not (output / "left over").exists()


def test_an_interrupted_run_is_claimed(small_run, tmp_path, monkeypatch):
    config, fits = small_run

    def killed(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(run, "_fit", killed)
        with pytest.raises(Interrupted):
            run.finetune(config)
    settings = tmp_path / "out" / run.SETTINGS
    assert settings.exists()
    with pytest.raises(ConfigError, match=r"--output .*out holds .* settings \(--max-steps\)"):
        run.finetune(replace(config, max_steps=3))
    with pytest.raises(ConfigError, match=r"\(--accumulate\)"):
        run.finetune(replace(config, workers=2))
    assert fits == []
    assert run.finetune(config).steps == 2
    assert not settings.exists()


@pytest.mark.parametrize("at", ["the export", "the end"])
def test_a_training_that_wakes_up_late_writes_nothing(small_run, tmp_path, monkeypatch, at):
    """Another one has started anew meanwhile, with other settings, and is complete."""
    config, _ = small_run
    later = replace(config, seed=8, overwrite=True)
    fit = run._fit
    content = {}

    def take_over():
        monkeypatch.setattr(run, "_fit", fit)
        monkeypatch.setattr(lease_module, "is_dead", lambda holder: True)
        run.finetune(later)
        paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        content.update({path: path.read_bytes() for path in paths if "_run" not in path.parts})

    class Asleep(LocalSession):
        def __init__(self, folder, lease):
            super().__init__(folder)
            self.lease = lease

        def prove(self):
            if not content and at == "the export":
                take_over()
            require_owner(str(tmp_path / "out"), self.lease.holder.owner)

    def late(config, output, lease, name):
        train(config, Asleep(Path(output) / run.RUN / name, lease))
        take_over()

    monkeypatch.setattr(run, "_fit", late)
    with pytest.raises(JobError, match="another run has taken over"):
        run.finetune(config)
    assert content
    assert {path: path.read_bytes() for path in content} == content
    assert not (tmp_path / "out" / run.RUN).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 5000, b"[]", b'{"settings": 5}', b"{}"])
@pytest.mark.parametrize("name", [run.DONE, run.SETTINGS])
def test_damaged_documents_of_a_training(small_run, tmp_path, name, content):
    config, fits = small_run
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ErnieMBatchError, match=r"(is damaged .*|other settings .*)--overwrite"):
        run.finetune(config)
    assert path.read_bytes() == content
    assert fits == []


def test_a_model_is_not_written_over(small_run, start):
    config, fits = small_run
    with pytest.raises(ConfigError, match="holds a model already: choose another folder"):
        run.finetune(replace(config, output=str(start)))
    assert not (start / "_run").exists()
    assert fits == []


@pytest.mark.parametrize("name", ["model", "train", "dev", "prompts", "teacher"])
def test_what_is_read_is_not_deleted(small_run, start, tmp_path, name):
    """Once, --overwrite deleted the model it was to start from."""
    config, fits = small_run
    path = tmp_path / "out" / "data.jsonl"
    write_jsonl(path, make_rows("ner", 12))
    value = {"model": str(tmp_path / "out"), "train": (f"ner={path}",), "dev": (str(path),)}
    config = replace(config, overwrite=True, **{name: value.get(name, str(path))})
    with pytest.raises(ConfigError, match=f"--overwrite would delete --{name} .*out"):
        run._require_elsewhere(config, config.output)
    assert path.exists()
    beside = replace(config, output=str(tmp_path / "ou"))
    run._require_elsewhere(beside, beside.output)
    assert fits == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_length": ("129",)}, "--max-length 129 is more than the model holds: at most 128"),
        ({"frozen_layers": 3}, "--frozen-layers 3: the model has 2"),
        ({"train": ("ner=nowhere.jsonl",)}, "^--train nowhere.jsonl: no file matches"),
    ],
)
def test_mistakes_are_found_before_the_work(small_run, tmp_path, values, message):
    config, fits = small_run
    with pytest.raises(ConfigError, match=message):
        run.finetune(replace(config, **values))
    assert fits == []
    assert not (tmp_path / "out").exists()


def test_the_output_of_several_tasks_can_be_trained_on(start, tmp_path, no_picture):
    """With the heads it has, and for a new task with its encoder."""
    tasks = ["ner", "classify"]
    config = _small(start, tmp_path, tasks, 12, max_steps=2, evaluations=1)
    _, output = _run(config, "first")
    more = _small(start, tmp_path, [*tasks, "qa"], 12, max_steps=1, evaluations=1)
    more = replace(more, model=str(output))
    assert [start_folder(more, task).name for task in (*tasks, "qa", "embed")] == [
        "ner",
        "classify",
        "encoder",
        "encoder",
    ]
    training = loop.prepare(more, LocalSession(tmp_path / "unused"))
    heads = {"ner": ErnieMForTokenClassification, "classify": ErnieMForSequenceClassification}
    for task, cls in heads.items():
        before = cls.from_pretrained(output / task).classifier.weight
        assert torch.equal(training.heads[task].classifier.weight, before)


def test_label_smoothing_spreads_the_target(start, tmp_path, tokenizer):
    config = _small(start, tmp_path, ["classify"], 12)
    training = loop.prepare(config, LocalSession(tmp_path / "unused"))
    batch = training.steps[0][0]
    model = training.heads.eval()["classify"]
    with torch.no_grad():
        logits = model(collate(batch, 1)).logits.log_softmax(-1)
        labels = torch.tensor([example.targets["labels"] for example in batch.examples])
        right = -logits[torch.arange(len(labels)), labels].sum()
        expected = 0.8 * right - 0.2 * logits.mean(dim=1).sum()
        found = training.heads.loss(batch, torch.device("cpu"), 0.2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
