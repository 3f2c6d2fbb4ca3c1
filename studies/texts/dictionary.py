"""Webster's dictionary of 1913 (GCIDE), as one text for each entry: for data.prepare.

python -m studies.texts.dictionary gcide.dict.dz --to gcide.jsonl
"""

import argparse
import gzip
import json
import re
from pathlib import Path

SOURCE = re.compile(r"\[(1913 Webster|PJC|WordNet 1\.5)[^\]]*\]")  # who wrote it: no English


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dictionary", type=Path, help="from Debian's package dict-gcide")
    parser.add_argument("--to", type=Path, required=True, help="the .jsonl file to write")
    args = parser.parse_args()
    text = gzip.decompress(args.dictionary.read_bytes()).decode("utf-8", "replace")
    with args.to.open("w", encoding="utf-8") as file:
        for entry in re.split(r"\n\n(?=\S)", text):  # an entry starts at the margin
            entry = " ".join(SOURCE.sub("", entry).split())
            file.write(json.dumps({"text": entry}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
