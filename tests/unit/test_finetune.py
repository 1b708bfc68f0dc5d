"""pipelines/finetune.py: what the model is shown, and what is trained."""

import argparse
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erniem_batch import (
    ErnieMConfig,
    ErnieMForInformationExtraction,
    ErnieMForSequenceClassification,
    ErnieMForTokenClassification,
    ErnieMTokenizer,
)

SCRIPT = Path(__file__).parents[2] / "pipelines" / "finetune.py"

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


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory, tokenizer) -> Path:
    """A folder with a tiny random token classifier, and a threshold of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "base"
    config = ErnieMConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=130,
        extra={"task_specific_params": {"ner": {"min_score": 0.7}}},
    ).with_labels(["O", "B-PER", "I-PER"])
    ErnieMForTokenClassification(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _args(**values):
    return argparse.Namespace(**{"max_length": 192, "negatives": 1.0, "join": 0.0, **values})


def _question(answer: str, occurrence: int = 0, **fields):
    start = -1
    for _ in range(occurrence + 1):
        start = CONTEXT.index(answer, start + 1)
    return {
        "question": "Was steht hier?",
        "context": CONTEXT,
        "answers": [{"text": answer, "start": start}],
        **fields,
    }


# ---- examples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("occurrence", [0, 1, 2])
@pytest.mark.parametrize("answer", ["2021", "林若溪", "Mount Sorrel", "larch wood", "Die Brücke"])
def test_qa_positions_point_at_the_answer(finetune, tokenizer, answer, occurrence):
    record = _question(answer, occurrence)
    examples = finetune.qa_examples([record], tokenizer, [], _args(max_length=64), random.Random(0))
    assert len(examples) > 2
    context = tokenizer.encode_batch([CONTEXT])
    before = examples[0].ids.index(tokenizer.sep_token_id) + 2
    size = 64 - before - 1
    starts = finetune.window_starts(len(context.ids), size, size // 2)
    a = record["answers"][0]["start"]
    n_positive = 0
    for start, example in zip(starts, examples, strict=True):
        assert len(example.ids) <= 64
        first, last = example.targets["start_positions"], example.targets["end_positions"]
        if first:
            n_positive += 1
            where = slice(
                context.starts[start + first - before], context.ends[start + last - before]
            )
            assert CONTEXT[where].strip() == answer
            assert a - 1 <= where.start <= a  # this place, not another with the same words
        else:
            assert last == 0
    assert n_positive >= 1


def test_qa_windows_cover_the_context(finetune, tokenizer):
    examples = finetune.qa_examples(
        [_question("2021")], tokenizer, [], _args(max_length=64), random.Random(0)
    )
    context = tokenizer.encode_batch([CONTEXT]).ids.tolist()
    question = tokenizer.encode_batch(["Was steht hier?"]).ids.tolist()
    sep = [tokenizer.sep_token_id]
    head = [tokenizer.cls_token_id, *question, *sep, *sep]
    assert all(e.ids[: len(head)] == head and e.ids[-1:] == sep for e in examples)
    assert examples[0].ids[len(head) : -1] == context[: 63 - len(head)]
    assert examples[-1].ids[len(head) : -1] == context[len(head) - 63 :]


def test_paragraphs_are_kept_out_whole_and_in_all_languages(finetune):
    english = [
        {"id": f"q{i}", "context": f"paragraph {i // 5}", "question": "?"} for i in range(200)
    ]
    german = [{**r, "context": r["context"].replace("paragraph", "Absatz")} for r in english]
    random.Random(1).shuffle(german)
    out = {r["id"] for r, o in zip(english, finetune.held_out(english, 0.3), strict=True) if o}
    same = {r["id"] for r, o in zip(german, finetune.held_out(german, 0.3), strict=True) if o}
    assert out == same
    assert 0.1 < len(out) / 200 < 0.5
    assert {int(i[1:]) // 5 for i in out}.isdisjoint(
        int(r["id"][1:]) // 5 for r in english if r["id"] not in out
    )


def test_extract_labels_are_the_ends_of_the_spans(finetune, tokenizer):
    examples = finetune.extract_examples(NER, tokenizer, [], _args(), random.Random(0))
    names = {name: kind for kind, both in finetune.PROMPTS.items() for name in both}
    prompts = {tuple(tokenizer.encode_batch([n]).ids.tolist()): k for n, k in names.items()}
    texts = {tuple(tokenizer.encode_batch([r["text"]]).ids.tolist()): r for r in NER}
    found = []
    for example in examples:
        sep = example.ids.index(tokenizer.sep_token_id)
        kind = prompts[tuple(example.ids[1:sep])]
        record = texts[tuple(example.ids[sep + 2 : -1])]
        tokens = tokenizer.encode_batch([record["text"]])
        first, last = example.targets["start_positions"], example.targets["end_positions"]
        assert len(first) == len(last) == len(example.ids)
        starts = [int(tokens.starts[i - sep - 2]) for i, one in enumerate(first) if one]
        ends = [int(tokens.ends[i - sep - 2]) for i, one in enumerate(last) if one]
        surfaces = [record["text"][a:b].strip() for a, b in zip(starts, ends, strict=True)]
        gold = [record["text"][a:b] for a, b, label in record["spans"] if label == kind]
        assert surfaces == gold
        found.append(bool(gold))
    assert found.count(True) == 5
    assert found.count(False) == 5  # of seven that could be: as many as there are others


def test_share_of_prompts_in_vain(finetune, tokenizer):
    for negatives, expected in ((0.0, 5), (0.4, 7), (9.0, 12)):
        examples = finetune.extract_examples(
            NER, tokenizer, [], _args(negatives=negatives), random.Random(0)
        )
        assert len(examples) == expected


def test_spans_beyond_the_end_have_no_label(finetune, tokenizer):
    record = {"text": "wort " * 200 + "Berlin", "spans": [[1000, 1006, "LOC"]]}
    (example,) = finetune.extract_examples(
        [record], tokenizer, [], _args(max_length=40), random.Random(0)
    )
    assert len(example.ids) == 40
    assert sum(example.targets["start_positions"]) == sum(example.targets["end_positions"]) == 0


def test_ner_labels(finetune, tokenizer):
    labels = finetune.TASKS["ner"].labels(NER)
    assert labels == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    examples = finetune.ner_examples(NER, tokenizer, labels, _args(), random.Random(0))
    for example in examples:
        targets = example.targets["labels"]
        assert len(targets) == len(example.ids)
        assert targets[0] == targets[-1] == finetune.IGNORED_LABEL
    counts = [sum(t in (1, 3, 5) for t in e.targets["labels"]) for e in examples]
    assert sorted(counts) == [0, 1, 2, 3]


def test_padding_counts_as_the_heads_want_it(finetune):
    short = finetune.Example([0, 5, 2], {"labels": [-100, 4, -100]})
    long = finetune.Example([0, 5, 6, 2], {"labels": [-100, 4, 4, -100]})
    input_ids, targets = finetune.collate([short, long], pad_token_id=1)
    assert input_ids.tolist() == [[0, 5, 2, 1], [0, 5, 6, 2]]
    assert targets["labels"].tolist() == [[-100, 4, -100, -100], [-100, 4, 4, -100]]
    spans = finetune.Example([0, 5, 2], {"start_positions": [0, 1, 0], "end_positions": [0, 1, 0]})
    _, targets = finetune.collate([spans, finetune.Example([0] * 5, {
        "start_positions": [0] * 5, "end_positions": [0] * 5})], 1)  # fmt: skip
    assert targets["start_positions"].tolist() == [[0, 1, 0, 0, 0], [0] * 5]
    one = finetune.Example([0, 2], {"labels": 3})
    assert finetune.collate([one, one], 1)[1]["labels"].tolist() == [3, 3]


# ---- training ---------------------------------------------------------------------------------


def test_what_is_frozen(finetune, encoder_dir):
    model = finetune.new_model(finetune.TASKS["extract"], encoder_dir, [])
    finetune.freeze(model, re.compile(r"bias|norm|layers\.1\.linear1"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name in trained if "embeddings" in name]
    assert "ernie_m.encoder.layers.0.norm1.weight" in trained
    assert "ernie_m.encoder.layers.1.linear1.weight" in trained
    assert "ernie_m.encoder.layers.0.linear1.weight" not in trained
    assert {"linear_start.weight", "linear_end.bias", "ernie_m.pooler.dense.weight"} <= trained
    assert "task_specific_params" not in model.config.extra
    everything = finetune.new_model(finetune.TASKS["ner"], encoder_dir, ["O", "B-X", "I-X"])
    finetune.freeze(everything, None)
    assert all(p.requires_grad for p in everything.parameters())


RECORDS = {
    "ner": NER,
    "extract": NER,
    "classify": [{"text": r["text"], "label": r["lang"]} for r in NER],
    "qa": [_question("2021", id="a"), _question("林若溪", id="b")],
}


@pytest.mark.parametrize("task", RECORDS)
def test_two_steps_of_training(finetune, encoder_dir, tmp_path, monkeypatch, capsys, task):
    """Only what may change changes, and only that is saved; the overlay loads."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in RECORDS[task]), encoding="utf-8")
    output = encoder_dir.parent / f"{task}-overlay"
    arguments = (
        f"finetune --task {task} --model {encoder_dir} --train {data} --output {output} --overlay "
        "--train-only bias|norm --no-dropout --max-length 64 --max-batch-tokens 64 --threads 1 "
        "--epochs 2 --learning-rate 0.01"
    )
    monkeypatch.setattr(sys, "argv", arguments.split())
    assert finetune.main() == 0
    assert re.search(r"batch=([2-9]|\d\d)/", capsys.readouterr().out)
    tensors = load_file(output / "model.safetensors")
    is_head = finetune.HEAD.match
    assert all(is_head(name) or re.search("bias|norm", name) for name in tensors)
    assert not [name for name in tensors if "embeddings" in name]
    assert "ernie_m.encoder.layers.0.norm1.bias" in tensors
    head = finetune.TASKS[task].head
    again = head.from_pretrained(output)
    before = ErnieMForTokenClassification.from_pretrained(encoder_dir).state_dict()
    for name, tensor in again.state_dict().items():
        if name not in tensors and not is_head(name):
            assert torch.equal(tensor, before[name]), name
    assert json.loads((output / "config.json").read_text())["architectures"] == [head.__name__]
    ErnieMTokenizer.from_pretrained(output)


def test_the_same_seed_gives_the_same_model(finetune, encoder_dir, tmp_path, monkeypatch):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in RECORDS["classify"]), encoding="utf-8")
    for name in ("one", "two"):
        arguments = (
            f"finetune --task classify --model {encoder_dir} --train {data} "
            f"--output {tmp_path / name} --max-batch-tokens 64 --threads 1"
        )
        monkeypatch.setattr(sys, "argv", arguments.split())
        assert finetune.main() == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    model = ErnieMForSequenceClassification.from_pretrained(tmp_path / "one")
    assert model.config.labels == ["de", "en", "zh"]


def test_an_overlay_is_no_base(finetune, encoder_dir, tmp_path, monkeypatch):
    """Found before the training, not after."""
    model = ErnieMForInformationExtraction.from_pretrained(encoder_dir, allow_new_head=True)
    finetune.save_overlay(model, tmp_path / "overlay", encoder_dir)
    arguments = f"finetune --overlay --model {tmp_path / 'overlay'} --train x --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    with pytest.raises(SystemExit, match="is an overlay itself"):
        finetune.main()
