"""The fused head: losses and gradients from hidden states and head weights, no (N, V) in memory.

The rows are taken in chunks. A chunk's products with the heads are made, one a side; the loss
kernel makes logits of them in registers and writes their gradient over the student's; two products
turn that into the chunk's share of the gradients of hidden states and weight. Nothing of size N x V
exists, and nothing is computed twice: recomputing logits in a backward would cost another product
a side. What makes the products is products.py's.

The gradients are those for a grad_output of 1, to be scaled in the backward. Two cases run the
whole head again there instead: `reduction="none"`, where each row has a grad_output of its own, and
fp16, where the gradient of a mean is too small to be stored before the loss scale is applied.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distilfast.losses import (
    TOTALS,
    DetailedOutput,
    DistillationOutput,
    Rows,
    as_matrix,
    as_options,
    as_output,
    as_totals,
    backends,
    check_ensemble_mode,
    check_labels,
    check_like,
    check_mask,
    check_options,
    check_statistics,
    check_teacher,
    check_tensor,
    check_values,
    check_vocab,
    finished,
    flatten_rows,
    late_scales,
    normalize_weights,
    reference,
    scale_gradients,
)
from distilfast.losses.backends import Backend
from distilfast.losses.products import HALVES, Products
from distilfast.losses.reference import PARTS, Head, Options
from distilfast.losses.scratch import Scratch

# What the logits of a chunk may take up, all sides together. A product is as fast as it gets from
# some hundred rows on (a CPU) or some thousand (a GPU), and each further chunk reads and writes the
# weight's gradient once more: docs/kernels.md. On a CPU more than MOST_ROWS are slower again.
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
FEWEST_ROWS, MOST_ROWS = {"cpu": 512, "cuda": 1}, {"cpu": 1024, "cuda": 1 << 30}
# What there may be, on a CPU, of a chunk's share of the weight's gradient before it is added to the
# sum: a large head's goes by parts.
SHARE_BYTES = 64 << 20
# Rows of logits begin at multiples of so many elements, as products and kernels want them.
ALIGNMENT = 64


# --- The products ---------------------------------------------------------------------------------


class Side(NamedTuple):
    """A head in the dtype of its products, without what is beyond the vocabulary: whatever it
    holds, 0 * NaN included, it must add nothing. On a GPU zeros fill it to whole ALIGNMENTs."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,), where the product adds it
    head: Head  # what is left for the loss kernel to do
    logits_dtype: torch.dtype
    products: Products

    @staticmethod
    def of(
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        vocab_size: int,
        dtype: torch.dtype,
        logits_dtype: torch.dtype,
        backend: Backend,
    ) -> Side:
        products = Products.of(dtype, logits_dtype, weight.device.type, backend)

        def fit(x: Tensor, dtype: torch.dtype) -> Tensor:
            x = x[:vocab_size].to(dtype)
            missing = _padded(vocab_size) - vocab_size if x.is_cuda else 0
            return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x

        if bias is not None and backend.adds_bias and not products.kernel:
            in_fp32 = bias[:vocab_size].to(torch.float32).contiguous()
            head, bias = head._replace(bias=in_fp32), None
        if bias is not None:
            wide = torch.float32 if products.widened else logits_dtype
            bias = fit(bias, wide).contiguous()
        return Side(fit(weight, dtype), bias, head, logits_dtype, products)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """h W^T (+ b) of (n, D), in the first n rows and V columns of ``out``."""
        out = out[: hidden.shape[0], : self.weight.shape[0]]
        self.products.logits(hidden, self.weight, self.bias, out)
        return out

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of the logits' gradient."""
        return self.logits_dtype if self.products.wide_gradient else self.weight.dtype


