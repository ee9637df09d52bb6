"""Seeds are pure: the same parts give the same numbers, everywhere and always."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsss_core.seeding import derive_seed, numpy_generator, torch_generator

names = st.text(st.characters(exclude_categories=["C"]), max_size=5)
parts = st.lists(st.one_of(st.integers(0, 999), names), max_size=3)


def test_derive_seed__stays_what_it_was():
    """Keys and weights of every store hang on these numbers."""
    assert derive_seed(0, "classifier") == 664761479324334695
    assert derive_seed(0) != derive_seed(1)


@given(st.integers(0, 2**40), parts)
def test_derive_seed__fits_63_bits_and_is_pure(seed, names):
    found = derive_seed(seed, *names)
    assert 0 <= found < 2**63
    assert derive_seed(seed, *names) == found


@given(st.integers(0, 2**40), parts, parts)
def test_derive_seed__every_part_counts_in_its_place(seed, one, other):
    same = [str(part) for part in one] == [str(part) for part in other]
    assert (derive_seed(seed, *one) == derive_seed(seed, *other)) == same


def test_derive_seed__parts_are_not_glued_together():
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")
    assert derive_seed(1, "2", 3) != derive_seed(12, 3)


def test_generators__draw_the_same_without_touching_the_global_ones():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = torch.randn(3, generator=torch_generator(1, "head"))
    assert torch.equal(first, torch.randn(3, generator=torch_generator(1, "head")))
    assert not torch.equal(first, torch.randn(3, generator=torch_generator(1, "order")))
    assert (
        numpy_generator(1, "crop", 0, "a").random() == numpy_generator(1, "crop", 0, "a").random()
    )
    assert (
        numpy_generator(1, "crop", 0, "a").random() != numpy_generator(1, "crop", 1, "a").random()
    )
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
