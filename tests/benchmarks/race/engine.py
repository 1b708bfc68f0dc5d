"""A contender of the race, in a process and a Python of its own.

    PYTHON engine.py ENGINE FOLDER THREADS

Reads one JSON object a line from stdin, {"kind", "option", "share", "save"}: computes the pieces of
race-KIND.json once, or a share of them, and says on stdout how long it took: {"seconds", "tokens"}.
With `save`, the rows of each piece go into that file. Nothing here needs the package, but for the
engines `ours…` and `gemm…`.

Engines get token ids and give the logits of each piece as float32; `pipeline` gets the text, since
it takes nothing else, and gives entities. Those that pad get pieces sorted by length.
"""

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

OUT = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what libraries print must not come between the answers

NAME, FOLDER, THREADS = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
os.environ.update(
    OMP_NUM_THREADS=str(THREADS), MKL_NUM_THREADS=str(THREADS), TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1",
)  # fmt: skip

import numpy as np  # noqa: E402

BATCHES = [{"batch": size} for size in (1, 4, 8, 16, 32)]


class Engine(ABC):
    """What all have in common.

    Attributes:
        options: of which the fastest is taken, for each kind of pieces.
    """

    options: ClassVar = [{}]

    @abstractmethod
    def run(self, pieces, option):
        """Rows of each piece."""


class Padded(Engine):
    """Sorted by length, so many a batch, padded to the longest."""

    options: ClassVar = BATCHES

    def run(self, pieces, option):
        ids = [piece["ids"] for piece in pieces]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rows = [None] * len(ids)
        for start in range(0, len(order), option["batch"]):
            places = order[start : start + option["batch"]]
            longest = max(len(ids[i]) for i in places)
            padded = np.full((len(places), longest), 1, np.int64)
            mask = np.zeros((len(places), longest), np.int64)
            for row, i in enumerate(places):
                padded[row, : len(ids[i])] = ids[i]
                mask[row, : len(ids[i])] = 1
            for i, logits in zip(places, self.forward(padded, mask), strict=True):
                rows[i] = logits[: len(ids[i])]
        return rows


class Torch(Padded):
    """A model of transformers in a plain loop."""

    def __init__(self, name):
        import torch
        from transformers import AutoModelForTokenClassification as Xlmr

        torch.set_num_threads(THREADS)
        self.torch = torch
        if name == "hf4-loop":
            from transformers.models.ernie_m.modeling_ernie_m import ErnieMForTokenClassification

            self.model = ErnieMForTokenClassification.from_pretrained(FOLDER / "model" / "ner")
        else:
            self.model = Xlmr.from_pretrained(FOLDER / "xlmr" / "ner", attn_implementation="sdpa")
        self.model.eval()

    def forward(self, ids, mask):
        torch = self.torch
        with torch.inference_mode():
            ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
            return self.model(input_ids=ids, attention_mask=mask).logits.numpy()


class Pipeline(Engine):
    """As transformers' documentation has it."""

    options: ClassVar = BATCHES

    def __init__(self, name):
        from tutorial import ner_pipeline

        self.pipeline = ner_pipeline(FOLDER / "model" / "ner", THREADS)

    def run(self, pieces, option):
        self.pipeline([piece["text"] for piece in pieces], batch_size=option["batch"])


class OnnxRuntime(Padded):
    def __init__(self, name):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = onnxruntime.InferenceSession(
            str(exported(name.rpartition("-")[2])), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, ids, mask):
        return self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


class OpenVino(Padded):
    def __init__(self, name):
        import openvino

        core = openvino.Core()
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"})
        # Else it takes half precision where the processor has it, which the others do not.
        core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.model = core.compile_model(str(exported("float32")), "CPU")

    def forward(self, ids, mask):
        return self.model({"input_ids": ids, "attention_mask": mask})["logits"]


class CTranslate2(Engine):
    """The encoder; the head on it, a small product, is numpy's."""

    options: ClassVar = [
        {"batch": size, "lanes": lanes} for size in (4, 8, 16, 32) for lanes in sorted({1, THREADS})
    ]

    def __init__(self, name):
        import ctranslate2

        self.lib = ctranslate2
        self.folder = converted()
        self.kind = name.rpartition("-")[2]
        self.encoders = {}
        with np.load(self.folder / "head.npz") as head:
            self.weight, self.bias = head["weight"].T.copy(), head["bias"]

    def encoder(self, lanes):
        if lanes not in self.encoders:
            self.encoders.clear()
            self.encoders[lanes] = self.lib.Encoder(
                str(self.folder), device="cpu", compute_type=self.kind,
                inter_threads=lanes, intra_threads=THREADS // lanes,
            )  # fmt: skip
        return self.encoders[lanes]

    def run(self, pieces, option):
        from concurrent.futures import ThreadPoolExecutor

        encoder = self.encoder(option["lanes"])
        ids = [piece["ids"] for piece in pieces]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        rows = [None] * len(ids)

        def one(start):
            places = order[start : start + option["batch"]]
            out = encoder.forward_batch([ids[i] for i in places])
            hidden = np.array(out.last_hidden_state)
            for i, states in zip(places, hidden, strict=True):
                rows[i] = states[: len(ids[i])] @ self.weight + self.bias

        with ThreadPoolExecutor(option["lanes"]) as pool:
            list(pool.map(one, range(0, len(order), option["batch"])))
        return rows


