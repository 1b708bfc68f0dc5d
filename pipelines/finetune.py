"""Train a model on annotated rows: `python pipelines/finetune.py --help`.

The same as `erniem-batch finetune`.
"""

from erniem_batch.entry import script

if __name__ == "__main__":
    raise SystemExit(script("finetune"))
