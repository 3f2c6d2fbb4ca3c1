"""Webster's dictionary of 1913 (GCIDE) as texts: python -m studies.dictionary FILE TO

FILE is gcide.dict.dz of Debian's package dict-gcide. TO is a .jsonl file for
data.prepare, with one text for each entry.
"""

import gzip
import json
import re
import sys
from pathlib import Path

from data.command import UserError, command

# Who wrote an entry: these words are no English
SOURCE = re.compile(r"\[(1913 Webster|PJC|WordNet 1\.5)[^\]]*\]")


@command
def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("give the dictionary and the .jsonl file to write")
    dictionary, to = map(Path, argv)
    text = gzip.decompress(dictionary.read_bytes()).decode("utf-8", "replace")
    with open(to, "w", encoding="utf-8") as file:
        for entry in re.split(r"\n\n(?=\S)", text):  # an entry starts at the margin
            words = SOURCE.sub("", entry).split()
            line = json.dumps({"text": " ".join(words)}, ensure_ascii=False)
            file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