class Ours(Engine):
    """The predictor, from windows to rows; `shared`: with weights as the file has them, so that
    processes can share them."""

    def __init__(self, name):
        from erniem_batch.config import PredictorConfig
        from erniem_batch.options import options_of
        from erniem_batch.predictor import Predictor

        _, task, dtype, *shared = name.split("-")
        self.predictor = Predictor.load(
            PredictorConfig(
                model=str(FOLDER / "model" / task), options=options_of(task, {}), device="cpu",
                dtype=dtype, n_threads=THREADS, share_weights=bool(shared),
            )
        )  # fmt: skip
        self.options = [{"max_batch_tokens": self.predictor.max_batch_tokens}]

    def run(self, pieces, option):
        from erniem_batch.records import Window

        windows = [
            Window(np.array(piece["ids"], np.int64), 0, len(piece["ids"]) - 2, 1)
            for piece in pieces
        ]
        return self.predictor.forward(windows)


class Gemm(Ours):
    """Nothing but the products of the linear layers, of the batches that the predictor makes."""

    def __init__(self, name):
        super().__init__(name.replace("gemm", "ours") + "-float32")
        self.linears = [
            [m for m in layer.modules() if hasattr(m, "out_features")]
            for layer in self.predictor.model.ernie_m.encoder.layers
        ]
        self.firsts_only = name == "gemm-classify"

    def run(self, pieces, option):
        from erniem_batch.batching import plan_batches

        predictor = self.predictor
        sizes = [len(piece["ids"]) for piece in pieces]
        plan = plan_batches(sizes, predictor.max_batch_tokens, predictor.n_lanes)
        lanes = predictor._lanes
        passes = [
            lanes.submit(1, self.products, sum(sizes[i] for i in batch), len(batch))
            for batch in plan
        ]
        for each in passes:
            each.result()

    def products(self, n_tokens, n_texts):
        import torch
        from products import product

        with torch.inference_mode():
            room = {}
            given = {width: torch.full((n_tokens, width), 0.1) for width in self.widths()}
            for number, layer in enumerate(self.linears):
                last = self.firsts_only and number == len(self.linears) - 1
                for place, linear in enumerate(layer):
                    # Of the last layer, keys and values of all tokens; else only of the first.
                    n = n_texts if last and place not in (1, 2) else n_tokens
                    width = linear.out_features
                    if (n, width) not in room:
                        room[n, width] = torch.empty(n, width)
                    product(linear, given[linear.in_features][:n], room[n, width])

    def widths(self):
        return {linear.in_features for linear in self.linears[0]}


# ---- conversions, once a folder -----------------------------------------------------------------


def exported(name):
    """The ONNX file."""
    folder = FOLDER / "onnx"
    path = folder / f"{name}.onnx"
    if path.exists():
        return path
    folder.mkdir(exist_ok=True)
    plain = folder / "float32.onnx"
    if name == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        has_vnni = "vnni" in Path("/proc/cpuinfo").read_text()
        quantize_dynamic(
            exported("float32"), path, weight_type=QuantType.QInt8, per_channel=True,
            reduce_range=not has_vnni, extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
        return path
    import torch
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(
        FOLDER / "xlmr" / "ner", attn_implementation="eager"
    ).eval()
    model.config.return_dict = False
    example = torch.ones(2, 9, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "tokens"} for name in [*names, "logits"]}
    torch.onnx.export(
        model, (example, example), str(plain), input_names=names, output_names=["logits"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    return plain


def converted():
    """The folder for CTranslate2; the head beside it."""
    folder = FOLDER / "ctranslate2"
    if folder.exists():
        return folder
    import ctranslate2.converters.transformers as loaders
    from safetensors.numpy import load_file

    read = loaders.XLMRobertaLoader.get_vocabulary

    def vocabulary(self, model, tokenizer):
        known = read(self, model, tokenizer)[: model.config.vocab_size]
        return known + [f"<none{i}>" for i in range(model.config.vocab_size - len(known))]

    loaders.XLMRobertaLoader.get_vocabulary = vocabulary
    loaders.TransformersConverter(str(FOLDER / "xlmr" / "classify")).convert(str(folder))
    tensors = load_file(FOLDER / "xlmr" / "ner" / "model.safetensors")
    np.savez(
        folder / "head.npz", weight=tensors["classifier.weight"], bias=tensors["classifier.bias"]
    )
    return folder


ENGINES = {
    "hf4-pipeline": Pipeline,
    "hf4-loop": Torch,
    "hf5-sdpa": Torch,
    "onnxruntime-float32": OnnxRuntime,
    "onnxruntime-int8": OnnxRuntime,
    "openvino-float32": OpenVino,
    "ctranslate2-float32": CTranslate2,
    "ctranslate2-int8": CTranslate2,
    "ours-ner-float32": Ours,
    "ours-classify-float32": Ours,
    "ours-ner-float32-shared": Ours,
    "ours-ner-int8": Ours,
    "ours-classify-int8": Ours,
    "gemm-ner": Gemm,
    "gemm-classify": Gemm,
}


def main():
    started = time.perf_counter()
    engine = ENGINES[NAME](NAME)
    answer({"ready_s": time.perf_counter() - started, "options": engine.options})
    for line in sys.stdin:
        asked = json.loads(line)
        pieces = json.loads((FOLDER / f"race-{asked['kind']}.json").read_text())
        pieces = pieces[:: asked.get("share", 1)]
        started = time.perf_counter()
        rows = engine.run(pieces, asked["option"])
        seconds = time.perf_counter() - started
        if asked.get("save") and rows is not None:
            np.savez(asked["save"], *[np.asarray(row, np.float32) for row in rows])
        answer({"seconds": seconds, "tokens": sum(len(p["ids"]) for p in pieces)})


def answer(value):
    OUT.write(json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
