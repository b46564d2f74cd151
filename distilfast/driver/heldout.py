"""Evaluate how well a model guesses the masked or the next tokens of held-out text, and how much it
agrees with its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from distilfast.data import Batches, MicroBatch
from distilfast.driver.processes import World
from distilfast.report import Guess, Sample, Table

BLOCKS = 100  # so many give a standard error to 7 %
LOSS, TOKENS = 0, 3  # the rows of an example's sums
# Of a causal LM every token has a target, of a masked one every seventh. So many fewer sequences in
# a forward take as much memory for their logits.
FEWER = 8
MASK = "[MASK]"  # in the texts of `fill`, for the mask token of any tokenizer
Predict = Callable[[MicroBatch], Tensor]  # the logits in the rows with a label, (labelled, V)


@dataclass(frozen=True)
class Scores:
    """Scores over all held-out targets: masked tokens, or next ones. None: there is no target.

    eval_loss: cross entropy in nats.
    eval_accuracy: the share of targets that the first guess gets right.
    eval_agreement: the share of targets where the first guess is the teacher's; None without one.
    eval_kl: the mean KL(teacher || model) in nats at T = 1, which is 0 for the teacher. None
        without a teacher; and for a masked LM, as the teacher would have to run in each evaluation.
    """

    eval_loss: float | None
    eval_accuracy: float | None
    eval_agreement: float | None
    eval_kl: float | None = None

    def line(self) -> dict[str, float | None]:
        """As in metrics.jsonl, which has no eval_kl where it is not computed."""
        return {k: v for k, v in asdict(self).items() if k != "eval_kl" or v is not None}


class Evaluator:
    """Scores models on this rank's held-out batches, which are made once. Keeps the teacher's
    guesses, and the student's last losses on each example.

    Args:
        micro_sequences: most examples in a forward; of a causal LM an eighth of it.
        limit: most examples; None: all.
        columns: how many columns of the logits all models have. The others are padding: no model
            is asked for them. None: all columns.
    """

    def __init__(
        self,
        batches: Batches,
        world: World,
        micro_sequences: int,
        limit: int | None,
        columns: int | None = None,
    ):
        self.causal = batches.objective.shifted
        micro = -(-micro_sequences // FEWER) if self.causal else micro_sequences
        share = (world.rank, world.ranks, micro, limit)
        self.world, self.columns = world, columns
        self.parts = batches.heldout_parts(*share)
        self.batches: list[MicroBatch] = list(batches.heldout(*share))
        self.examples = len(batches.lengths["heldout"][:limit])
        self.guesses: list[Tensor] | None = None
        self.ask: Predict | None = None  # the teacher, for eval_kl
        self.last: Tensor | None = None

    def teacher(self, predict: Predict) -> Scores:
        """Score the teacher and keep its guesses for `student`."""
        self.guesses = []
        self.ask = predict if self.causal else None
        return self._scores(self._sums(predict, self.guesses), False)

    def student(self, predict: Predict) -> Scores:
        self.last = self._sums(predict, None)
        return self._scores(self.last, self.guesses is not None)

    def record(self) -> dict[str, Any]:
        """The student's last losses, for a comparison with another student's on the same examples.

        Returns the number of examples; and, for each of at most BLOCKS blocks of consecutive
        examples, the targets and the sum of their losses in nats. Neighbours are mostly of one text
        and alike. In one block they count as one observation.
        """
        assert self.last is not None
        blocks = self.last[[TOKENS, LOSS]].tensor_split(max(1, min(BLOCKS, self.examples)), dim=1)
        tokens, losses = torch.stack([block.sum(1) for block in blocks], dim=1).tolist()
        return {
            "examples": self.examples,
            "tokens": [int(n) for n in tokens],
            "losses": [round(loss, 4) for loss in losses],
            **({"target": "next token"} if self.causal else {}),
        }

    @torch.no_grad()
    def _sums(self, predict: Predict, keep: list[Tensor] | None) -> Tensor:
        """Score this rank's batches. Return every example's sums, those of all ranks' examples,
        (5, examples) float64 on the CPU: loss, right, agreeing, targets, KL. Collective."""
        device = self.world.device
        found = [torch.zeros(5, 0, dtype=torch.float64, device=device)]
        for i, (batch, examples) in enumerate(zip(self.batches, self.parts, strict=True)):
            batch = batch.to(device)
            logits = predict(batch)[:, : self.columns].float()
            labels, guess = batch.labels[batch.labelled], logits.argmax(-1)
            if keep is not None:
                keep.append(guess)
            teacher = guess if self.guesses is None or keep is not None else self.guesses[i]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            kl = torch.zeros_like(loss)
            if self.ask is not None and keep is None:
                kl = divergence(self.ask(batch)[:, : self.columns].float(), logits)
            values = (loss, guess == labels, guess == teacher, torch.ones_like(loss), kl)
            # In the batch's own shape: a sum along it has one order, scattered additions have not.
            places = found[0].new_zeros(5, *batch.input_ids.shape)
            places.flatten(1)[:, batch.labelled] = torch.stack([v.double() for v in values])
            found.append(places.sum(2)[:, : len(examples)])
        sums = torch.zeros(5, self.examples, dtype=torch.float64, device=device)
        mine = torch.cat([torch.zeros(0, dtype=torch.int64), *self.parts])
        sums[:, mine.to(device)] = torch.cat(found, dim=1)
        return self.world.sum(sums).cpu()

    def _scores(self, sums: Tensor, known: bool) -> Scores:
        loss, right, agreeing, targets, kl = sums.sum(1).tolist()
        if not targets:
            return Scores(None, None, None)
        return Scores(
            loss / targets,
            right / targets,
            agreeing / targets if known else None,
            None if self.ask is None else kl / targets,
        )


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of each row, (n,), of (n, V) fp32 logits."""
    teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def fill(
    model: Any, tokenizer: Any, texts: Sequence[str], k: int = 3
) -> list[list[tuple[str, float]]]:
    """The k likeliest tokens, with probabilities, at the first MASK of each text.

    A token stands as transformers' fill-mask pipeline prints it. A byte-level one that begins a
    word has its space.
    """
    guesses = []
    for text in texts:
        text = text.replace(MASK, tokenizer.mask_token)
        batch = tokenizer(text, return_tensors="pt", split_special_tokens=False)
        with torch.no_grad():
            logits = model(**{n: batch[n] for n in ("input_ids", "attention_mask")}).logits[0]
        position = int((batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
        top = logits[position].float().softmax(-1).topk(k)
        words = [tokenizer.decode([token]) for token in top.indices.tolist()]
        guesses.append(list(zip(words, top.values.tolist(), strict=True)))
    return guesses


def samples(models: dict[str, Any], tokenizer: Any, texts: Sequence[str]) -> list[Sample]:
    """What each of the models, in eval mode from here on, puts at the MASK of each text."""
    found = {name: fill(model.eval(), tokenizer, texts) for name, model in models.items()}
    return [
        Sample(text, {name: [Guess(*guess) for guess in g[i]] for name, g in found.items()})
        for i, text in enumerate(texts)
    ]


def continued(
    models: dict[str, Any], tokenizer: Any, texts: Sequence[str], tokens: int = 40
) -> Table:
    """How each of the causal models, in eval mode from here on, goes on with each text: the
    likeliest token at each place, at most ``tokens`` of them."""
    end = tokenizer.eos_token_id
    rows = []
    for text in texts:
        batch = tokenizer(text, return_tensors="pt")
        inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
        row = [text]
        for model in models.values():
            options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": end}
            found = model.eval().generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
            row.append(tokenizer.decode(found, skip_special_tokens=True).strip())
        rows.append(row)
    caption = f"The likeliest token at each place, at most {tokens}, up to the end of the text."
    return Table("Continuations", ["text", *models], rows, caption)
