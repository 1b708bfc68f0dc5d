"""What a schema names, from any text (universal information extraction, UIE).

python pipelines/extract.py                                               # sample texts
python pipelines/extract.py --input corpus/ --output found/ --model MODEL --schema schema.yaml
ray job submit -- python pipelines/extract.py --input … --output …
"""

from erniem_batch.entry import script

if __name__ == "__main__":
    raise SystemExit(script("extract"))
