from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from qatkit.export.lint import VERSIONS, rule_table, rules, rules_of_version

PAGE = Path(__file__).parents[3] / "docs" / "lint.md"
TABLES = {"rules": rules, **{f"trt {one}": partial(rules_of_version, one) for one in VERSIONS}}
LISTED = {
    *(f"P{i}" for i in range(1, 11)),
    *("B1", "B2", "F2b", "F6c"),
    *(f"F{i}" for i in range(1, 22) if i != 16),  # F16 is a choice, which F1 reports
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_is_what_the_rules_say(name):
    written = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert written is not None
    assert written[1] == rule_table(TABLES[name]()), f"write this table into {PAGE.name}"


def test_every_rule_of_the_list_is_checked():
    assert {rule.id for rule in rules()} == LISTED


@pytest.mark.parametrize("name", TABLES)
def test_every_check_says_its_rule_first(name):
    for rule in TABLES[name]():
        check = rule.check.func if isinstance(rule.check, partial) else rule.check
        assert (check.__doc__ or "").startswith(f"{rule.id}: "), check
        assert re.match(r"\[[CDTI]\]", rule.source), rule


def test_sorted_by_id():
    ids = [line.split("|")[1].strip() for line in rule_table(rules()).splitlines()[2:]]
    assert (
        ids.index("P2") < ids.index("P10") < ids.index("B1") < ids.index("F2b") < ids.index("F10")
    )
