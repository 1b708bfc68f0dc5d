"""Named entities for a folder of Parquet or JSONL shards.

python pipelines/ner.py                                                   # sample texts
python pipelines/ner.py --input corpus/ --output tagged/ --model MODEL    # your own
ray job submit -- python pipelines/ner.py --input … --output …
"""

from erniem_batch.entry import script

if __name__ == "__main__":
    raise SystemExit(script("ner"))
