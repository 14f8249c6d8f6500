"""Compare the digests that `reproml run --digest FILE` wrote: python digests.py FILE SHA256...

Exits with 1 if one is missing on either side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def hashes(value: Any) -> Iterator[str]:
    """Yield every value whose key ends in sha256, at any depth."""
    if isinstance(value, list):
        for each in value:
            yield from hashes(each)
    if isinstance(value, dict):
        for key, each in value.items():
            if key.endswith("sha256"):
                yield each
            else:
                yield from hashes(each)


def main(file: str, *stated: str) -> None:
    found = [*hashes(json.loads(Path(file).read_text("utf-8")))]
    if set(found) != set(stated):
        sys.exit(f"the digests are {' '.join(found) or 'none'}, not {' '.join(stated)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