class WeightGradient:
    """The sum over chunks of gradient^T hidden, (V, D), in a dtype of its own."""

    def __init__(
        self, side: Side, dtype: torch.dtype, like: Tensor, backend: Backend, scratch: Scratch
    ):
        shape, device = side.weight.shape, side.weight.device
        # What is handed out in the end, or what it is rounded from.
        self.is_result = (shape, dtype) == (like.shape, like.dtype)
        empty = torch.empty if self.is_result else scratch.empty
        self.total = empty(shape, dtype=dtype, device=device)
        self.like = like
        self.begun = False
        self.products = side.products
        # Where PyTorch's product cannot add to the sum itself.
        self.share = None
        made = torch.float32 if side.products.wide_gradient else side.weight.dtype
        if made != dtype and not side.weight.is_cuda:
            rows = max(1, SHARE_BYTES // (shape[1] * made.itemsize))
            self.share = scratch.empty((min(rows, shape[0]), shape[1]), made, device)
            in_fp32 = dtype == torch.float32
            self.accumulate = backend.accumulate if in_fp32 else backends.torch_accumulate

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        if self.share is not None:
            most = len(self.share)
            parts = zip(gradient.split(most, dim=1), self.total.split(most), strict=True)
            for some, total in parts:
                share = self.share[: len(total)]
                self.products.weight_gradient(some, hidden, share, False)
                self.accumulate(total, share, self.begun)
        else:
            self.products.weight_gradient(gradient, hidden, self.total, self.begun)
        self.begun = True

    def result(self, vocab_size: int) -> Tensor:
        """The sum in the shape and dtype of ``like``."""
        total = self.total if self.begun else self.total.zero_()
        if self.is_result:
            return total
        result = self.like.new_empty(self.like.shape)
        result[:vocab_size] = total[:vocab_size]
        result[vocab_size:] = 0
        return result


class Target:
    """The teachers' logits of a chunk, as products and what makes logits of them. Of an ensemble
    there are one teacher's at a time, and the mixture so far."""

    def __init__(
        self,
        sides: Sequence[Side],
        shares: Sequence[float],
        ensemble: str,
        options: Options,
        backend: Backend,
    ):
        self.sides, self.shares = sides, shares
        self.ensemble, self.options = ensemble, options
        self.combine = backend.combine_teachers
        self.dtypes = list({side.logits_dtype for side in sides})
        if len(sides) > 1:  # the mixture, and a teacher's logits that its products have no room for
            compute = reference.accumulation_dtype(*(side.weight for side in sides))
            apart = any(not x.head.plain and x.logits_dtype != compute for x in sides)
            self.dtypes += [compute] * (2 if apart else 1)

    def allocate(self, rows: int, scratch: Scratch) -> None:
        """Memory for chunks of so many rows."""
        device, width = self.sides[0].weight.device, self.options.vocab_size
        self.buffers = [
            _rows_of_logits(rows, width, dtype, device, scratch) for dtype in self.dtypes
        ]

    def __call__(self, hidden: Sequence[Tensor]) -> tuple[Tensor, Head]:
        vocab_size, mixed = self.options.vocab_size, 0.0
        if len(self.sides) == 1:
            return self.sides[0].logits(hidden[0], self.buffers[0]), self.sides[0].head
        part = slice(hidden[0].shape[0]), slice(vocab_size)
        z = self.buffers[-1][part]
        for side, share, h in zip(self.sides, self.shares, hidden, strict=True):
            logits = side.logits(h, self.buffers[self.dtypes.index(side.logits_dtype)])[part]
            if not side.head.plain:
                if logits.dtype != z.dtype:
                    logits = self.buffers[-2][part].copy_(logits)
                logits = side.head.logits_(logits)
            if mixed:
                shares = [mixed / (mixed + share), share / (mixed + share)]
                temperature = self.options.temperature
                self.combine([z, logits], shares, temperature, self.ensemble, vocab_size, z)
            else:
                z.copy_(logits)
            mixed += share
        return z, Head()


def _rows_of_logits(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, scratch: Scratch
) -> Tensor:
    return scratch.empty((rows, _padded(width)), dtype, device)


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


# --- The operator ---------------------------------------------------------------------------------


class HeadCall(NamedTuple):
    """How the operator is called: one string of its schema, as `losses.Call`."""

    divergence: str
    reduction: str
    backend: str
    ensemble: str
    accum_dtype: str
    logits_dtype: str  # of 16-bit hidden states
    late: bool  # the gradients are the backward's, which calls the operator again without it
    hidden: bool  # which gradients are wanted
    weight: bool
    bias: bool
    statistics: bool

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        return self.hidden, self.weight, self.bias

    def __str__(self) -> str:
        return " ".join(map(str, self[:6])) + "".join(f" {int(flag)}" for flag in self[6:])

    @staticmethod
    @functools.cache
    def read(text: str) -> HeadCall:
        words = text.split()
        return HeadCall(*words[:6], *(flag == "1" for flag in words[6:]))  # type: ignore[arg-type]

    def dtype_of_logits(self, hidden: Tensor) -> torch.dtype:
        """fp32 of 16 bits, unless these very 16 bits are asked for."""
        kept = hidden.dtype not in HALVES or hidden.dtype == getattr(torch, self.logits_dtype)
        return hidden.dtype if kept else torch.float32


HEADS = slice(8, 12)  # among the numbers: scale and softcap of the student, of the teachers
SHARES = slice(12, None)  # the teachers' weights


@torch.library.custom_op("distilfast::linear_distillation", mutates_args=())
def linear_distillation_op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: list[Tensor],
    teacher_weight: list[Tensor],
    teacher_bias: list[Tensor],
    labels: Tensor | None,
    mask: Tensor | None,
    kd_normalizer: Tensor | None,
    ce_normalizer: Tensor | None,
    scales: Tensor | None,
    numbers: list[float],
    sizes: list[int],
    how: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the parts, the gradients of hidden, weight and bias (empty if not wanted, or late),
    the scales (2,) by which late ones have to be multiplied (empty where they were given), and the
    statistics (3, N) (empty if not wanted).

    The products are in the dtypes of the hidden states. A teacher without a bias has an empty one.
    ``scales``, (2,) or (2, N), are a late backward's, times the grad_output; None: from the
    normalisers. ``sizes`` ends with the rows a chunk.
    """
    call = HeadCall.read(how)
    options = as_options(numbers, sizes, call.divergence)
    check_values(labels, mask, options)
    with backends.on_device(student_hidden):
        return _linear_distillation(
            (student_hidden, student_weight, student_bias),
            (teacher_hidden, teacher_weight, teacher_bias),
            Rows(labels, mask, kd_normalizer, ce_normalizer),
            scales,
            options,
            numbers,
            sizes[-1],
            call,
        )


def _linear_distillation(
    student_tensors: tuple[Tensor, Tensor, Tensor | None],
    teacher_tensors: tuple[list[Tensor], list[Tensor], list[Tensor]],
    each: Rows,
    scales: Tensor | None,
    options: Options,
    numbers: Sequence[float],
    chunk_rows: int,
    call: HeadCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    student_hidden, student_weight, student_bias = student_tensors
    teacher_hidden, teacher_weight, teacher_bias = teacher_tensors
    labels, mask = each.labels, each.mask
    want_hidden, want_weight, want_bias = [False] * 3 if call.late else call.wanted
    training = want_hidden or want_weight or want_bias
    vocab_size, backend = options.vocab_size, backends.BACKENDS[call.backend]
    n_rows, device = student_hidden.shape[0], student_hidden.device
    compute = reference.accumulation_dtype(student_hidden, *teacher_hidden)

    scale, softcap, teacher_scale, teacher_softcap = numbers[HEADS]
    head, dtype = Head(scale, softcap), student_hidden.dtype
    wide = call.dtype_of_logits(student_hidden)
    student = Side.of(student_weight, student_bias, head, vocab_size, dtype, wide, backend)
    used = [k for k, share in enumerate(numbers[SHARES]) if share]
    teachers = []
    for k in used:
        head, dtype = Head(teacher_scale, teacher_softcap), teacher_hidden[k].dtype
        bias = teacher_bias[k] if len(teacher_bias[k]) else None
        wide = call.dtype_of_logits(teacher_hidden[k])
        teachers.append(Side.of(teacher_weight[k], bias, head, vocab_size, dtype, wide, backend))
    shares = [numbers[SHARES][k] for k in used]
    target = Target(teachers, shares, call.ensemble, options, backend)

    by, needed = _scales(each, scales, options, numbers, n_rows, compute, device, backend)
    # A gradient of fewer bits than the logits lies in their memory, or in its own.
    narrower = training and student.gradient_dtype != student.logits_dtype
    apart = narrower and not backend.overwrites
    dtypes = [student.logits_dtype, *target.dtypes, *([student.gradient_dtype] if apart else [])]
    chunks = _chunks(student_hidden, needed, chunk_rows, vocab_size, dtypes)
    most = max((_length(chunk) for chunk in chunks), default=0)
    scratch = Scratch()
    logits = _rows_of_logits(most, vocab_size, student.logits_dtype, device, scratch)
    gradients = logits.view(student.gradient_dtype) if narrower and not apart else logits
    if apart:
        gradients = _rows_of_logits(most, vocab_size, student.gradient_dtype, device, scratch)
    if teachers:
        target.allocate(most, scratch)

    # Slices are all rows; of a selection the others are 0.
    made = torch.empty if chunks and isinstance(chunks[0], slice) else torch.zeros
    rows = made(len(PARTS), n_rows, dtype=compute, device=device)
    d_hidden = made(
        student_hidden.shape if want_hidden else 0, dtype=student_hidden.dtype, device=device
    )
    weight_gradient = None
    if want_weight:
        accum_dtype = getattr(torch, call.accum_dtype)
        if len(chunks) == 1 and student_weight.dtype == student.weight.dtype:
            accum_dtype = student_weight.dtype  # nothing is added up
        weight_gradient = WeightGradient(student, accum_dtype, student_weight, backend, scratch)
    d_bias = torch.zeros(len(student_weight), dtype=compute, device=device) if want_bias else None
    kd_scale, ce_scale = by.unbind()
    statistics = student_hidden.new_empty(0, dtype=compute)
    if call.statistics:
        statistics = student_hidden.new_zeros((3, n_rows), dtype=compute)
    for chunk in chunks:
        hidden = student_hidden[chunk]
        if needed is not None and isinstance(chunk, slice):
            # A row that nothing needs must not reach the weight's gradient.
            hidden = torch.where(needed[chunk, None], hidden, 0)
        s = student.logits(hidden, logits)
        gradient = gradients[: s.shape[0], : s.shape[1]] if training else None
        found = statistics.new_empty(3, s.shape[0]) if call.statistics else None
        t, t_head = s, student.head  # without a teacher nothing reads it
        if teachers:
            t, t_head = target([teacher_hidden[k][chunk] for k in used])
        of_chunk = backend.distillation(
            s,
            t,
            None if labels is None else labels[chunk],
            None if mask is None else mask[chunk],
            kd_scale[chunk] if kd_scale.ndim else kd_scale,
            ce_scale[chunk] if ce_scale.ndim else ce_scale,
            options,
            gradient,
            (student.head, t_head),
            None if d_bias is None else d_bias[:vocab_size],
            found,
        )
        if found is not None:
            statistics[:, chunk] = found
        if isinstance(chunk, slice) and len(chunks) == 1:
            rows = of_chunk
        else:
            rows[:, chunk] = of_chunk
        if gradient is not None and want_hidden:
            made_here = d_hidden[chunk]  # a copy, if the chunk is a selection
            student.products.hidden_gradient(gradient, student.weight, made_here)
            if not isinstance(chunk, slice):
                d_hidden[chunk] = made_here
        if gradient is not None and weight_gradient:
            weight_gradient.add(gradient, hidden)

    loss, parts = backend.reduce_rows(rows, by, options[1:5], call.reduction)
    bias_like = student_weight if student_bias is None else student_bias
    d_weight = student_weight.new_empty(0)
    if weight_gradient:
        d_weight = weight_gradient.result(vocab_size)
    d_bias = bias_like.new_empty(0) if d_bias is None else d_bias.to(bias_like.dtype)
    scratch.keep()
    by = by if scales is None else by.new_empty(0)
    return loss, parts, d_hidden, d_weight, d_bias, by, statistics


def _scales(
    each: Rows,
    scales: Tensor | None,
    options: Options,
    numbers: Sequence[float],
    n_rows: int,
    compute: torch.dtype,
    device: torch.device,
    backend: backends.Backend,
) -> tuple[Tensor, Tensor | None]:
    """The scales, and (N,) bool, the rows that some part needs; None: all of them."""
    labels, mask, ignore_index = each.labels, each.mask, options.ignore_index
    totals = as_totals(each, numbers[TOTALS])
    if scales is not None:
        needed = reference.needed_rows(scales, labels, mask, ignore_index).expand(n_rows)
    else:
        needed = None
        # A total that the host knows and that is not 0 needs every row. 0: no soft loss counts.
        if mask is not None or isinstance(totals[0], Tensor) or totals[0] == 0:
            needed = torch.empty(n_rows, dtype=torch.bool, device=device)
        scales = backend.row_scales(
            totals, labels, mask, n_rows, ignore_index, compute, device, needed
        )
    if needed is not None and not needed.is_cuda and needed.all():
        needed = None
    return scales, needed


def _chunks(
    hidden: Tensor,
    needed: Tensor | None,
    rows: int,
    vocab_size: int,
    dtypes: Sequence[torch.dtype],
) -> Sequence[slice | Tensor]:
    """The rows of each chunk, ``rows`` of them or, if that is 0, what the budget has room for. On a
    CPU the rows that nothing needs are left out altogether; on a GPU counting them would wait for
    the device."""
    selected = None
    if needed is not None and not hidden.is_cuda:
        selected = needed.nonzero()[:, 0]
    n = hidden.shape[0] if selected is None else len(selected)
    if n == 0:
        return []
    if not rows:
        kind = "cpu" if hidden.device.type == "cpu" else "cuda"
        row_bytes = _padded(vocab_size) * sum(dtype.itemsize for dtype in dtypes)
        most = max(1, CHUNK_BYTES[kind] // row_bytes // ALIGNMENT) * ALIGNMENT
        most = min(max(most, FEWEST_ROWS[kind]), MOST_ROWS[kind])
        rows = -(-n // -(-n // most))  # as many chunks as it takes, of one size
        rows = _padded(rows)
    if selected is not None:
        return selected.split(rows)
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _length(chunk: slice | Tensor) -> int:
    return chunk.stop - chunk.start if isinstance(chunk, slice) else len(chunk)


@linear_distillation_op.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: list[Tensor],
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, scales = HeadCall.read(others[-1]), others[6]
    n_rows = [student_hidden.shape[0]] if call.reduction == "none" else []
    bias_like = student_weight if student_bias is None else student_bias
    hidden, weight, bias = [False] * 3 if call.late else call.wanted
    compute = reference.accumulation_dtype(student_hidden, *teacher_hidden)
    like = student_hidden.new_empty(0, dtype=compute)
    return (
        like.new_empty(n_rows),
        like.new_empty([len(PARTS), *n_rows]),
        student_hidden.new_empty(student_hidden.shape if hidden else 0),
        student_weight.new_empty(student_weight.shape if weight else 0),
        bias_like.new_empty(student_weight.shape[0] if bias else 0),
        like.new_empty(2 if scales is None else 0),
        like.new_empty((3, student_hidden.shape[0]) if call.statistics else 0),
    )


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    loss, *rest, scales, statistics = output
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the gradients
    ctx.mark_non_differentiable(*rest, scales, statistics)
    *ctx.settings, how = inputs[11:]
    ctx.call = HeadCall.read(how)
    ctx.teacher_counts = [len(group) for group in inputs[3:6]]
    if not ctx.call.late:
        ctx.save_for_backward(loss, *rest[1:])
        return
    student = inputs[:3]
    teachers = [x for group in inputs[3:6] for x in group]
    ctx.save_for_backward(loss, scales, *inputs[6:8], *student, *teachers)


def _linear_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = *([None] * n for n in ctx.teacher_counts), *[None] * 8
    if grad_loss is None:
        return *[None] * 3, *nothing
    call, wanted = ctx.call, ctx.call.wanted
    if call.late:
        loss, scales, labels, mask, *saved = ctx.saved_tensors
        student, teachers = saved[:3], saved[3:]
        groups = []
        for count in ctx.teacher_counts:
            groups.append([t.detach() for t in teachers[:count]])
            teachers = teachers[count:]
        _, _, *gradients, _, _ = linear_distillation_op(
            *(None if x is None else x.detach() for x in student),
            *groups,
            labels,
            mask,
            None,
            None,
            late_scales(scales, grad_loss),
            *ctx.settings,
            str(call._replace(late=False, statistics=False)),
        )
        made = [
            finished(g, loss, call.backend) for g, w in zip(gradients, wanted, strict=True) if w
        ]
    else:
        loss, *gradients = ctx.saved_tensors
        made = scale_gradients(
            [g for g, w in zip(gradients, wanted, strict=True) if w], grad_loss, loss, call.backend
        )
    found = iter(made)
    return *(next(found) if w else None for w in wanted), *nothing


linear_distillation_op.register_autograd(_linear_backward, setup_context=_linear_context)


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None,
    teacher_weight: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor] | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    teacher_weights: Sequence[float] | None = None,
    ensemble: str = "probability",
    chunk_rows: int | str = "auto",
    accum_dtype: torch.dtype | None = None,
    logits_dtype: torch.dtype | None = None,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    cos_weight: float = 0.0,
    mse_weight: float = 0.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    reduction: str = "mean",
    kd_normalizer: float | Tensor | None = None,
    ce_normalizer: float | Tensor | None = None,
    inplace_backward: bool = False,
    statistics: bool = False,
    backend: str = "auto",
) -> DistillationOutput | DetailedOutput:
    """`distillation_loss` of the logits h W^T + b, which are never held: chunk by chunk of rows.

    Args:
        student_hidden: (..., D_s).
        student_weight: (V_s, D_s), as ``nn.Linear.weight`` or a tied embedding.
        teacher_hidden: (..., D_t), or a sequence: an ensemble. May not require a gradient. None,
            as teacher_weight, where ce_weight alone is > 0.
        teacher_weight: (V_t, D_t), or a sequence. A teacher's weight and bias are constants here,
            whether they require a gradient or not.
        labels: (...) int64.
        student_bias, teacher_bias: (V_s,) and (V_t,) or a sequence of them; None: no bias.
        logit_scale: logits are multiplied by it; a pair (student, teacher) where they differ.
        logit_softcap: c, logits become c tanh(logits / c) after scaling; None: none; a pair where
            they differ.
        teacher_weights, ensemble: as ``weights`` and ``mode`` of `combine_teachers`.
        chunk_rows: rows a chunk, or "auto": what fits a fixed memory budget (CHUNK_BYTES).
        accum_dtype: what the shares of the chunks in the weight's gradient are summed in: None is
            fp32 (fp64 for fp64); the dtype of the hidden states saves V D 4 bytes, and rounds at
            every chunk (docs/kernels.md has the error).
        logits_dtype: of 16-bit hidden states: None is fp32; their own dtype halves the memory of a
            chunk, and rounds logits before they are subtracted: near the teacher the gradient is
            wrong by more than itself (docs/exactness.md).
        inplace_backward: accepted, without effect: there are no logits to overwrite.

    The other keywords are those of `distillation_loss`. Under autocast the products run in its
    dtype, and the gradients of an fp32 weight and bias are summed and returned in fp32. Logits,
    scale, softcap, losses and the sums over chunks are fp32. The gradient of the logits is rounded
    to 16 bits for its products, once student and teacher have been subtracted, and a chunk's share
    of the weight's gradient is on a CPU; on CPUs without products of that dtype both stay fp32.
    With ``reduction="none"``, or in fp16, the backward computes the head a second time.

    Rows that no loss needs (mask 0, no label) are not projected on a CPU; on a GPU, where counting
    them would wait for the device, they are, so leave them out where that matters.

    Returns:
        As `distillation_loss`; the gradient flows to student_hidden, student_weight and
        student_bias.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
        >>> teacher_hidden, teacher_weight = torch.randn(4, 12), torch.randn(16, 12)
        >>> out = linear_distillation_loss(hidden, weight, teacher_hidden, teacher_weight)
        >>> out.loss.backward()
        >>> hidden.grad.shape
        torch.Size([4, 8])
    """
    weights = {
        "kd_weight": kd_weight,
        "ce_weight": ce_weight,
        "cos_weight": cos_weight,
        "mse_weight": mse_weight,
    }
    normalizers = {"kd_normalizer": kd_normalizer, "ce_normalizer": ce_normalizer}
    check_options(temperature, weights, divergence, jsd_beta, reduction, normalizers)
    check_statistics(statistics, kd_weight)
    check_ensemble_mode("ensemble", ensemble)
    scales = _pair("logit_scale", logit_scale, 1.0)
    softcaps = _pair("logit_softcap", logit_softcap, 0.0)
    if chunk_rows != "auto" and (type(chunk_rows) is not int or chunk_rows < 1):
        raise ValueError(f"chunk_rows: expected 'auto' or a whole number >= 1, got {chunk_rows!r}")

    soft = bool(kd_weight or cos_weight or mse_weight)
    t_hidden = _as_teachers("teacher_hidden", teacher_hidden, soft)
    t_weight = _as_teachers("teacher_weight", teacher_weight, soft)
    t_bias = [None] * len(t_hidden) if teacher_bias is None else _as_list(teacher_bias)
    for name, group in (("teacher_weight", t_weight), ("teacher_bias", t_bias)):
        if len(group) != len(t_hidden):
            raise ValueError(
                f"{name}: expected {len(t_hidden)}, one for each teacher_hidden, got {len(group)}"
            )
    if len(t_hidden) > 1 and ensemble == "probability" and (cos_weight or mse_weight):
        raise ValueError(
            "cos_weight, mse_weight: expected 0 with ensemble='probability', whose logits are "
            f"known only up to a constant, got {cos_weight} and {mse_weight}; use ensemble='logit'"
        )
    shares = normalize_weights("teacher_weights", teacher_weights, max(1, len(t_hidden)))
    check_tensor("student_hidden", student_hidden)
    leading, device = student_hidden.shape[:-1], student_hidden.device
    _check_head("student", student_hidden, student_weight, student_bias, leading, device)
    for k, (h, w) in enumerate(zip(t_hidden, t_weight, strict=True)):
        check_teacher("teacher_hidden", h)
        _check_head("teacher", h, w, t_bias[k], leading, device)
    vocab = check_vocab(
        ("student_weight", student_weight.shape[0]),
        [("teacher_weight", w.shape[0]) for w in t_weight],
        vocab_size,
    )
    check_labels(labels, ignore_index, ce_weight, leading, device)
    check_mask(mask, leading, device)

    if not soft:  # the labels alone: no teacher is projected
        t_hidden, t_weight, t_bias, shares = [], [], [], []

    if torch.is_autocast_enabled(device.type):  # the operator casts the heads
        dtype = torch.get_autocast_dtype(device.type)
        student_hidden, *t_hidden = (
            h if h.dtype == torch.float64 else h.to(dtype) for h in (student_hidden, *t_hidden)
        )
    else:
        _check_one_dtype("student", student_hidden, student_weight, student_bias)
        for h, w, b in zip(t_hidden, t_weight, t_bias, strict=True):
            _check_one_dtype("teacher", h, w, b)
    accum_dtype = _accum_dtype(accum_dtype, student_hidden.dtype)
    logits_dtype = _logits_dtype(logits_dtype, [student_hidden.dtype, *(h.dtype for h in t_hidden)])
    read = (student_hidden, *t_hidden, student_weight)  # under autocast of different dtypes
    backend = backends.choose(backend, device, [x.dtype for x in read])

    rows, totals = flatten_rows(
        labels if ce_weight else None, mask, device, reduction, kd_normalizer, ce_normalizer
    )
    if not soft:  # then nothing but a label can make a row needed
        rows, totals[0] = rows._replace(mask=None, kd_normalizer=None), 0.0
    numbers = [float(x) for x in (temperature, *weights.values(), jsd_beta, *totals)]
    trained = (student_hidden, student_weight, student_bias)
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in trained]
    late = reduction == "none" or student_hidden.dtype == torch.float16
    sums, rounded = (str(dtype).removeprefix("torch.") for dtype in (accum_dtype, logits_dtype))
    named = divergence, reduction, backend, ensemble, sums, rounded
    call = HeadCall(*named, late, wanted[0], wanted[1], wanted[2], statistics)
    loss, parts, *_, found = linear_distillation_op(
        as_matrix(student_hidden),
        student_weight,
        student_bias,
        [as_matrix(h) for h in t_hidden],
        [w.detach() for w in t_weight],
        [
            w.new_empty(0) if b is None else b.detach()
            for w, b in zip(t_weight, t_bias, strict=True)
        ],
        *rows,
        None,
        [*numbers, scales[0], softcaps[0], scales[1], softcaps[1], *shares],
        [ignore_index, vocab, 0 if chunk_rows == "auto" else int(chunk_rows)],
        str(call),
    )
    return as_output(loss, parts, leading, reduction, found if statistics else None)


def _as_teachers(name: str, value: Any, needed: bool) -> list[Tensor]:
    if value is None and not needed:
        return []
    teachers = _as_list(value)
    if not teachers:
        raise ValueError(f"{name}: expected a tensor or a sequence of them, got an empty one")
    for t in teachers:
        check_tensor(name, t)
    return teachers


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _accum_dtype(wanted: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    widest = torch.float64 if dtype == torch.float64 else torch.float32
    if wanted is None:
        return widest
    if wanted not in (widest, dtype):
        known = " or ".join(str(x) for x in dict.fromkeys((None, widest, dtype)))
        raise ValueError(f"accum_dtype: expected {known}, got {wanted!r}")
    return wanted


def _logits_dtype(wanted: torch.dtype | None, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Of the 16-bit ones among the dtypes of the hidden states."""
    if wanted is None or wanted == torch.float32:
        return torch.float32
    if wanted not in HALVES or wanted not in dtypes:
        known = " or ".join(
            str(x) for x in (None, torch.float32, *HALVES) if x not in HALVES or x in dtypes
        )
        raise ValueError(f"logits_dtype: expected {known}, got {wanted!r}")
    return wanted


def _check_head(
    side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, leading: torch.Size, device: Any
) -> None:
    check_tensor(f"{side}_weight", weight)
    if hidden.ndim == 0 or hidden.shape[:-1] != leading:
        raise ValueError(
            f"{side}_hidden: expected the leading shape of student_hidden {tuple(leading)}, "
            f"got shape {tuple(hidden.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight: expected (V, {hidden.shape[-1]}) to match {side}_hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.device != device:
            raise ValueError(
                f"{side}_{name}: expected device {device} (student_hidden's), got {value.device}"
            )
    if bias is not None:
        check_tensor(f"{side}_bias", bias)
        check_like(f"{side}_bias", bias, weight.shape[:1], device)


def _check_one_dtype(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise ValueError(
                f"{side}_{name}: expected the dtype of {side}_hidden, {hidden.dtype}, got "
                f"{value.dtype} (use torch.autocast to mix them)"
            )


def _pair(name: str, value: Any, none: float) -> tuple[float, float]:
    """(student, teacher) from one value or a pair; None becomes ``none``."""
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a number or a pair (student, teacher), got {value!r}")
    for x in pair:
        is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
        if x is not None and not (is_number and 0 < x < float("inf")):
            raise ValueError(f"{name}: expected finite numbers > 0, got {value!r}")
    student, teacher = (none if x is None else float(x) for x in pair)
    return student, teacher
