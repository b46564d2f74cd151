"""A few launches of the vocabulary kernel, for a profiler to look at one of them.

    ncu -k regex:distillation_kernel --launch-skip 1 --launch-count 1 --metrics \\
        dram__bytes_read.sum,dram__bytes_write.sum python bench/device/launches.py 30522

Prints the bytes that the loss has to read and to write, to hold the profiler's against. What is
read above that was evicted from the L2 cache between two sweeps over a row.
"""

from __future__ import annotations

import argparse

import torch

from distilfast import distillation_loss

LAUNCHES = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vocab", type=int)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--divergence", default="forward_kl")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    shape = options.rows, options.vocab
    student, teacher = (
        torch.randn(shape, device=options.device, dtype=torch.bfloat16) for _ in range(2)
    )
    student.requires_grad_()
    for _ in range(LAUNCHES):
        distillation_loss(student, teacher, divergence=options.divergence, backend="triton")
    if student.is_cuda:
        torch.cuda.synchronize()
    megabytes = student.nbytes / 1e6
    print(f"the loss needs: {2 * megabytes:,.0f} MB read, {megabytes:,.0f} MB written")


if __name__ == "__main__":
    main()
