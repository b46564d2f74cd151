"""Which families of transformers can be distilled, and is each of their students right?

    python bench/families.py                       # all, in some ten minutes on two cores
    python bench/families.py roberta qwen2 gemma2  # some
    python bench/families.py --write               # and write the table of docs/models.md

For every type of model that transformers builds as a masked or a causal LM, a tiny one of six
layers is made, with windows shorter than the text. Each is taken apart and distilled:

    head      the logits of the parts are the model's own, and so is the gradient of the loss
    all       a student of all layers gives the teacher's logits to the bit
    cuts      students of three sets of layers give the logits of the teacher without the others; a
              set that is refused by name is taken in the nearest form that is offered
    training  two steps through the fused head change the student and lower the loss
    files     the trained student, saved and loaded by transformers, gives the same logits

"right" has passed all of it, "refused" was refused by name before training, and everything else is
"wrong". The exit status is 1 if any is wrong. Families run in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from kit import tiny_models
from torch import Tensor

from distilfast import __version__, models
from distilfast.config import ConfigError, StudentConfig
from distilfast.losses import distillation_loss
from distilfast.losses.linear import linear_distillation_loss
from distilfast.models import proof
from distilfast.models.parts import difference

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench" / "results" / "families.json", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- begin: bench/families.py -->", "<!-- end -->"
PARTLY = "not with every choice: "
STATES = ("right", "refused", "wrong", "not built")
CUTS = ([0, 2, 5], [0, 3, 4], [1, 3, 4])
# As a share of the largest: other orders of summation in tiny models give 1e-6.
ROUNDING = 2e-5
PROCESSES, SECONDS = 2, 120


class Wrong(Exception):  # noqa: N818  a verdict
    """A student or its loss is not what it has to be, and nothing said so."""


def verdict(task: str, model_type: str) -> dict[str, Any]:
    """What a family is: its state, and why or under which conditions."""
    found: dict[str, Any] = {"task": task, "type": model_type}
    try:
        teacher = tiny_models.tiny_model(task, model_type)
    except Exception as error:  # what a class says about a tiny form of itself
        return {**found, "state": "not built", "why": _line(error)}
    found["class"] = type(teacher).__name__
    try:
        found |= distilled(teacher)
    except ConfigError as error:
        return {**found, "state": "refused", "why": _line(error)}
    except Exception as error:
        return {**found, "state": "wrong", "why": f"{type(error).__name__}: {_line(error)}"}
    return {**found, "state": "right"}


def distilled(teacher: Any) -> dict[str, Any]:
    """Distil a model in every way that is offered.

    Returns:
        The head's form, and the conditions on the layers.

    Raises:
        ConfigError: the model or all its students are refused.
        Wrong: something is not as it has to be.
    """
    parts = models.check_head("the model", teacher)
    text = proof.text(teacher)
    with torch.no_grad():
        wanted = proof.logits(teacher, text)
    whole = models.make_student(teacher, StudentConfig(layers="all", architecture="same"), 0).eval()
    with torch.no_grad():
        if not torch.equal(proof.logits(whole, text), wanted):
            raise Wrong("a student of all layers has other logits")
    refused, condition = [], None
    for cut in CUTS:
        kept, why = models.valid_choice(teacher, cut)
        condition = condition or why
        config = StudentConfig(layers=kept, architecture="same", dropout=0.0)
        try:
            student = models.make_student(teacher, config, 0).eval()
        except ConfigError as error:
            refused.append(error)
            continue
        with torch.no_grad():
            wanted = proof.bypassed(teacher, kept, text)
            off = difference(wanted, proof.logits(student, text))
        if not off <= ROUNDING:
            raise Wrong(f"layers {kept}: {off:.1e} of the largest logit")
    if len(refused) == len(CUTS):
        raise refused[0]
    condition = condition or (f"{PARTLY}{_line(refused[0])}" if refused else None)
    _train(teacher, student, text)
    _reload(student, text)
    return {"head": _form(parts), "condition": condition}


def _train(teacher: Any, student: Any, text: Tensor) -> None:
    """Two steps through the fused head; the first one's gradient next to that of whole logits."""
    loss = _plain(teacher, student, text)
    loss.backward()
    plain = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    ours, theirs = models.take_apart(student), models.take_apart(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    losses = []
    for step in range(3):
        fused = _fused(theirs, ours, text)
        losses.append(float(fused.detach()))
        if step == 2:
            break
        optimizer.zero_grad()
        fused.backward()
        if step == 0:
            _compare(plain, student, float(loss.detach()), losses[0])
            student.train()
            norm = torch.stack(
                [p.grad.norm() for p in student.parameters() if p.grad is not None]
            ).norm()
            optimizer.param_groups[0]["lr"] = 1e-3 * losses[0] / float(norm) ** 2
        optimizer.step()
    if not losses[2] < losses[0]:
        raise Wrong(f"losses of two steps: {losses}")
    student.eval()


def _plain(teacher: Any, student: Any, text: Tensor) -> Tensor:
    with torch.no_grad():
        target = proof.logits(teacher, text)
    return distillation_loss(proof.logits(student, text), target, backend="torch").loss


def _fused(teacher: models.Parts, student: models.Parts, text: Tensor) -> Tensor:
    with torch.no_grad():
        target = teacher.features(teacher.hidden(text, None).flatten(0, 1))
    (weight, bias), (teacher_weight, teacher_bias) = student.head, teacher.head
    return linear_distillation_loss(
        student.features(student.hidden(text, None).flatten(0, 1)),
        weight,
        target,
        teacher_weight,
        student_bias=bias,
        teacher_bias=teacher_bias,
        logit_scale=(student.scale, teacher.scale),
        logit_softcap=(student.softcap, teacher.softcap),
        backend="torch",
    ).loss


def _compare(plain: dict[str, Tensor], student: Any, loss: float, fused: float) -> None:
    """The gradient through the parts has to be that of the model's own logits."""
    if not abs(loss - fused) <= 1e-4 * abs(loss):
        raise Wrong(f"the loss is {fused}, from whole logits {loss}")
    largest = max(float(g.abs().max()) for g in plain.values())
    for name, p in student.named_parameters():
        wanted = plain.get(name, torch.zeros_like(p))
        got = torch.zeros_like(p) if p.grad is None else p.grad
        allowed = 1e-3 * float(wanted.abs().max()) + 1e-6 * largest
        if not float((got - wanted).abs().max()) <= allowed:
            raise Wrong(f"the gradient of {name} is off by {float((got - wanted).abs().max()):.1e}")


def _reload(student: Any, text: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        loaded = type(student).from_pretrained(folder).eval()
    with torch.no_grad():
        off = difference(proof.logits(student, text), proof.logits(loaded, text))
    if not off <= ROUNDING:
        raise Wrong(f"loaded again, the logits are off by {off:.1e} of the largest")


def _form(parts: models.Parts) -> str:
    """What the head does, in words."""
    said = ["layers before the product"] if parts.chain else []
    said += ["the product", *(["a bias"] if parts.bias else [])]
    said += ["a scale"] if parts.scale != 1 else []
    return ", ".join([*said, *(["a softcap"] if parts.softcap else [])])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


# --- All of them ----------------------------------------------------------------------------------


def run(task: str, model_type: str) -> dict[str, Any]:
    """`verdict` in a process of its own, as a class may crash or hang."""
    began = time.perf_counter()
    fork = multiprocessing.get_context("fork")  # the libraries are imported once
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(verdict(task, model_type)))
    process.start()
    sender.close()
    found = {"task": task, "type": model_type, "state": "wrong"}
    try:
        found = receiver.recv() if receiver.poll(SECONDS) else {**found, "why": "it takes too long"}
    except EOFError:
        process.join()
        found["why"] = f"it ends with exit status {process.exitcode}"
    process.kill()
    took = time.perf_counter() - began
    said = found.get("why") or found.get("condition") or ""
    print(f"{found['state']:>9} {task:6} {model_type:24} {took:5.1f} s {said}", flush=True)
    return found


def page(rows: list[dict[str, Any]]) -> str:
    """The part of docs/models.md that is made here."""
    count = {s: [r for r in rows if r["state"] == s] for s in STATES}
    conditional = sum(bool(r["condition"]) for r in count["right"])
    said = (
        f"{len(count['right'])} are right ({conditional} of them under a condition), "
        f"{len(count['refused'])} are refused by name, {len(count['wrong'])} are wrong, and of "
        f"{len(count['not built'])} no tiny one could be built"
    )
    lines = [
        BEGIN,
        f"transformers {transformers.__version__} builds {len(rows)} kinds of masked and causal "
        f"language models, of {len({r['type'] for r in rows})} types: {said}.",
        "",
        "### Refused, and why",
        "",
        "| type | task | why |",
        "|---|---|---|",
        *(f"| {r['type']} | {r['task']} | {_why(r['why'])} |" for r in count["refused"]),
        *(f"| {r['type']} | {r['task']} | not tried: {r['why']} |" for r in count["not built"]),
        "",
        "### Right under a condition",
        "",
        "| type | task | condition |",
        "|---|---|---|",
        *(
            f"| {r['type']} | {r['task']} | {_why(r['condition'])} |"
            for r in count["right"]
            if r["condition"]
        ),
        "",
        "### Right",
        "",
        "| head | types of masked LMs | types of causal LMs |",
        "|---|---|---|",
    ]
    for head in sorted({r["head"] for r in count["right"]}):
        same = [r for r in count["right"] if r["head"] == head]
        tasks = [", ".join(r["type"] for r in same if r["task"] == t) for t in ("masked", "causal")]
        lines.append(f"| {head} | {' | '.join(tasks)} |")
    return "\n".join([*lines, END])


def _why(said: str) -> str:
    """A reason without the key and the numbers of the tiny model's layers."""
    partly = said.startswith(PARTLY)
    text = said.removeprefix(PARTLY)
    text = re.sub(r"^(student\.layers|the model): ", "", text)
    text = re.sub(r"^expected a family whose layers can be dropped, got an? \S+: ", "", text)
    text = text.removesuffix("; give a smaller model with student.model")
    text = re.sub(r"layer [1-9]\d*", "another layer", text).partition(", such as ")[0]
    text = text.partition(": Error(s) in loading")[0]
    return f"not every choice of layers: {text[:150]}" if partly else text


def write(rows: list[dict[str, Any]]) -> None:
    """Write the results, and the part of the page that follows from them. Families that were not
    run keep their rows."""
    done = {(r["task"], r["type"]): r for r in rows}
    if RESULTS.is_file():
        before = json.loads(RESULTS.read_text(encoding="utf-8"))["families"]
        done = {(r["task"], r["type"]): r for r in before} | done
    rows = [done[kind] for kind in tiny_models.kinds() if kind in done]
    versions = {m.__name__: m.__version__ for m in (transformers, torch)}
    made = {"versions": {**versions, "distilfast": __version__}, "families": rows}
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    text = before + page(rows) + rest.split(END)[1]
    PAGE.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="types of models; all if none is given")
    parser.add_argument("--write", action="store_true", help="write the table of docs/models.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [(t, m) for t, m in tiny_models.kinds() if not args.types or m in args.types]
    with ThreadPoolExecutor(PROCESSES) as pool:
        rows = list(pool.map(lambda kind: run(*kind), chosen))
    count = {s: sum(r["state"] == s for r in rows) for s in STATES}
    print(", ".join(f"{state} {n}" for state, n in count.items()))
    if args.write:
        write(rows)
    return int(count["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
