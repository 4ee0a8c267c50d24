"""Makes the text that the visit trains on: `python -m benchmarks.gpu.text` on Debian.

The visit itself needs neither network nor tokenizer: what is carried are the numbers
of the tokens, which `load` reads.
"""

import gzip
import hashlib
import json
import lzma
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
VOCABULARY = 16384
MOST_BYTES = 6_000_000  # of the file that is carried
VALIDATION = 0.04  # of the tokens; whole documents
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 1, "pb": 1}]


def load() -> tuple[Tensor, Tensor, dict]:
    """Return the tokens to learn from, those to validate on, and where they are from.

    Raises:
        FileNotFoundError: If the file has not been carried along.
    """
    facts = json.loads((DATA / "text.json").read_text())
    raw = lzma.decompress((DATA / "text.xz").read_bytes())
    if hashlib.sha256(raw).hexdigest() != facts["sha256"]:
        raise ValueError("text.xz is not the file that text.json describes.")
    tokens = torch.from_numpy(np.frombuffer(raw, "<u2").astype(np.int32))
    cut = len(tokens) - facts["validation_tokens"]
    return tokens[:cut], tokens[cut:], facts


# --- documents ------------------------------------------------------------------------
class _Words(HTMLParser):
    """Collects the text of a page, less navigation and code of the page itself."""

    SKIPPED = ("script", "style", "head", "nav")
    BLOCKS = ("p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "br")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipping += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in self.SKIPPED

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.pieces.append(data)


def _pages(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.html")):
        words = _Words()
        words.feed(path.read_text("utf-8", "replace"))
        yield "".join(words.pieces)


def _sources(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.rst.txt")):
        yield path.read_text("utf-8", "replace")


def _articles(folder: Path) -> Iterator[str]:
    """Yield a dictionary in portions of about 20 entries."""
    for path in sorted(folder.rglob("*.dict.dz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        entries = re.split(r"\n(?=\S)", text)
        # of a large one, a part: it says the same of every synonym
        stride = 20 * max(1, round(len(text) / 7e6))
        for start in range(0, len(entries), stride):
            yield "\n".join(entries[start : start + 20])


PACKAGES: dict[str, tuple[Callable[[Path], Iterator[str]], str]] = {
    "python3.11-doc": (_sources, "PSF licence 2, examples also 0BSD"),
    "postgresql-doc-15": (_pages, "PostgreSQL licence"),
    "dict-wn": (_articles, "WordNet licence, of the MIT kind"),
    "dict-jargon": (_articles, "public domain"),
    "dict-devil": (_articles, "public domain"),
}
"""How each package is read, and on what terms its text may be passed on."""


def documents(folder: Path) -> tuple[list[str], list[str]]:
    """Download the packages; return their texts, shuffled, and a note on each."""
    texts, notes = [], []
    for name, (read, licence) in PACKAGES.items():
        subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
        archive = next(folder.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, folder / name], check=True)
        found = [_clean(text) for text in read(folder / name)]
        texts += [text for text in found if len(text) > 200]
        terms = (folder / name).glob("usr/share/doc/*/copyright")
        DATA.mkdir(exist_ok=True)
        (DATA / f"{name}.copyright.txt").write_text(next(terms).read_text())
        version = archive.name.split("_")[1].replace("%3a", ":")
        characters = sum(map(len, found))
        notes.append(f"{name} {version}: {characters:,} characters; {licence}")
    random.Random(0).shuffle(texts)
    return texts, notes


def _clean(text: str) -> str:
    text = re.sub(r"[ \t]+", " ", text.replace("\xa0", " "))
    text = re.sub(r"([-=~^*#\"'.])\1{4,}", r"\1\1\1\1", text)  # rules, underlines
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()


# --- tokens ---------------------------------------------------------------------------
def tokenize(texts: list[str]) -> tuple[list[np.ndarray], list[int]]:
    """Learn a byte-pair vocabulary; return the tokens and bytes of each text."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False
    )
    encoded = tokenizer.encode_batch(texts)
    ids = [np.array([*e.ids, 0], dtype="<u2") for e in encoded]  # 0: <|end|>
    return ids, [len(text.encode()) for text in texts]


def write() -> None:
    """Write as many documents as there is room for, and what they are."""
    with tempfile.TemporaryDirectory() as folder:
        texts, notes = documents(Path(folder))
    ids, sizes = tokenize(texts)
    number = len(ids)
    while True:
        raw = np.concatenate(ids[:number]).tobytes()
        packed = lzma.compress(raw, filters=FILTERS)
        if len(packed) <= MOST_BYTES:
            break
        number = min(int(number * MOST_BYTES / len(packed)), number - 1)
    counts = [len(tokens) for tokens in ids[:number]]
    held_out, first = 0, number
    while held_out < VALIDATION * sum(counts):
        first -= 1
        held_out += counts[first]
    facts = {
        "tokens": sum(counts),
        "validation_tokens": held_out,
        "vocabulary": VOCABULARY,
        "bytes_per_token": round(sum(sizes[:number]) / sum(counts), 4),
        "documents": number,
        "of_documents": len(texts),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    (DATA / "text.xz").write_bytes(packed)
    (DATA / "text.json").write_text(json.dumps(facts, indent=2) + "\n")
    told = "\n".join(f"- {note}" for note in notes)
    (DATA / "SOURCES.txt").write_text(SOURCES.format(notes=told))
    print(json.dumps(facts), len(packed))


SOURCES = """\
text.xz holds documents of these Debian packages, shuffled, as the numbers of byte-pair
tokens; `python -m benchmarks.gpu.text` makes it anew. It is for benchmarks only, is no
part of the package, and keeps the terms of its sources:

{notes}

The complete terms stand beside this file, as the packages bring them along.
"""

if __name__ == "__main__":
    write()
