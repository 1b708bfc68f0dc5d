"""The dead letters of a run once more.

python pipelines/replay.py OUTPUT
"""

from erniem_batch.entry import script

if __name__ == "__main__":
    raise SystemExit(script("replay"))
