"""`taskflow_compat` against what PaddleNLP 2.8.1 itself answered, and the default mode beside it.

Results are compared as sets: the reference gives those of a window in the order of a Python set of
tuples with floats, which is no order at all.
"""

import json
import shutil
from pathlib import Path

import pytest

from erniem_batch import pipeline
from erniem_batch.tasks import taskflow

TOLERANCE = 1e-4

# Lines of uie_taskflow.jsonl where the order of that set decides: their first window holds spans
# of the prompt and of the text, and whichever is "first" makes its stage a classification or not.
BY_CHANCE = {"uie_taskflow.jsonl": (71, 87), "uie_taskflow_dense.jsonl": ()}


@pytest.fixture(scope="module")
def uiem_dir(data_dir, tokenizer_dir, tmp_path_factory) -> Path:
    """The PaddleNLP folder of the tests, with its vocabulary."""
    folder = tmp_path_factory.mktemp("uiem")
    for path in (data_dir / "uiem_paddle").iterdir():
        if path.name in ("config.json", "model_state.pdparams"):
            shutil.copy(path, folder)
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, folder)
    # Settings of transformers, in which the lone "▁" stays; PaddleNLP drops it.
    (folder / "tokenizer_config.json").unlink()
    return folder


def extractor(folder, case, **options):
    names = ("schema", "schema_lang", "position_prob", "max_seq_len", "split_sentence")
    given = {name: case[name] for name in names}
    return pipeline("extract", str(folder), device="cpu", n_threads=1, **given, **options)


def facts(result, path=()):
    """Everything in a result, nested or not, as (where, text, start, end) with its probability."""
    found = []
    for name, items in result.items():
        for item in items:
            key = (*path, name, item["text"], item.get("start"), item.get("end"))
            found.append((str(key), item["probability"]))
            found += facts(item.get("relations", {}), key)
    return sorted(found)


def equal(ours, theirs) -> bool:
    for mine, golden in zip(map(facts, ours), map(facts, theirs), strict=True):
        if [key for key, _ in mine] != [key for key, _ in golden]:
            return False
        pairs = zip(mine, golden, strict=True)
        if any(abs(a - b) > TOLERANCE for (_, a), (_, b) in pairs):
            return False
    return True


def by_other_orders(monkeypatch, extract, texts):
    """Answers for every order of results that a Python set may have had where it matters."""
    join = taskflow.join_chunks
    choices: list[bool] = []
    met = 0

    def join_in_some_order(stage, answers):
        nonlocal met
        answers = list(answers)
        first = next((i for i, results in enumerate(answers) if results), None)
        kinds = {"start" in result for result in answers[first]} if first is not None else set()
        if len(kinds) == 2:
            wanted = choices[met] if met < len(choices) else False
            met += 1
            answers[first] = sorted(answers[first], key=lambda r: ("start" in r) != wanted)
        return join(stage, answers)

    monkeypatch.setattr(taskflow, "join_chunks", join_in_some_order)
    waiting: list[list[bool]] = [[]]
    while waiting:
        choices, met = waiting.pop(0), 0
        yield extract(texts)
        if met > len(choices):
            waiting += [[*choices, False], [*choices, True]]


def check(monkeypatch, folder, lines, by_chance=()):
    """All lines answered alike; those that depend on chance, by one of the orders."""
    n_facts = 0
    for number, line in enumerate(lines):
        case = json.loads(line)
        extract = extractor(folder, case, taskflow_compat=True)
        ours = extract(case["texts"])
        n_facts += sum(len(facts(result)) for result in case["result"])
        if not equal(ours, case["result"]):
            assert number in by_chance, f"line {number} differs"
            with monkeypatch.context() as patch:
                orders = by_other_orders(patch, extract, case["texts"])
                assert any(equal(answer, case["result"]) for answer in orders), f"line {number}"
    return n_facts


def test_some_golden_answers(monkeypatch, data_dir, uiem_dir):
    lines = (data_dir / "uie_taskflow.jsonl").read_text(encoding="utf-8").splitlines()
    assert check(monkeypatch, uiem_dir, lines, by_chance=(8, 11)) > 300


@pytest.mark.parametrize(
    ("name", "model"),
    [("uie_taskflow.jsonl", "uiem_paddle"), ("uie_taskflow_dense.jsonl", "uiem_dense")],
)
def test_all_golden_answers(monkeypatch, shared_dir, name, model):
    golden = shared_dir / "golden"
    lines = (golden / name).read_text(encoding="utf-8").splitlines()
    assert check(monkeypatch, golden / model, lines, BY_CHANCE[name]) > 700


def test_every_span_is_where_it_says(data_dir, uiem_dir):
    """In the default mode."""
    n_spans = 0
    for line in (data_dir / "uie_taskflow.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        results = extractor(uiem_dir, case)(case["texts"])
        for text, result in zip(case["texts"], results, strict=True):
            for start, end, words in spans(result):
                n_spans += 1
                assert text[start:end] == words
    assert n_spans > 100


@pytest.mark.parametrize("name", ["uie_taskflow.jsonl", "uie_taskflow_dense.jsonl"])
def test_golden_texts_in_the_default_mode(shared_dir, name):
    """Neighbours, batch size and order change nothing, and every span is where it says."""
    golden = shared_dir / "golden"
    model = golden / ("uiem_dense" if "dense" in name else "uiem_paddle")
    for line in (golden / name).read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        texts = case["texts"]
        together = extractor(model, case)(texts)
        one_window = extractor(model, case, max_batch_tokens=case["max_seq_len"])
        alone = [one_window([text])[0] for text in reversed(texts)]
        assert equal(together, reversed(alone))
        for text, result in zip(texts, together, strict=True):
            assert all(text[start:end] == words for start, end, words in spans(result))


def spans(result):
    for items in result.values():
        for item in items:
            if "start" in item:
                yield item["start"], item["end"], item["text"]
            yield from spans(item.get("relations", {}))
