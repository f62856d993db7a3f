import pytest

from exactune.evaluate.answers import Sample, exact_match_share, is_json, same, valid_json_share


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"a": 1}', True), (" [1]\n", True), ("{'a': 1}", False), ('{"a": 1} and', False), ("12", False), ("null", False), ("", False),
     ('{"a": NaN}', False), ("[" * 100_000, False)],
)  # fmt: skip
def test_json_is_an_object_or_list_and_nothing_else(text, expected):
    assert is_json(text) is expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ('{"b":2,"a":[1,2]}', '{"a": [1, 2], "b": 2}', True),
        ('{"a":[2,1]}', '{"a":[1,2]}', False),
        ('{"a":1,"b":2}', '{"a":1}', False),
        ('{"a":true}', '{"a":1}', False),
        ('{"a":[{"b":false}]}', '{"a":[{"b":0}]}', False),
        ('{"a":1.0}', '{"a":1}', True),
        ("not JSON", '{"a":1}', False),
        (" Paris\n", "Paris", True),
        ("paris", "Paris", False),
        ("42", "42.0", False),
    ],
)
def test_equal_as_json_where_the_reference_is_json(answer, reference, expected):
    assert same(answer, reference) is expected


def test_shares():
    samples = [Sample("q", '{"a":1}', given) for given in ('{"a":1}', '{"a":2}', "no", '{"a": 1}')]
    assert valid_json_share(samples) == 0.75
    assert exact_match_share(samples) == 0.5
    assert valid_json_share([*samples, Sample("q", "words", "words")]) is None
    assert valid_json_share([]) is None and exact_match_share([]) is None
