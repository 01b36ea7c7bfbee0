"""Bodies become fields: JSON and forms, as OpenAI's clients write them, and whatever else comes."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frameloom.serve.api.errors import ApiError
from frameloom.serve.api.forms import MAX_PARTS, MAX_VALUES, Upload, fields_of
from frameloom.serve.api.parameters import PARAMETERS, TAKEN, read_parameters
from frameloom.serve.config import Limits

BOUNDARY = "3d2f"
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def form(*parts, boundary=BOUNDARY, end=True):
    body = b""
    for name, value, *headers in parts:
        file = '; filename="upload"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n' + "".join(headers) + "\r\n"
        body += head.encode() + data + b"\r\n"
    return fields_of(
        f"multipart/form-data; boundary={BOUNDARY}", body + (f"--{boundary}--\r\n".encode() if end else b"")
    )


def of_json(value):
    return fields_of("application/json", value if isinstance(value, bytes) else json.dumps(value).encode())


def refusal(call, *arguments, **options):
    with pytest.raises(ApiError) as caught:
        call(*arguments, **options)
    return caught.value


def result(call, *arguments, **options):
    """What it gives, or the refusal."""
    try:
        return call(*arguments, **options)
    except ApiError as error:
        return error


def test_plain_fields_and_files():
    found = form(("prompt", "a circle\r\nof red ○"), ("seconds", "4"), ("input_reference", b"\x89PNG\r\n--3d2"))
    assert found == {
        "prompt": "a circle\r\nof red ○",
        "seconds": "4",
        "input_reference": Upload(data=b"\x89PNG\r\n--3d2"),
    }


def test_lists_objects_and_lists_of_objects_as_clients_spell_them():
    found = form(
        ("sigmas[]", "1.0"), ("sigmas[]", "0.5"),
        ("input_reference[image_url]", "data:x"),
        ("loras[][name]", "a"), ("loras[][name]", "b"), ("loras[][scale]", "0.5"), ("loras[][scale]", "1"),
    )  # fmt: skip
    assert found["sigmas"] == ["1.0", "0.5"]
    assert found["input_reference"] == {"image_url": "data:x"}
    assert found["loras"] == [{"name": "a", "scale": "0.5"}, {"name": "b", "scale": "1"}]


def test_what_cannot_be_put_together_is_said_and_json_in_a_field_is_the_way_out():
    error = refusal(form, ("loras[][name]", "a"), ("loras[][name]", "b"), ("loras[][scale]", "0.5"))
    assert (error.status, error.param) == (400, "loras")
    assert "2 of name, 1 of scale" in error.message
    assert form(("loras", '[{"name": "a"}, {"name": "b", "scale": 0.5}]'))["loras"][1] == {"name": "b", "scale": 0.5}
    assert form(("prompt", "[a red circle] {x}"))["prompt"] == "[a red circle] {x}"
    assert refusal(form, ("loras", "[{")).param == "loras"
    assert refusal(form, ("loras[]", "a"), ("loras", "b")).param == "loras"


def test_a_file_that_was_not_chosen_is_none():
    assert form(("prompt", "x"), ("input_reference", b"")) == {"prompt": "x"}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "no JSON"), (b"[1]", "no object"), (b"{", "no JSON"), (b'{"a": 1, "a": 2}', "given twice"),
        (b"[" * 15_000 + b"]", "nested too deeply"), (b"[" * (MAX_VALUES + 1), "more than"),
        (b'{"a": "\xff"}', "UTF-8"), (b'{"a": "\\ud800"}', "no text"), (b'{"\\u0000": 1}', "no text"),
    ],
)  # fmt: skip
def test_json_that_is_none_is_one_sentence(body, says):
    error = refusal(of_json, body)
    assert error.status == 400
    assert says in error.message


def test_numbers_without_end_stay_numbers_that_a_parameter_can_refuse():
    assert of_json(b'{"a": 1e400}')["a"] == math.inf
    assert of_json(b'{"a": ' + b"9" * 5000 + b"}")["a"] == math.inf
    assert math.isnan(of_json(b'{"a": NaN}')["a"])


def test_forms_that_are_none_are_one_sentence():
    assert "ends early" in refusal(form, ("prompt", "x"), end=False).message
    assert "ends early" in refusal(form, boundary="other", end=False).message
    assert "no multipart form" in refusal(form, ("prompt", "x"), boundary="other").message
    assert refusal(form, *[("a", "b")] * (MAX_PARTS + 1)).status == 400
    assert refusal(form, ("a[b][c][d]", "b")).status == 400
    assert refusal(form, ("../etc", "b")).status == 400
    assert refusal(form, ("a", "b", "X: " + "y" * 100_000 + "\r\n")).status == 400
    assert refusal(form, ("a", "b", "Content-Type: text/plain; charset=punycode\r\n")).param == "a"
    assert refusal(fields_of, "multipart/form-data", b"--\r\n").status == 400


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx", "\0"])
def test_other_content_types_are_refused(kind):
    assert refusal(fields_of, kind, b'{"prompt": "x"}').status == 415


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["application/json", f"multipart/form-data; boundary={BOUNDARY}"]))
def test_any_bytes_are_fields_or_one_sentence(body, kind):
    found = result(fields_of, kind, body)
    assert isinstance(found, dict) or found.status == 400


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXT, st.one_of(TEXT, st.binary(min_size=1)))))
def test_any_form_is_fields_or_one_sentence(parts):
    found = result(form, *parts)
    assert isinstance(found, dict) or found.status == 400


def read(kind="create", **fields):
    return read_parameters(fields, kind, limits=Limits(prompt_chars=100))


@pytest.mark.parametrize(
    ("name", "given_as", "is_read_as"),
    [
        ("steps", "17", 17), ("steps", 17.0, 17), ("fps", "5.0", 5.0), ("guidance_scale", 3, 3.0),
        ("windows", "true", True), ("windows", False, False), ("size", "832x480", (832, 480)),
        ("size", " 832 X 480 ", (832, 480)),
        ("seconds", "4", 4.0), ("seconds", 2.5, 2.5), ("control_strength", ["1", 0.5], [1.0, 0.5]), ("quality", "0", 0),
        ("loras", "a", [("a", 1.0)]), ("loras", ["a", {"name": "b", "strength": "-2"}], [("a", 1.0), ("b", -2.0)]),
        ("seed", 2**63 - 1, 2**63 - 1), ("seed", str(2**63 - 1), 2**63 - 1), ("deadline", "1e3", 1000.0),
    ],
)  # fmt: skip
def test_parameters_as_text_and_as_they_are(name, given_as, is_read_as):
    found = read(**{name: given_as})[name]
    assert found == is_read_as
    assert type(found) is type(is_read_as)


NUMBERS = [
    name
    for name, parameter in PARAMETERS.items()
    if parameter.form in ("whole", "number", "quality", "priority", "deadline", "seconds")
]
ODD = [
    math.nan, math.inf, -math.inf, "nan", "inf", "1e400", "-1e400", 10**400, -(10**400), -(10**9), "9" * 400,
    True, False, "", " ", "abc", "1,5", "0x10", "٤", [], [1], {}, Upload(data=b"1"),
]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd)[:20])
def test_numbers_that_are_none_are_refused_by_name(name, odd):
    kind = "edit" if name == "strength" else "create"
    if name == "priority" and odd in (0, 1) and not isinstance(odd, bool):
        return
    error = refusal(read, kind, **{name: odd})
    assert (error.status, error.param) == (400, name)
    assert len(error.message) < 300


def test_unknown_parameters_name_the_nearest_and_harmless_ones_pass():
    error = refusal(read, prompt="x", guidence_scale=3)
    assert (error.code, error.param) == ("unknown_parameter", "guidence_scale")
    assert "did you mean guidance_scale?" in error.message
    assert read(prompt="x", user="me", seed=None) == {"prompt": "x"}
    assert refusal(read, prompt="x", num_inference_steps=3, steps=4).param in ("steps", "num_inference_steps")
    assert read(prompt="x", num_inference_steps=3)["steps"] == 3
    assert "cannot be given here" in refusal(read, "remix", prompt="x", width=3).message
    assert refusal(read, prompt="x" * 101).param == "prompt"
    assert refusal(read, prompt=3).param == "prompt"


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(TAKEN)),
    st.dictionaries(
        st.sampled_from(sorted(PARAMETERS)),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    ),
)
def test_any_value_is_read_or_refused_by_name(kind, fields):
    found = result(read, kind, **fields)
    names = {*fields, *(PARAMETERS[name].alias for name in fields)}
    assert isinstance(found, dict) or (found.status == 400 and found.param in names)


def test_sentences_name_what_was_done():
    assert refusal(read, **form(("prompt", "x"), ("prompt", "y"))).message == "prompt is given 2 times; give it once"
    assert refusal(form, ("loras", "[{")).message.startswith("loras is no JSON (")
    assert refusal(form, ("loras", '[{"a": 1, "a": 2}]')).param == "loras"
    assert "it is empty" in refusal(fields_of, "application/json", b" ").message
    assert "the body" not in refusal(form, ("loras", "[{")).message
    assert fields_of("application/json", b"\xef\xbb\xbf" + b'{"prompt": "x"}') == {"prompt": "x"}
    assert "did you mean" not in refusal(read, id="video_1").message
    assert '{"video": {"id": ' in refusal(read, "edit", id="video_1").message
    deep = b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}"
    assert "nested" in refusal(fields_of, "application/json", deep).message
