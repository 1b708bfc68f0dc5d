"""Vectors of texts.

python pipelines/embed.py                                                 # sample texts
python pipelines/embed.py --input corpus/ --output vectors/ --model MODEL --prefix 'passage: '
ray job submit -- python pipelines/embed.py --input … --output …
"""

from erniem_batch.entry import script

if __name__ == "__main__":
    raise SystemExit(script("embed"))
