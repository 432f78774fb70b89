"""One Hypothesis profile for all tests: no property fails because the machine was slow."""

import re
import time

from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilib.numbers.records import ROOT


def test_the_profile_has_no_clock_and_prints_how_to_repeat_a_failure():
    assert settings.default.deadline is None
    assert settings.default.print_blob


@settings(max_examples=1)
@given(st.integers())
@example(1)
def test_a_slow_example_is_no_failure(number):
    time.sleep(0.3)  # Hypothesis's own deadline is 0.2 s


def test_no_test_sets_a_deadline_of_its_own():
    tests = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.endswith("conftest.py")]
    assert not [path for path in tests if re.search(r"settings\([^)]*\bdeadline=", path.read_text())]
