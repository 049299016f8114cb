"""Which keys name code, where they are refused, and what is left of a file without them."""

from __future__ import annotations

import logging
import threading

import pytest

from qquant.code_keys import check_code, code_ignored, ignoring_code, names_code, without_code
from qquant.errors import BadModelError
from qquant.telling import said


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("auto_map", {"AutoConfig": "code.Config"}, True),
        ("auto_map", {}, False),
        ("trust_remote_code", True, True),
        ("trust_remote_code", False, False),
        ("_attn_implementation_internal", "owner/kernel", True),
        ("_attn_implementation_autoset", True, False),
        ("attn_implementation", None, False),
        ("_experts_implementation", "owner/kernel", True),
        ("custom_generate", "owner/name", True),
        ("custom_layers", 3, False),
        ("customer", "a shop", False),
        ("hidden_size", 64, False),
    ],
)
def test_a_key_names_code_where_its_value_could(key: str, value: object, named: bool) -> None:
    assert names_code(key, value) is named


def test_a_key_is_found_at_any_depth_and_named_with_its_way() -> None:
    with pytest.raises(BadModelError, match=r"^a\.c\.auto_map in config\.json names code.*--ignore-code"):
        check_code({"a": {"b": [1, 2], "c": [{"auto_map": "x.Y"}]}}, "config.json", model_type="qwen2")


def test_without_code_all_else_is_as_it_was() -> None:
    content = {
        "hidden_size": 64,
        "auto_map": 1,
        "text_config": {"custom_x": "y", "layers": [{"use_kernels": True, "n": 2}]},
    }
    assert without_code(content) == {"hidden_size": 64, "text_config": {"layers": [{"n": 2}]}}


def test_code_is_left_out_where_that_is_asked_for_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    said.clear()
    with ignoring_code(), caplog.at_level(logging.WARNING):
        assert code_ignored()
        for _ in range(2):
            assert check_code({"auto_map": {"a": "b"}, "n": 1}, "config.json of m", model_type=None) == {"n": 1}
    assert [record.message for record in caplog.records] == [
        "config.json of m names code (auto_map), which was left out; the classes known here are used"
    ]
    assert not code_ignored()


def test_what_is_asked_for_in_one_thread_is_not_asked_for_in_another() -> None:
    found: list[bool] = []
    with ignoring_code():
        thread = threading.Thread(target=lambda: found.append(code_ignored()))
        thread.start()
        thread.join()
    assert found == [False]


def test_asking_for_nothing_inside_changes_nothing() -> None:
    with ignoring_code(), ignoring_code(False):
        assert code_ignored()


def test_the_original_qwens_map_stays_and_nothing_else_of_its_does() -> None:
    content = {"auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}, "n": 1}
    assert check_code(content, "config.json", model_type="qwen") == content
    with pytest.raises(BadModelError, match="custom_generate"):
        check_code(content | {"custom_generate": "x/y"}, "config.json", model_type="qwen")
    with pytest.raises(BadModelError, match=r"a\.auto_map"):
        check_code({"a": content}, "config.json", model_type="qwen")


@pytest.mark.parametrize("key", ["configuration_files", "fast_tokenizer_files"])
def test_files_in_place_of_others_are_refused_even_without_code(key: str) -> None:
    with ignoring_code(), pytest.raises(BadModelError, match=f"{key} in config.json names other files"):
        check_code({key: ["config.4.0.0.json"]}, "config.json", model_type="qwen2")
