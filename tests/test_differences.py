import pytest

from dipper.differences import differences

OLD = {"a": 1.0, "rows": [{"s": 2.0, "n": 3}, {"s": 4.0, "n": 5}], "deep": {"x": [1, 2], "y": None}}


@pytest.mark.parametrize(
    ("new", "varies", "compared", "expected"),
    [
        ({}, (), False, []),
        ({"a": 1.0000001}, (), False, ["a is 1.0, now 1.0000001"]),
        ({"a": 1}, (), False, ["a is 1.0, now 1"]),
        ({"a": 1.2}, ("a",), True, []),
        ({"a": 1.26}, ("a",), True, ["a is 1.0, now 1.26"]),
        ({"a": 0.79}, ("a",), True, ["a is 1.0, now 0.79"]),
        ({"a": -1.0}, ("a",), True, ["a is 1.0, now -1.0"]),
        ({"a": 99.0}, ("a",), False, []),
        ({"a": None}, ("a",), True, ["a is 1.0, now null"]),
        ({"rows": [{"s": 9.0, "n": 3}, {"s": 4.0, "n": 5}]}, ("rows.*.s",), False, []),
        ({"rows": [{"s": 9.0, "n": 3}, {"s": 4.0, "n": 5}]}, ("rows.1.s",), False, ["rows.0.s is 2.0, now 9.0"]),
        ({"rows": [{"s": 9.0, "n": 4}, {"s": 4.0, "n": 5}]}, ("rows.*.s",), True,
         ["rows.0.s is 2.0, now 9.0", "rows.0.n is 3, now 4"]),
        ({"rows": [{"s": 2.0, "n": 3}]}, (), False, ["rows has 2 values, now 1"]),
        ({"deep": {"x": [1, 2], "z": 3}}, (), False, ["deep.y is null, now absent", "deep.z is absent, now 3"]),
        ({"deep": {"x": [7], "z": "b"}}, ("deep",), False, []),
        ({"deep": {"x": [1.1, 9], "y": "b"}}, ("deep",), True,
         ["deep.x.1 is 2, now 9", 'deep.y is null, now "b"']),
    ],
)  # fmt: skip
def test_differences(new, varies, compared, expected):
    assert differences(OLD, {**OLD, **new}, varies, varies if compared else ()) == expected


@pytest.mark.parametrize(
    ("bars", "new", "expected"),
    [
        (({"t_stderr": 1.0}, {"t_stderr": 1.0}), 14.2, True),  # three errors of a difference are 4.24
        (({"t_stderr": 1.0}, {"t_stderr": 1.0}), 14.3, False),
        (({"t_stderr": 0.01}, {"t_stderr": 0.01}), 10.1, False),  # near, but not within its error bars
        (({"t_ci95": [8, 12]}, {"t_ci95": [11.5, 20]}), 15.0, True),
        (({"t_ci95": [9, 11]}, {"t_ci95": [11.5, 13]}), 12.2, False),
        (({"t_stderr": None}, {"t_stderr": None}), 12.2, True),  # no error bar: the ratio
    ],
)
def test_error_bars_decide(bars, new, expected):
    old, other = ({"t": value, **bar} for value, bar in zip((10.0, new), bars, strict=True))
    bar = next(iter(bars[0]))
    # The bars themselves are estimates, which need not agree.
    assert differences(old, other, ("t", bar), ("t", bar)) == ([] if expected else [f"t is 10.0, now {new}"])


def test_error_bars_of_what_does_not_vary_are_compared():
    assert differences({"t": 1.0, "t_stderr": 0.1}, {"t": 1.0, "t_stderr": 0.2}) == ["t_stderr is 0.1, now 0.2"]


def test_of_what_varies_some_may_still_have_to_agree():
    old = {"cells": {"dip@0.5": {"text": {"perplexity": 10.0, "nll": [1.0]}, "lr": 1e-3}}}
    new = {"cells": {"dip@0.5": {"text": {"perplexity": 13.0, "nll": [2.0]}, "lr": 5e-4}}}
    assert differences(old, new, ("cells",), ()) == []
    found = differences(old, new, ("cells",), ("cells.*.*.perplexity",))
    assert found == ["cells.dip@0.5.text.perplexity is 10.0, now 13.0"]


@pytest.mark.parametrize(
    "gone", [{}, {"cells": {}}, {"cells": {"dip@0.5": {}}}, {"cells": {"dip@0.5": {"text": None}}}]
)
def test_what_has_to_agree_has_to_be_there(gone):
    old = {"cells": {"dip@0.5": {"text": {"perplexity": 10.0}}}}
    assert differences(old, gone, ("cells",), ()) == []
    (found,) = differences(old, gone, ("cells",), ("cells.*.*.perplexity",))
    assert "now" in found
    assert differences({"results": [{"r": 2.0}]}, {"results": []}, ("results",), ("results.*.r",)) == [
        "results has 1 values, now 0"
    ]
