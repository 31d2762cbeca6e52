"""Files of ranges: read, written, refused, and taken into a model."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qatkit import tables
from qatkit.calibrate import calibrate
from qatkit.errors import QatkitError
from qatkit.nn import QuantConv2d, QuantLinear
from qatkit.spec import QuantSpec
from qatkit.tables import CalibrationTable, Encodings, TableEntry, TensorRTCache, import_ranges

TABLE = """# genetated time: 2022-08-11 10:00:59.743675
# histogram number: 2048
# sample number: 100
###
# op_name    threshold    min    max
input 2.6400001 -2.1179039 2.6400001
conv1_Conv 5.5783887 -0.0000000 5.5783887
relu/out:0 0.0000000 0.0000000 0.0000000
"""
CACHE = "TRT-8501-EntropyCalibration2\ninput: 3c010a14\n(Unnamed Layer* 3) [Conv]: 3d3c1f2e\n"


def model() -> nn.Sequential:
    net = nn.Sequential(QuantConv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), QuantLinear(8, 2))
    calibrate(net, [torch.randn(4, 1, 4, 4)], method="minmax")
    return net


def test_a_calibration_table_is_kept_to_the_byte(tmp_path: Path) -> None:
    path, copy = tmp_path / "table", tmp_path / "copy"
    path.write_bytes(TABLE.encode())
    table = tables.read_calibration_table(path)
    assert table.entries[1] == ("conv1_Conv", 5.5783887, 0.0, 5.5783887)
    tables.write_calibration_table(table, copy)
    assert copy.read_bytes() == path.read_bytes()
    assert math.copysign(1, table.entries[1].min) == -1


def test_comments_keep_their_place() -> None:
    text = "# a\nx 1.0000000 -1.0000000 1.0000000\n#b\n# c\ny 1.0000000 -1.0000000 1.0000000\n# d\n"
    assert CalibrationTable.parse(text).text() == text
    assert CalibrationTable.parse("") == CalibrationTable(())


NAMES = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1).filter(
    lambda name: not name.startswith("#") and name.split() == [name]
)


@given(st.dictionaries(NAMES, st.tuples(*[st.floats(0, 1e9)] * 3)))
def test_tables_round_trip(rows: dict[str, tuple[float, float, float]]) -> None:
    entries = tuple(TableEntry(name, t, -a, b) for name, (t, a, b) in rows.items())
    text = CalibrationTable(entries).text()
    assert CalibrationTable.parse(text).text() == text


BAD_TABLES = {
    "three fields": ("a 1 2\n", "line 1: 3 fields"),
    "five fields": ("# x\na 1 -1 1\nb c 1 -1 1\n", "line 3: 5 fields"),
    "blank line": ("a 1 -1 1\n\n", "line 2: 0 fields"),
    "text": ("a 1 -1 x\n", "line 1: the max is 'x'"),
    "nan": ("a nan -1 1\n", "line 1: the threshold is 'nan'"),
    "twice": ("a 1 -1 1\na 1 -1 1\n", "line 2: 'a' is there already"),
    "negative": ("a -1 -1 1\n", "line 1: .*not negative"),
    "inverted": ("a 1 1 -1\n", "line 1: .*min <= max"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_calibration_tables(case: str, tmp_path: Path) -> None:
    text, message = BAD_TABLES[case]
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(QatkitError, match=rf"t\.txt, {message}"):
        tables.read_calibration_table(tmp_path / "t.txt")


@pytest.mark.parametrize("name", ["", "a b", "a\n", "#a", "\ta"])
def test_names_that_a_table_cannot_hold(name: str) -> None:
    with pytest.raises(QatkitError, match="no white space"):
        CalibrationTable((TableEntry(name, 1, -1, 1),))


def test_a_tensorrt_cache_is_kept_to_the_byte(tmp_path: Path) -> None:
    path, copy = tmp_path / "cache", tmp_path / "copy"
    path.write_bytes(CACHE.encode())
    cache = tables.read_tensorrt_cache(path)
    assert cache.version == "8501"
    assert cache.scales["input"] == struct.unpack("!f", bytes.fromhex("3c010a14"))[0]
    tables.write_tensorrt_cache(cache, copy)
    assert copy.read_bytes() == path.read_bytes()


@given(st.dictionaries(st.text("ab:/ .", min_size=1).map(str.strip).filter(bool), st.floats(0, 1)))
def test_caches_round_trip(scales: dict[str, float]) -> None:
    cache = TensorRTCache(scales)
    assert TensorRTCache.parse(cache.text()) == cache
    assert all(len(line.rpartition(": ")[2]) == 8 for line in cache.text().splitlines()[1:])


BAD_CACHES = {
    "empty": ("", "line 1: ''"),
    "head": ("TRT-8501\n", "line 1"),
    "no hex": ("TRT-1-E\na: xyz\n", "line 2: 'a: xyz'"),
    "long hex": ("TRT-1-E\na: 3c010a14\nb: 13c010a14\n", "line 3"),
    "no name": ("TRT-1-E\n: 3c010a14\n", "line 2"),
    "no colon": ("TRT-1-E\na 3c010a14\n", "line 2"),
    "nan": ("TRT-1-E\na: 7fc00000\n", "line 2: scale nan"),
    "negative": ("TRT-1-E\na: bf800000\n", "line 2: scale -1"),
    "twice": ("TRT-1-E\na: 3c010a14\na: 3c010a14\n", "line 3: 'a' is there already"),
    "blank": ("TRT-1-E\n\n", "line 2: ''"),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_bad_caches(case: str) -> None:
    text, message = BAD_CACHES[case]
    with pytest.raises(QatkitError, match=message):
        TensorRTCache.parse(text)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), 1e39])
def test_scales_that_a_cache_cannot_hold(scale: float) -> None:
    with pytest.raises(QatkitError, match="'a' has scale"):
        TensorRTCache({"a": scale})


def test_every_format_gives_the_same_grid_back(tmp_path: Path) -> None:
    source = model()
    tables.write_calibration_table(tables.calibration_table(source), tmp_path / "a")
    tables.write_tensorrt_cache(tables.tensorrt_cache(source), tmp_path / "b")
    tables.write_encodings(tables.encodings(source), tmp_path / "c")
    for table, rel in (
        (tables.read_calibration_table(tmp_path / "a"), 1e-6),
        (tables.read_tensorrt_cache(tmp_path / "b"), 0),
        (tables.read_encodings(tmp_path / "c"), 0),
    ):
        target = model()
        paths = import_ranges(target, table)
        assert paths == ("0.input_quantizer", "3.input_quantizer")
        for index in (0, 3):
            got, wanted = target[index].input_quantizer, source[index].input_quantizer
            assert float(got.scale) == pytest.approx(float(wanted.scale), rel=rel, abs=0)
            assert got.calibrated


def test_affine_encodings(tmp_path: Path) -> None:
    spec = QuantSpec(signed=False, symmetric=False, observer="minmax")
    source, target = (nn.Sequential(QuantLinear(2, 2, input_spec=spec)) for _ in range(2))
    calibrate(source, [torch.tensor([[-1.0, 3.0]])])
    found = tables.encodings(source)
    (each,) = found.activations["0.input_quantizer"]
    assert each.offset == -int(source[0].input_quantizer.zero_point)
    assert len(found.params["0.weight_quantizer"]) == 2
    import_ranges(target, Encodings.parse(found.text()))
    assert float(target[0].input_quantizer.scale) == pytest.approx(each.scale, rel=1e-6)
    assert target[0].input_quantizer.zero_point == source[0].input_quantizer.zero_point
    import_ranges(target, CalibrationTable((TableEntry("0", 9.0, -2.0, 6.0),)))
    assert [float(end) for end in target[0].input_quantizer.range] == [-2, 6]


def test_names_of_modules_and_given_names() -> None:
    net = model()
    assert import_ranges(net, {"0": (-1, 1)}) == ("0.input_quantizer",)
    assert import_ranges(net, {"in": (-2, 1), "fc": (0, 5)}, names={"in": "0", "fc": "3"})
    assert net[0].input_quantizer.amax == 2
    assert net[3].input_quantizer.amax == 5
    import_ranges(net, CalibrationTable((TableEntry("0", 0.5, -1.0, 2.0),)))
    assert net[0].input_quantizer.amax == 0.5


UNMATCHED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "unknown": ({"0": (-9, 9), "conv": (-1, 1)}, {}, "1 of 2 names .* 'conv'; give names="),
    "many": ({f"x{i}": (-1, 1) for i in range(9)}, {}, "9 of 9 names .*'x4' and 4 more"),
    "weight": ({"0.weight_quantizer": (-1, 1)}, {}, "'0.weight_quantizer'"),
    "twice": ({"0": (-9, 9), "0.input_quantizer": (-1, 1)}, {}, "both for 0.input_quantizer"),
    "stray": ({"0": (-9, 9)}, {"zero": "0"}, "'zero': not in the table"),
    "range": ({"0": (-9, 9), "3": (1, -1)}, {}, "low <= high"),
    "nan": ({"0": (-9, 9), "3": (0, float("nan"))}, {}, "finite"),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_a_bad_table_changes_nothing(case: str) -> None:
    table, names, message = UNMATCHED[case]
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(QatkitError, match=message):
        import_ranges(net, table, names=names)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_grids_that_do_not_fit() -> None:
    net = nn.Sequential(QuantLinear(2, 2, input_spec=QuantSpec(num_bits=4)))
    with pytest.raises(QatkitError, match=r"4 bits, .* int8, symmetric"):
        import_ranges(net, TensorRTCache({"0": 0.1}))
    calibrate(net, [torch.ones(1, 2)])
    with pytest.raises(QatkitError, match="int8, symmetric"):
        tables.tensorrt_cache(net)
    found = tables.encodings(net)
    with pytest.raises(QatkitError, match=r"'0\.input_quantizer' has 1 encodings of 4 bits"):
        import_ranges(nn.Sequential(QuantLinear(2, 2)), found)


def test_other_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QatkitError, match="has no quantizers"):
        import_ranges(nn.Linear(2, 2), {"a": (0, 1)})
    with pytest.raises(QatkitError, match="table is a str, read it first"):
        import_ranges(model(), "table.txt")  # type: ignore[arg-type]
    for read in (tables.read_calibration_table, tables.read_tensorrt_cache, tables.read_encodings):
        with pytest.raises(QatkitError, match="missing: cannot be read"):
            read(tmp_path / "missing")
        (tmp_path / "bytes").write_bytes(b"\xff\xfe")
        with pytest.raises(QatkitError, match="UTF-8"):
            read(tmp_path / "bytes")
    with pytest.raises(QatkitError, match="cannot be written"):
        tables.write_calibration_table(CalibrationTable(()), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": }', "line 2: no JSON"),
        ("[]", "no 'activation_encodings'"),
        ('{"activation_encodings": []}', "a list, give an object"),
        ('{"activation_encodings": {"a": {}}}', "'a' is no list"),
        ('{"activation_encodings": {"a": [{"bitwidth": 8}]}}', "'a': .*bitwidth and finite"),
        (
            json.dumps(
                {
                    "activation_encodings": {
                        "a": [
                            {"bitwidth": 16, "dtype": "float", "min": 0, "max": 1, "scale": 1}
                            | {"offset": 0}
                        ]
                    }
                }
            ),
            "only integer",
        ),
    ],
)
def test_bad_encodings(text: str, message: str) -> None:
    with pytest.raises(QatkitError, match=message):
        Encodings.parse(text)
