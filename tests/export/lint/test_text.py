from __future__ import annotations

from qatkit.export.lint import Finding, at_least, format_findings, lint_onnx
from tests.export.lint.qdq_builder import Graph


def batch_norms(count):
    g = Graph()
    x = g.input(1, 16, 8, 8)
    for i in range(count):
        y = g.conv(g.qdq(x, 0.1, name=f"x{i}"), 16, 16, name=f"layer{i}.conv")
        x = g.op("Relu", g.batch_norm(y, 16, name=f"layer{i}.bn"))
    return g.model(x)


def test_many_findings_of_a_kind_are_one():
    findings = lint_onnx(batch_norms(53))
    assert len(findings) == 53
    lines = format_findings(findings).splitlines()
    assert lines == [
        "level  rule  node       finding",
        "WARN   F5    layer0.bn  BatchNormalization behind quantized Conv 'layer0.conv'; fold it "
        "into the weight before the weight quantizer",
        "                        and 52 more: layer1.bn, layer2.bn, layer3.bn, ...",
        "F5  [D] TensorRT, Q/DQ placement",
        "0 errors, 53 warnings, 0 infos",
    ]


def test_two_are_written_out():
    lines = format_findings(lint_onnx(batch_norms(2))).splitlines()
    assert [line.split()[2] for line in lines[1:3]] == ["layer0.bn", "layer1.bn"]


def test_numbers_and_names_do_not_part_a_group_but_words_do():
    findings = [
        *(
            Finding("P2", "ERROR", f"q{i}", f"zero point {value}")
            for i, value in enumerate((3, -128, 7))
        ),
        *(Finding("P2", "ERROR", f"z{i}", "zero point is not a constant") for i in range(3)),
        *(Finding("P2", "WARN", f"w{i}", "zero point 3") for i in range(3)),
    ]
    lines = format_findings(findings).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["ERROR", "and"] * 2 + ["WARN", "and"]


def test_columns_line_up_and_long_names_do_not_widen_them():
    long = "/".join(["block"] * 30)
    findings = [Finding("P2", "ERROR", "q", "one"), Finding("F2b", "WARN", long, "two")]
    lines = format_findings(findings).splitlines()
    assert lines[0].index("finding") == lines[1].index("one") < 80
    assert f"{long}  two" in lines[2]


def test_names_of_the_others_are_cut_in_front():
    findings = [Finding("F1", "WARN", f"{'a' * 50}.layer{i}", "float") for i in range(4)]
    more = format_findings(findings).splitlines()[2]
    assert ".layer1, ..." in more
    assert len(more) < 200


def test_sources_of_a_rule_stand_once():
    findings = [
        Finding("B1", "ERROR", "a", "x", "[I] one"),
        Finding("B1", "ERROR", "b", "y", "[I] two"),
        Finding("B1", "ERROR", "c", "y", "[I] two"),
        Finding("F2b", "WARN", "d", "z", "[T] three"),
    ]
    assert format_findings(findings).splitlines()[-3:-1] == [
        "B1   [I] one; [I] two",
        "F2b  [T] three",
    ]


def test_at_least():
    findings = [Finding("a", level, "n", "m") for level in ("ERROR", "WARN", "INFO")]
    assert at_least(findings, "ERROR") == findings[:1]
    assert at_least(findings, "WARN") == findings[:2]
    assert at_least(findings, "INFO") == findings
