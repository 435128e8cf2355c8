"""Quantiles of Student's t distribution against scipy's."""

from __future__ import annotations

import pytest

from mapo_fast.util.students_t import half_width

SCIPY = {  # scipy 1.17.1: float(stdtrit(freedom, (1 + level) / 2))
    (0.95, 1): 12.706204736174694,
    (0.95, 2): 4.302652729749462,
    (0.95, 3): 3.1824463052837078,
    (0.95, 4): 2.7764451051977934,
    (0.95, 10): 2.228138851986274,
    (0.95, 31): 2.039513446396408,
    (0.95, 63): 1.998340542520741,
    (0.95, 64): 1.997729654317693,
    (0.95, 500): 1.9647198374673676,
    (0.95, 8191): 1.960253645857811,
    (0.99, 1): 63.656741162871526,
    (0.99, 4): 4.604094871349992,
    (0.99, 63): 2.6561450250998613,
}


@pytest.mark.parametrize(("level", "freedom"), SCIPY)
def test_quantiles_are_scipys_to_13_digits(level: float, freedom: int) -> None:
    assert half_width(level, freedom) == pytest.approx(SCIPY[level, freedom], rel=1e-13)


@pytest.mark.parametrize(("level", "freedom"), [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_what_has_no_quantile_is_refused(level: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="has to be"):
        half_width(level, freedom)
