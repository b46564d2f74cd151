"""Calls that notice mutations of more than one table."""

from __future__ import annotations

import test_heads as heads
import test_losses as values
import test_losses_edges as edges
import test_near as near
import torch
from oracle import DIVERGENCES, NAN

from mutations import call

AT = {
    (kind, temperature): call(
        values.test_parity_at_every_temperature,
        divergence=kind,
        temperature=temperature,
        near=False,
    )
    for kind in DIVERGENCES
    for temperature in (1.0, 2.0, 3.0, 4.0, 5.0, 7.3)
}
MASKS = call(values.test_float_mask_weights_rows_and_their_divisor)
DIVISORS = call(values.test_mean_divides_each_part_by_its_own_count)
NOTHING_COUNTS = call(
    values.test_total_of_zero_counts_nothing_whatever_the_rows_hold, as_tensor=True
)
MASKED_NAN = call(
    edges.test_masked_rows_contribute_exactly_nothing, divergence="jsd", kind="bool", bad=NAN
)
IMPOSSIBLE = call(edges.test_reverse_kl_of_an_impossible_token_is_inf_with_a_nan_row)
UNDERFLOW = call(edges.test_tiny_probability_against_an_impossible_token_is_inf_and_not_nan)
INFINITE_MSE = call(edges.test_infinite_mse_has_a_nan_row, side="student")
HEAD = {
    name: call(
        heads.test_parity_with_the_oracle, name=name, divergence="forward_kl", dtype=torch.float32
    )
    for name in heads.HEADS
}
SOFTCAP = call(heads.test_parity_of_capped_large_small_and_infinite_products, softcap=30.0)

# Near the teacher.
NEAR = {
    (kind, noise): call(
        near.test_small_divergence_keeps_its_digits,
        divergence=kind,
        noise=noise,
        temperature=1.0,
    )
    for kind in DIVERGENCES
    for noise in (1e-3, 0.15)
}
FAR_COLUMNS = {
    kind: call(
        near.test_small_divergence_with_few_columns_far_apart_keeps_its_digits, divergence=kind
    )
    for kind in DIVERGENCES
}
EXCLUDED = call(
    near.test_small_divergence_with_excluded_columns_keeps_its_digits, divergence="forward_kl"
)
COUNTED = call(
    near.test_statistics_are_the_softmaxes, divergence="forward_kl", noise=0.5, vocab=1003
)
FIRST_OF_EQUALS = call(near.test_first_of_equal_largest_logits_counts)
